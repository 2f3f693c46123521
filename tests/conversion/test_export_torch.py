"""`sparseq export --to torch`: programs that need nothing but torch compute and write what the model does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparseq.cli import main
from sparseq.conversion.torch_programs import cache_tensor
from tests.conversion.exported import (
    TEXTS,
    check_converted,
    export,
    generated,
    run_readme,
    run_readme_here,
    tokenizer,
    write_model,
)
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
    # Both have the embeddings and cross-attention's projections of keys and values; none has what it does not use.
    attentions = [layer.encoder_attn for layer in model.model.decoder.layers]
    shared = [model.model.shared, *(one for attention in attentions for one in (attention.k_proj, attention.v_proj))]
    twice = sum(weight.numel() for module in shared for weight in module.parameters())
    stored = sum(weight.numel() for program in programs.values() for weight in program.parameters())
    assert stored == sum(weight.numel() for weight in model.parameters()) + twice
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

    said = run_readme_here(tmp_path / "exported", call=f"translate({TEXTS!r})")
    assert said == tokenizer().batch_decode(generated(model), skip_special_tokens=True)


def test_the_readme_runs_with_nothing_but_torch_and_the_tokenizer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", encoder_layers=1, decoder_layers=1).to(torch.bfloat16)
    export(tmp_path / "model", tmp_path / "exported", "--to", "torch", "--dtype", "bfloat16")
    imported = "[name for name in ('transformers', 'sparseq') if name in __import__('sys').modules]"
    said, names = run_readme(tmp_path / "exported", tmp_path, call=f"[translate({TEXTS!r}), {imported}]")
    assert said == tokenizer().batch_decode(generated(model), skip_special_tokens=True)
    assert names == []


def test_a_converted_model_with_its_tokenizer(tmp_path: Path) -> None:
    """One that has no tokenizer.json, and is forced to write the code of a language first."""
    check_converted("mbart50", "de_DE", "torch", tmp_path)


def test_options_of_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "torch", "--merge-experts", "mean"]
    assert main(arguments) == 2
    assert "--merge-experts is for ctranslate2; it has no effect with --to torch" in capsys.readouterr().err
