"""Graphs against the PyTorch model: encoder, prefill and steps of configurations of every kind."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparseq import SparseqForConditionalGeneration
from sparseq.graphs.files import export_graphs
from tests.graphs.exported import ExportedModel
from tests.tiny import VOCAB, tiny_model

PREFIX, LENGTH = 3, 7

# Fields and the values that a drawn configuration may have.
CHOICES: dict[str, list[Any]] = {
    "encoder_num_key_value_heads": [1, 2, None],
    "decoder_num_key_value_heads": [1, 2, None],
    "encoder_attention_heads": [4, 8],
    "encoder_layers": [1, 2],
    "decoder_layers": [1, 2, 3],
    "activation_function": ["relu", "gelu", "silu", "gelu_new", "relu2"],
    "gated_ffn": [True, False],
    "position_offset": [0, 2],
    "sinusoidal_layout": ["interleaved", "halves"],
    "sinusoidal_spacing": ["paper", "tensor2tensor"],
    "norm_type": ["layernorm", "rmsnorm"],
    "norm_position": ["pre", "post"],
    "norm_eps": [1e-6, 1e-3],
    "embedding_norm": [True, False],
    "final_norm": [True, False, None],
    "scale_embedding": [True, False],
    "tie_word_embeddings": [True, False],
    "share_encoder_decoder_embeddings": [True, False],
    "attention_bias": [True, False],
    "ffn_bias": [True, False],
    "final_logits_bias": [True, False],
    "d_model": [32, 48, 80],
}
EXPERTS: dict[str, list[Any]] = {
    "num_experts": [4, 5],
    "num_experts_per_tok": [2, 3],
    "encoder_sparse_step": [0, 1, 2],
    "decoder_sparse_step": [1],
    "expert_ffn_dim": [16, 24],
    "expert_bias": [True, False],
    "num_shared_experts": [0, 2],
    "router_scoring": ["softmax", "sigmoid"],
    "norm_topk_prob": [True, False],
    "router_balancing": ["aux_loss", "loss_free"],
}
POSITIONS: list[dict[str, Any]] = [
    {"position_embedding_type": "sinusoidal"},
    {"position_embedding_type": "learned"},
    {"position_embedding_type": "rotary"},
    {"position_embedding_type": "rotary", "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2}},
    {"position_embedding_type": "none"},
]


def drawn_model(seed: int) -> SparseqForConditionalGeneration:
    """A model of a drawn configuration, sparse if the seed is odd, no parameter of which is zero."""
    draw = random.Random(seed)
    choices = {**CHOICES, **(EXPERTS if seed % 2 else {"num_experts": [0]})}
    fields = {name: draw.choice(values) for name, values in choices.items()}
    model = tiny_model(seed, **fields, **POSITIONS[seed % len(POSITIONS)])
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 or tensor.eq(0).all():
            tensor.data += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source, its mask with padding on the right, on the left and not at all, and target."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, VOCAB, (3, 9), generator=generator)
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    mask[2, :2] = 0
    return source.masked_fill(mask == 0, 0), mask, torch.randint(3, VOCAB, (3, LENGTH), generator=generator)


@torch.no_grad()
def reference(
    model: SparseqForConditionalGeneration, source: torch.Tensor, mask: torch.Tensor, target: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and attention of one forward without a cache."""
    model.set_attn_implementation("eager")
    output = model(source, attention_mask=mask, decoder_input_ids=target, output_attentions=True)
    layer = max(model.config.decoder_layers - 2, 0)
    return output.logits.numpy(), output.cross_attentions[layer].mean(dim=1).numpy()


def assert_equal_to_model(model: SparseqForConditionalGeneration, folder: Path) -> None:
    export_graphs(model, folder)
    source, mask, target = batch()
    logits, attention = ExportedModel(folder).decode(source.numpy(), mask.numpy(), target.numpy(), PREFIX)
    expected_logits, expected_attention = reference(model.float(), source, mask, target)
    scale = np.abs(expected_logits).max()
    np.testing.assert_allclose(logits, expected_logits[:, PREFIX - 1 :], rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(attention, expected_attention[:, PREFIX:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_graphs_compute_what_the_model_computes(seed: int, tmp_path: Path) -> None:
    assert_equal_to_model(drawn_model(seed), tmp_path / "graphs")


@pytest.mark.parametrize("kind", ["sinusoidal", "rotary"])
def test_positions_far_on_are_exact(kind: str, tmp_path: Path) -> None:
    model = tiny_model(num_experts=0, position_embedding_type=kind)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(3, VOCAB, (2, length), generator=generator) for length in (500, 1203))
    mask = torch.ones_like(source)
    export_graphs(model, tmp_path / "graphs")
    logits, _ = ExportedModel(tmp_path / "graphs").decode(source.numpy(), mask.numpy(), target.numpy(), 1200)
    expected, _ = reference(model, source, mask, target)
    np.testing.assert_allclose(logits, expected[:, 1199:], rtol=1e-4, atol=1e-4)


def test_heads_of_an_odd_width(tmp_path: Path) -> None:
    model = tiny_model(d_model=20, num_experts=0, position_embedding_type="none")
    assert_equal_to_model(model, tmp_path / "graphs")


@pytest.mark.parametrize("vocab_size", [60, 64, 500])
@pytest.mark.parametrize("number", [1, 2, 9, 60])
def test_the_likeliest_tokens_are_those_of_a_full_sort(vocab_size: int, number: int, tmp_path: Path) -> None:
    export_graphs(tiny_model(num_experts=0, vocab_size=vocab_size), tmp_path / "graphs")
    logits = np.random.default_rng(0).normal(scale=20, size=(5, vocab_size)).astype(np.float32)
    found = ExportedModel(tmp_path / "graphs").run("likeliest", logits=logits, number=np.array([number]))
    expected = torch.from_numpy(logits).double().log_softmax(dim=-1).sort(descending=True)
    np.testing.assert_array_equal(found["ids"], expected.indices[:, :number])
    np.testing.assert_allclose(found["log_probs"], expected.values[:, :number], rtol=1e-5, atol=1e-5)


def test_a_model_in_bfloat16_is_exported_from_its_weights_in_float32(tmp_path: Path) -> None:
    assert_equal_to_model(tiny_model(num_experts=0).to(torch.bfloat16), tmp_path / "graphs")


def test_an_activation_without_a_graph_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model(num_experts=0)
    model.config.activation_function = "odd"
    with pytest.raises(ValueError, match=r"'odd'.*'relu'.*PyTorch"):
        export_graphs(model, tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


def test_a_model_with_an_adapter_is_refused(tmp_path: Path) -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model(num_experts=0)
    model.model.decoder.layers[0].self_attn.q_proj = Adapted(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"decoder.layers.0.self_attn.q_proj.*Adapted.*merge_and_unload"):
        export_graphs(model, tmp_path / "graphs")
