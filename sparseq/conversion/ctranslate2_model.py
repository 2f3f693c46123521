"""A dense Sparseq model as CTranslate2 runs it: the specification of its layers, filled with weights.

CTranslate2 has no name for the architecture and needs none: its `TransformerSpec` says what each layer computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ctranslate2.specs import (
    attention_spec,
    common_spec,
    transformer_spec,
)

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.changes import STACKS, Stack, layer_count
from sparseq.conversion.convert import DECODER, ENCODER, LOGITS_BIAS, OUTPUT
from sparseq.conversion.tensors import Planned, tied_tensors
from sparseq.loading import is_finite
from sparseq.modeling_sparseq import SparseqForConditionalGeneration, SparseqSinusoidalPositions

DEFAULT_POSITIONS = 1024
_ACTIVATIONS = {
    "relu": common_spec.Activation.RELU,
    "gelu": common_spec.Activation.GELU,
    "gelu_python": common_spec.Activation.GELU,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        common_spec.Activation.GELUTanh,
    ),
    "quick_gelu": common_spec.Activation.GELUSigmoid,
    "silu": common_spec.Activation.SWISH,
    "swish": common_spec.Activation.SWISH,
    "tanh": common_spec.Activation.Tanh,
    "sigmoid": common_spec.Activation.Sigmoid,
}
# Those that store weights which are not quantized in float16.
_HALF = ("float16", "int8_float16")


def check_representable(config: SparseqConfig) -> None:
    """
    Raises:
        ValueError: CTranslate2 cannot compute what the model does; the message names the field and the way out.
    """
    if config.num_experts:
        raise ValueError(
            f"CTranslate2 has no mixtures of experts, but the model has {config.num_experts} experts (`num_experts`): "
            "merge them with --merge-experts mean, or choose those to keep, which changes what it computes; or run it "
            "as it is with --to onnx."
        )
    if config.activation_function not in _ACTIVATIONS:
        raise ValueError(
            f"CTranslate2 has no activation {config.activation_function!r} (`activation_function`), but "
            f"{', '.join(_ACTIVATIONS)}: use --to onnx or --to torch."
        )


def position_rows(config: SparseqConfig, asked: int | None) -> int:
    """How many positions the tables of a model of CTranslate2 have, one of which it needs where ours computes them.

    Args:
        config: The model's.
        asked: How many the user wants; None leaves it to the configuration.

    Raises:
        ValueError: There is nothing to choose.
    """
    kind = config.position_embedding_type
    if asked is not None and kind in ("learned", "rotary"):
        has = f"has {config.max_position_embeddings} learned ones" if kind == "learned" else "has any number of them"
        raise ValueError(f"--positions {asked} is for positions that are put into a table, but the model {has}.")
    return asked or config.max_position_embeddings or DEFAULT_POSITIONS


def make_spec(
    config: SparseqConfig, planned: Mapping[str, Planned], *, rows: int, dtype: torch.dtype, quantization: str | None
) -> transformer_spec.TransformerSpec:
    """The specification with its weights, in the type of the source; it has no vocabulary yet.

    Args:
        config: A configuration that `check_representable` accepts.
        planned: The tensors of a `SparseqForConditionalGeneration` of this configuration, by name.
        rows: As `position_rows` says.
        dtype: Type of the weights.
        quantization: What they will be stored as; they must be within its range.

    Raises:
        ValueError: A weight is too large for float16, or not finite.
    """
    weights = _Weights(planned, tied_tensors(SparseqForConditionalGeneration, config), dtype, quantization in _HALF)
    stacks = {
        "encoder": transformer_spec.TransformerEncoderSpec(**_shape(config, "encoder")),
        "decoder": transformer_spec.TransformerDecoderSpec(**_shape(config, "decoder")),
    }
    for stack in STACKS:
        _fill_stack(stacks[stack], stack, config, weights, rows)
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    encoder.embeddings[0].weight = weights.read(ENCODER)
    decoder.embeddings.weight = weights.read(DECODER)
    decoder.projection.weight = weights.read(OUTPUT)
    if config.final_logits_bias:
        decoder.projection.bias = weights.read(LOGITS_BIAS)[0]
    return transformer_spec.TransformerSpec(encoder, decoder)


@dataclass(frozen=True)
class _Weights:
    """The tensors of the model, and how they get into a layer of a specification.

    Attributes:
        planned: The tensors by name.
        tied: Names of tensors that are another one, and of that.
        dtype: What they are read as: CTranslate2 takes one type for all.
        is_half: Whether float16 must be able to hold them.
    """

    planned: Mapping[str, Planned]
    tied: Mapping[str, str]
    dtype: torch.dtype
    is_half: bool

    def read(self, name: str) -> torch.Tensor:
        tensor = self.planned[self.tied.get(name, name)].make().to(self.dtype)
        if self.is_half and not is_finite(tensor.half()):
            raise ValueError(f"{name} has numbers that are too large for float16: choose another --quantization.")
        return tensor

    def linear(self, spec: common_spec.LinearSpec, *names: str) -> None:
        """One product in place of those of several projections."""
        spec.weight = torch.cat([self.read(f"{name}.weight") for name in names])
        if f"{names[0]}.bias" in self.planned:
            spec.bias = torch.cat([self.read(f"{name}.bias") for name in names])

    def norm(self, spec: common_spec.LayerNormSpec, name: str) -> None:
        spec.gamma = self.read(f"{name}.weight")
        if f"{name}.bias" in self.planned:
            spec.beta = self.read(f"{name}.bias")


def _shape(config: SparseqConfig, stack: Stack) -> dict[str, Any]:
    """The arguments that both stacks' specifications have in common."""
    fields: dict[str, Any] = {
        "num_layers": layer_count(config, stack),
        "num_heads": getattr(config, f"{stack}_attention_heads"),
        "num_heads_kv": getattr(config, f"{stack}_num_key_value_heads"),
        # Only with it there is a place for the norm at the end; where the others are is set afterwards.
        "pre_norm": True,
        "no_final_norm": not config.final_norm,
        "activation": _ACTIVATIONS[config.activation_function],
        "ffn_glu": config.gated_ffn,
        "rms_norm": config.norm_type == "rmsnorm",
        "layernorm_embedding": config.embedding_norm,
    }
    if config.position_embedding_type == "rotary":
        rope = config.rope_parameters
        # The configuration fills it in.
        assert rope is not None
        # Of all dimensions, with i and i + D/2 as pairs.
        fields |= {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": rope["rope_theta"]}
        if rope["rope_type"] == "linear":
            scaling = attention_spec.RotaryScalingType.Linear
            fields |= {"rotary_scaling_type": scaling, "rotary_scaling_factor": rope["factor"]}
    return fields


def _fill_stack(spec: Any, stack: Stack, config: SparseqConfig, weights: _Weights, rows: int) -> None:
    name = f"model.{stack}"
    spec.pre_norm = config.norm_position == "pre"
    spec.scale_embeddings = config.scale_embedding
    if config.position_embedding_type != "rotary":
        spec.position_encodings.encodings = _positions(name, config, weights, rows)
    if config.embedding_norm:
        weights.norm(spec.layernorm_embedding, f"{name}.layernorm_embedding")
    if config.final_norm:
        weights.norm(spec.layer_norm, f"{name}.norm")
    for index, layer in enumerate(spec.layer):
        _fill_layer(layer, f"{name}.layers.{index}", stack, config, weights)


def _positions(name: str, config: SparseqConfig, weights: _Weights, rows: int) -> torch.Tensor:
    """The table `(rows, H)` that is added to embeddings."""
    if config.position_embedding_type == "learned":
        return weights.read(f"{name}.embed_positions.weight")[config.position_offset :]
    if config.position_embedding_type == "sinusoidal":
        return SparseqSinusoidalPositions(config)(torch.arange(rows)).to(weights.dtype)
    # Without a table CTranslate2 would add sinusoids.
    return torch.zeros(rows, config.d_model, dtype=weights.dtype)


def _fill_layer(spec: Any, name: str, stack: Stack, config: SparseqConfig, weights: _Weights) -> None:
    attention = spec.self_attention
    weights.linear(attention.linear[0], *(f"{name}.self_attn.{one}_proj" for one in "qkv"))
    weights.linear(attention.linear[1], f"{name}.self_attn.out_proj")
    weights.norm(attention.layer_norm, f"{name}.self_attn_layer_norm")
    if stack == "decoder":
        attention = spec.attention
        weights.linear(attention.linear[0], f"{name}.encoder_attn.q_proj")
        weights.linear(attention.linear[1], *(f"{name}.encoder_attn.{one}_proj" for one in "kv"))
        weights.linear(attention.linear[2], f"{name}.encoder_attn.out_proj")
        weights.norm(attention.layer_norm, f"{name}.encoder_attn_layer_norm")
    weights.norm(spec.ffn.layer_norm, f"{name}.final_layer_norm")
    if config.gated_ffn:
        weights.linear(spec.ffn.linear_0, f"{name}.mlp.gate_proj")
        weights.linear(spec.ffn.linear_0_noact, f"{name}.mlp.up_proj")
    else:
        weights.linear(spec.ffn.linear_0, f"{name}.mlp.up_proj")
    weights.linear(spec.ffn.linear_1, f"{name}.mlp.down_proj")
