"""`sparseq export --to torch`: programs that need nothing but torch compute and write what the model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparseq import SparseqForConditionalGeneration
from sparseq.cli import main
from sparseq.conversion.torch_programs import cache_tensor
from tests.absent import run_without_package
from tests.conversion.checkpoints import write_checkpoint
from tests.conversion.exported import NEW_TOKENS, TEXTS, export, generated, run_readme, tokenizer, write_model
from tests.conversion.tokenizer_folders import SENTENCES
from tests.tolerances import assert_close

MODELS: dict[str, dict[str, Any]] = {
    "sparse, rotary, shared experts": {"num_shared_experts": 1, "encoder_layers": 1, "decoder_sparse_step": 2},
    "sparse, sinusoids, plain experts with biases": {
        "position_embedding_type": "sinusoidal",
        "encoder_layers": 1,
        "decoder_layers": 1,
        "norm_position": "post",
        "norm_type": "layernorm",
        "gated_ffn": False,
        "expert_bias": True,
        "router_balancing": "loss_free",
        "router_scoring": "sigmoid",
    },
    "dense, learned positions": {
        "num_experts": 0,
        "encoder_layers": 1,
        "position_embedding_type": "learned",
        "position_offset": 2,
    },
}


def load(folder: Path) -> dict[str, Any]:
    return {name: torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "decoder")}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_programs_compute_and_write_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **MODELS[name])
    export(tmp_path / "model", tmp_path / "exported", "--to", "torch")
    programs = load(tmp_path / "exported")
    operators = {str(node.target) for one in programs.values() for node in one.graph.nodes}
    assert not any("transformers" in operator for operator in operators)

    generator = torch.Generator().manual_seed(0)
    # Batch, length of the source, tokens of the prefill and of two later calls.
    for batch, length, *parts in ((1, 1, 1, 1, 1), (1, 9, 4, 1, 1), (5, 20, 1, 3, 1)):
        ids = torch.randint(4, model.config.vocab_size, (batch, length), generator=generator)
        target = torch.randint(4, model.config.vocab_size, (batch, sum(parts)), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 + 1 :] = 0
        cross_cache = programs["encoder"](input_ids=ids, attention_mask=mask)
        self_cache = [cache_tensor(model, batch, 0)] * (2 * model.config.decoder_layers)
        logits = []
        for tokens in target.split(parts, dim=1):
            step, self_cache = programs["decoder"](
                decoder_input_ids=tokens, attention_mask=mask, self_cache=self_cache, cross_cache=cross_cache
            )
            logits.append(step)
        expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        assert_close(torch.cat(logits, dim=1), expected, torch.float32, name)

    said = run_readme(tmp_path / "exported", tmp_path, call=f"translate({TEXTS!r})")
    assert said == tokenizer().batch_decode(generated(model), skip_special_tokens=True)


def test_programs_load_with_nothing_but_torch(tmp_path: Path) -> None:
    write_model(tmp_path / "model", num_experts=0, encoder_layers=1, decoder_layers=1)
    export(tmp_path / "model", tmp_path / "exported", "--to", "torch", "--dtype", "bfloat16")
    code = """
import torch
sys.modules["transformers"] = None
encoder = torch.export.load(sys.argv[1] + "/encoder.pt2").module()
ids = torch.tensor([[5, 6, 7]])
cache = encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
print(*cache[0].shape, cache[0].dtype)
"""
    assert run_without_package(code, tmp_path / "exported", home=tmp_path) == "1 1 3 8 torch.bfloat16"


def test_a_converted_model_with_its_tokenizer(tmp_path: Path) -> None:
    """One that has no tokenizer.json, and is forced to write the code of a language first."""
    write_checkpoint("mbart50", tmp_path / "source", encoder_layers=1, decoder_layers=1)
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "model"), "--target-language", "de_DE"]
    assert main(command) == 0
    model = SparseqForConditionalGeneration.from_pretrained(tmp_path / "model")
    model.generation_config.update(max_length=None, max_new_tokens=NEW_TOKENS, forced_eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "--to", "torch")
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    batch = own(SENTENCES[:2], padding=True, return_tensors="pt")
    rows = model.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    said = run_readme(tmp_path / "exported", tmp_path, call=f"translate({SENTENCES[:2]!r})")
    assert said == own.batch_decode(rows, skip_special_tokens=True)


def test_options_of_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "torch", "--merge-experts", "mean"]
    assert main(arguments) == 2
    assert "--merge-experts is for ctranslate2; it has no effect with --to torch" in capsys.readouterr().err
