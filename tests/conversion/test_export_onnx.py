"""`sparseq export --to onnx`: plain ONNX Runtime, with neither this package nor torch, writes what the model does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.conversion.exported import (
    TEXTS,
    check_converted,
    export,
    generated,
    run_readme,
    sources,
    tokenizer,
    write_model,
)

MODELS: dict[str, dict[str, Any]] = {
    "sparse, rotary, grouped queries": {"decoder_num_key_value_heads": 2, "num_shared_experts": 1},
    "sparse, sinusoids, plain experts": {
        "position_embedding_type": "sinusoidal",
        "norm_position": "post",
        "norm_type": "layernorm",
        "gated_ffn": False,
        "activation_function": "relu",
    },
    "dense, learned positions": {
        "num_experts": 0,
        "position_embedding_type": "learned",
        "position_offset": 2,
        "attention_bias": True,
        "ffn_bias": True,
    },
}
# Evaluated behind the program of README.md: what it wrote, and what it had to import for that.
_IMPORTED = "[name for name in ('torch', 'transformers', 'sparseq') if name in __import__('sys').modules]"
CALL = f"[translate({TEXTS!r}), {_IMPORTED}]"


@pytest.mark.parametrize("name", MODELS)
def test_the_readme_runs_with_onnxruntime_alone(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **MODELS[name])
    export(tmp_path / "model", tmp_path / "exported", "--to", "onnx")
    said, imported = run_readme(tmp_path / "exported", tmp_path, call=CALL)
    assert said == tokenizer().batch_decode(generated(model), skip_special_tokens=True)
    assert imported == []


def test_translations_of_these_tests_end_early_and_late(tmp_path: Path) -> None:
    """Without this the programs would be compared on sentences of one length only."""
    lengths = {len(row) for fields in MODELS.values() for row in generated(write_model(tmp_path, **fields))}
    assert len(lengths) > 2


def logits(folder: Path) -> np.ndarray:
    """Those of two target tokens: of the second `(B, V)`, from the folder's encoder, prefill and step."""
    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "prefill", "step")}

    def run(name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(names, sessions[name].run(names, inputs), strict=True))

    ids = sources().numpy()
    source = run("encoder", {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)})
    rows = len(ids)
    first = run("prefill", {"tokens": np.ones((rows, 1), dtype=np.int64), **source})
    past = {name.replace("present", "past"): value for name, value in first.items() if name != "logits"}
    slots = {"past_lengths": np.ones(rows, np.int32), "total_length": np.full(1, 2, np.int32)}
    slots["slot_bias"] = np.zeros((1, 1, 1, 2), np.float32)
    tokens = {"tokens": np.full(rows, 5, dtype=np.int64), "position": np.ones(1, dtype=np.int64)}
    return run("step", {**tokens, **slots, **past, **source})["logits"]


@pytest.mark.parametrize("fields", [{}, {"num_experts": 0}], ids=["sparse", "dense"])
def test_eight_bits(fields: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "model", **{"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, **fields})
    for precision in ("float32", "int8"):
        export(tmp_path / "model", tmp_path / precision, "--to", "onnx", "--precision", precision)
    sizes = {precision: (tmp_path / precision / "weights.bin").stat().st_size for precision in ("float32", "int8")}
    assert sizes["int8"] < 0.4 * sizes["float32"]
    whole, rounded = logits(tmp_path / "float32"), logits(tmp_path / "int8")
    # Rounded, and the same model all the same: logits of two unrelated ones would be 1.6 standard deviations apart.
    assert 0 < np.abs(rounded - whole).mean() < 0.5 * whole.std()
    assert json.loads((tmp_path / "int8" / "graphs.json").read_text("utf-8"))["precision"] == "int8"


def test_a_converted_model_with_its_tokenizer(tmp_path: Path) -> None:
    """One that is forced to write the code of a language first."""
    check_converted("nllb", "deu_Latn", "onnx", tmp_path)


def test_what_is_written(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("MIT", encoding="utf-8")
    export(tmp_path / "model", tmp_path / "exported", "--to", "onnx", "--precision", "int8")
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    graphs = {f"{name}.onnx" for name in ("encoder", "prefill", "step", "step_attention", "likeliest")}
    assert names >= graphs | {"weights.bin", "graphs.json", "generation_config.json", "LICENSE"}
    assert names >= {"README.md", "tokenizer.json", "tokenizer_config.json", "conversion.json"}
    # A folder of this machine is nobody else's business.
    assert str(tmp_path) not in (tmp_path / "exported" / "graphs.json").read_text("utf-8")
    # Another export takes its place.
    export(tmp_path / "model", tmp_path / "exported", "--to", "onnx", "--force")
    assert json.loads((tmp_path / "exported" / "graphs.json").read_text("utf-8"))["precision"] == "float32"


def test_a_model_without_tokenizer_has_a_program_for_numbers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=0)
    for path in tmp_path.glob("model/tokenizer*"):
        path.unlink()
    export(tmp_path / "model", tmp_path / "exported", "--to", "onnx")
    ids = sources()
    call = f"generate({ids.tolist()}, {ids.ne(0).long().tolist()})"
    rows = run_readme(tmp_path / "exported", tmp_path, call=call)
    assert rows == model.generate(ids, attention_mask=ids.ne(0).long())[:, 1:].tolist()
