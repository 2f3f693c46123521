"""Sparse layer and grouped-query attention equal those of Mixtral, Qwen3-MoE and Llama; dense layers NLLB-MoE's.

NLLB-MoE's own sparse layers are no reference: in this version of the library they run two of their experts only.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, NllbMoeConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralRotaryEmbedding,
    MixtralSparseMoeBlock,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDecoderLayer, NllbMoeEncoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from sparseq import SparseqConfig
from sparseq.modeling_sparseq import (
    SparseqAttention,
    SparseqDecoderLayer,
    SparseqEncoderLayer,
    SparseqRotaryEmbedding,
    SparseqSparseMLP,
)
from tests.parity.weights import assert_gradients_close, copy_weights, randomize
from tests.tolerances import assert_close

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "sparseq"]


def mixtral_block(experts: int, top_k: int, width: int, hidden: int) -> nn.Module:
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


def qwen3_block(experts: int, top_k: int, width: int, hidden: int, renormalise: bool) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=renormalise,
    )
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config)


def sparseq_block(implementation: str, experts: int, top_k: int, width: int, hidden: int, renormalise: bool) -> Any:
    config = SparseqConfig(
        d_model=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        expert_ffn_dim=width,
        norm_topk_prob=renormalise,
        router_scoring="softmax",
    )
    config._experts_implementation = implementation
    return SparseqSparseMLP(config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (7, 3)])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "qwen3-renormalised"])
def test_sparse_layer_equals_the_librarys(kind: str, experts: int, top_k: int, implementation: str) -> None:
    width, hidden = 12, 16
    if kind == "mixtral":
        reference = mixtral_block(experts, top_k, width, hidden)
    else:
        reference = qwen3_block(experts, top_k, width, hidden, kind == "qwen3-renormalised")
    block = sparseq_block(implementation, experts, top_k, width, hidden, kind != "qwen3")
    randomize(reference)
    names = copy_weights(reference, block, [(r"^gate\.", "router.")])

    states = torch.randn(2, 9, hidden)
    inputs, reference_inputs = (states.clone().requires_grad_() for _ in range(2))
    outputs, (logits, indices) = block(inputs)
    expected = reference(reference_inputs)
    assert_close(outputs, expected, torch.float32, "outputs")
    expected_logits, _, expected_indices = reference.get_submodule("gate")(states.view(-1, hidden))
    assert_close(logits, expected_logits, torch.float32, "router logits")
    assert torch.equal(indices, expected_indices)

    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(inputs.grad, reference_inputs.grad, torch.float32, "inputs")
    assert_gradients_close(reference, block, names, torch.float32)


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("rope", ["default", "theta", "linear"])
@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_grouped_query_attention_with_rotary_equals_the_librarys(
    kind: str, rope: str, heads: int, kv_heads: int, attention: str
) -> None:
    hidden, length = heads * 8, 11
    config_class: Any = MixtralConfig if kind == "mixtral" else LlamaConfig
    reference_config = config_class(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_parameters=dict(ROPE[rope]),
        attn_implementation=attention,
    )
    config = SparseqConfig(
        d_model=hidden,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_num_key_value_heads=kv_heads,
        decoder_num_key_value_heads=kv_heads,
        rope_parameters=dict(ROPE[rope]),
        attn_implementation=attention,
    )
    attention_class: Any = MixtralAttention if kind == "mixtral" else LlamaAttention
    rotary_class: Any = MixtralRotaryEmbedding if kind == "mixtral" else LlamaRotaryEmbedding
    reference = attention_class(reference_config, layer_idx=0)
    module = SparseqAttention(config, is_decoder=True, is_causal=True, layer_idx=0)
    randomize(reference)
    names = copy_weights(reference, module, [("^o_proj", "out_proj")])

    states, position_ids = torch.randn(2, length, hidden), torch.arange(length)[None]
    inputs, reference_inputs = (states.clone().requires_grad_() for _ in range(2))
    rotary = SparseqRotaryEmbedding(config, hidden // heads)(position_ids, torch.float32)
    reference_rotary = rotary_class(reference_config)(states, position_ids)
    outputs, _ = module(inputs, causal_mask(length), rotary=rotary)
    expected, _ = reference(reference_inputs, reference_rotary, causal_mask(length))
    assert_close(outputs, expected, torch.float32, "outputs")

    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(inputs.grad, reference_inputs.grad, torch.float32, "inputs")
    assert_gradients_close(reference, module, names, torch.float32)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_dense_layers_equal_nllb_moes(stack: str) -> None:
    reference_config = NllbMoeConfig(
        d_model=24,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        activation_function="relu",
        dropout=0.0,
        attn_implementation="eager",
    )
    config = SparseqConfig(
        d_model=24,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_num_key_value_heads=None,
        decoder_num_key_value_heads=None,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        activation_function="relu",
        gated_ffn=False,
        norm_type="layernorm",
        norm_eps=1e-5,
        attention_bias=True,
        ffn_bias=True,
        num_experts=0,
        position_embedding_type="none",
        attn_implementation="eager",
    )
    renames = [(r"^ffn\.fc1\.", "mlp.up_proj."), (r"^ffn\.fc2\.", "mlp.down_proj.")]
    renames += [("^ff_layer_norm", "final_layer_norm"), ("^cross_attention_layer_norm", "encoder_attn_layer_norm")]
    renames += [("^cross_attention", "encoder_attn")]
    if stack == "encoder":
        reference: nn.Module = NllbMoeEncoderLayer(reference_config).eval()
        layer: nn.Module = SparseqEncoderLayer(config, layer_idx=0).eval()
    else:
        reference = NllbMoeDecoderLayer(reference_config, layer_idx=0).eval()
        layer = SparseqDecoderLayer(config, layer_idx=0).eval()
    randomize(reference)
    names = copy_weights(reference, layer, renames)

    states, source = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    source_mask = torch.zeros(2, 1, 1, 5)
    source_mask[1, ..., 3:] = torch.finfo(torch.float32).min
    arguments = (states, torch.zeros(2, 1, 1, 7))
    if stack == "decoder":
        arguments = (states, causal_mask(7).expand(2, 1, 7, 7), source, source_mask.expand(2, 1, 7, 5))
    (outputs, routing), expected = layer(*arguments), reference(*arguments)
    assert routing is None
    assert_close(outputs, expected, torch.float32, "outputs")
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_gradients_close(reference, layer, names, torch.float32)
