# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
Sparseq: the encoder-decoder Transformer of "Attention Is All You Need" (arXiv 1706.03762) with selectable positions,
grouped-query attention (arXiv 2305.13245) and dropless mixture-of-experts feed-forward layers.

Shapes: B batch, S source length, T target length, L length of either, H hidden size, A attention heads, D size of one
head, E experts, K experts per token, F inner width of one expert, N tokens (B * L), V vocabulary.
"""

import functools
import inspect
import math
import os
import re
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_sparseq import Positions, SparseqCache, Step
from .configuration_sparseq import SparseqConfig
from .grouped_sparseq import find_groups, grouped_linear, is_functional, rearrange
from .losses_sparseq import ProjectedCrossEntropy, at_least_float32, label_count, real_targets, router_losses
from .quantization_sparseq import warn_of_floating_experts

logger = logging.get_logger(__name__)

# Logits (N, E) and chosen experts (N, K) of a sparse layer; None of a dense one.
Routing = tuple[torch.Tensor, torch.Tensor] | None

# generate() would otherwise stop at 20 tokens; long enough for a sentence or a summary.
DEFAULT_MAX_LENGTH = 256

# What generate() hands a forward that computes one more token.
_STEP_INPUTS = {"past_key_values", "encoder_outputs", "attention_mask", "use_cache"}

# Beams that attend to each other's masked tokens; of more, each attends to its own, which are copied when beams change
# places.
_SHARING_BEAMS = 16

# Weights as `save_pretrained` names them: whole, or shards with their index.
_WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# What every saved folder holds besides configuration and weights, so that it loads without this package.
CODE_FILES = (
    *("cache_sparseq.py", "configuration_sparseq.py", "decoding_sparseq.py", "grouped_sparseq.py"),
    *("losses_sparseq.py", "modeling_sparseq.py", "quantization_sparseq.py"),
)
AUTO_MAP = {
    "AutoConfig": "configuration_sparseq.SparseqConfig",
    "AutoModel": "modeling_sparseq.SparseqModel",
    "AutoModelForSeq2SeqLM": "modeling_sparseq.SparseqForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_sparseq.SparseqEncoderModel",
}


@dataclass
class SparseqEncoderOutput(BaseModelOutput):
    """
    Output of the encoder: the library's fields, and

    Args:
        router_logits: One tensor `(B * S, E)` for each sparse layer, with `output_router_logits=True`.
        router_indices: One tensor `(B * S, K)` for each sparse layer, with `output_router_indices=True`: the chosen
            experts, E for padding.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseqDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of the decoder: the library's fields, and router logits and choices as in `SparseqEncoderOutput`."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseqModelOutput(Seq2SeqModelOutput):
    """
    Output of `SparseqModel`: the library's fields, and

    Args:
        encoder_router_logits, decoder_router_logits: One tensor `(B * L, E)` for each sparse layer of the stack.
        encoder_router_indices, decoder_router_indices: One tensor `(B * L, K)` for each sparse layer.
    """

    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    encoder_router_indices: tuple[torch.Tensor, ...] | None = None
    decoder_router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseqSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    Output of `SparseqForConditionalGeneration`: the library's fields, and

    Args:
        encoder_router_logits, decoder_router_logits, encoder_router_indices, decoder_router_indices: As in
            `SparseqModelOutput`.
        encoder_aux_loss, decoder_aux_loss: Load-balancing loss of the stack before its coefficient, a scalar.
        encoder_z_loss, decoder_z_loss: Router z-loss of the stack before its coefficient, a scalar.
    """

    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    encoder_router_indices: tuple[torch.Tensor, ...] | None = None
    decoder_router_indices: tuple[torch.Tensor, ...] | None = None
    encoder_aux_loss: torch.Tensor | None = None
    decoder_aux_loss: torch.Tensor | None = None
    encoder_z_loss: torch.Tensor | None = None
    decoder_z_loss: torch.Tensor | None = None


@dataclass
class SparseqStepOutput(ModelOutput):
    """
    Output of one decoding step of generate(). One with all the fields of `SparseqSeq2SeqLMOutput` would take a tenth
    of the step's time.

    Attributes:
        logits: `(R, 1, V)`.
        past_key_values: Keys and values up to this token.
    """

    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None


for _field in fields(SparseqSeq2SeqLMOutput):
    if not hasattr(SparseqStepOutput, _field.name):
        # Asked for, it is None, as in an output with all fields.
        setattr(SparseqStepOutput, _field.name, None)


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> torch.Tensor:
    """
    Decoder inputs that belong to labels: the start token, then the labels but for the last.

    Args:
        labels: `(B, T)`, -100 where there is no label.
        pad_token_id: Takes the place of -100.
        decoder_start_token_id: The first token of every row.

    Raises:
        ValueError: if there is a -100 to replace but `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError(
            "`pad_token_id` is None, but shifting labels needs it to replace -100; set `config.pad_token_id`"
        )
    start = labels.new_full((labels.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, L)` that count real tokens only, so that padding on either side moves none of them."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _angles(position_ids: torch.Tensor, exponents: torch.Tensor, theta: float) -> torch.Tensor:
    """
    Angles position * theta^-exponent, `(..., L, len(exponents))` in the type of the exponents.

    They are computed anew in each forward: a buffer would be rounded by `model.to(torch.bfloat16)`, left empty by a
    meta-device load, and would bound the length.
    """
    return position_ids[..., None].to(exponents.dtype) * torch.pow(theta, -exponents)


class SparseqSinusoidalPositions(nn.Module):
    """
    Sinusoidal positions, section 3.5 of arXiv 1706.03762: sin(p / 10000^(2i/d)) and cos of the same angle, for
    positions of any size and without parameters.
    """

    def __init__(self, config: SparseqConfig):
        super().__init__()
        self.pairs = config.d_model // 2
        self.offset = config.position_offset
        self.interleaved = config.sinusoidal_layout == "interleaved"
        self.steps = self.pairs if config.sinusoidal_spacing == "paper" else self.pairs - 1

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Map positions `(..., L)` to vectors `(..., L, H)` in float32."""
        device = position_ids.device
        # In float32 the angle of position 1,000 would be off by 1e-4: too much to read models whose tables are exact.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        exponents = torch.arange(self.pairs, device=device, dtype=dtype) / self.steps
        angles = _angles(position_ids + self.offset, exponents, 10_000.0)
        parts = (angles.sin().float(), angles.cos().float())
        return torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1)


class SparseqLearnedPositions(nn.Embedding):
    """Learned positions; `position_offset` rows are kept free in front, as BART has them."""

    def __init__(self, config: SparseqConfig):
        super().__init__(config.max_position_embeddings + config.position_offset, config.d_model)
        self.offset = config.position_offset

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Map positions `(..., L)` to vectors `(..., L, H)`."""
        return super().forward(position_ids + self.offset)


class SparseqRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864, eq. 34) for heads of one size."""

    def __init__(self, config: SparseqConfig, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.theta = float(config.rope_parameters["rope_theta"])
        self.factor = float(config.rope_parameters.get("factor") or 1.0)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Map positions `(B or 1, L)` to cosines and sines, each `(B or 1, 1, L, D)`."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        angles = _angles(position_ids / self.factor, exponents, self.theta).repeat(1, 1, 2)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `(B, A, L, D)`: dimension i is paired with i + D/2."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scaled dot-product attention, eq. 1 of arXiv 1706.03762, with each key-value head serving a group of query heads.

    Args:
        query: `(B, A, L, D)`.
        key, value: `(B, A / groups, L', D)`.
        attention_mask: `(B, 1, L, L')`, added to the scores, or False where a score is to be hidden.

    Returns:
        Output `(B, L, A, D)` and weights `(B, A, L, L')`.
    """
    groups = cast(int, module.num_key_value_groups)
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(query.dtype)
    output = torch.matmul(F.dropout(weights, p=dropout, training=module.training), value)
    return output.transpose(1, 2).contiguous(), weights


class SparseqAttention(nn.Module):
    """
    Grouped-query attention (arXiv 2305.13245): over its own input, or over encoder states when `forward` gets them.
    """

    def __init__(self, config: SparseqConfig, *, is_decoder: bool, is_causal: bool, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # The library's sdpa takes a missing attribute for True.
        self.is_causal = is_causal
        heads = config.decoder_attention_heads if is_decoder else config.encoder_attention_heads
        kv_heads = config.decoder_num_key_value_heads if is_decoder else config.encoder_num_key_value_heads
        self.head_dim = config.d_model // heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.d_model, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * self.head_dim, config.d_model, bias=bias)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `(B, L, H)`.
            attention_mask: What `masking_utils` made for the attention implementation in use.
            encoder_hidden_states: `(B, S, H)` makes this cross-attention. There may be fewer sources than rows of
                `hidden_states`, each for as many rows that follow one another.
            rotary: Cosines and sines for self-attention with rotary positions.
            past_key_values: Cache that new keys and values are added to.

        Returns:
            Output `(B, L, H)`, and weights `(B, A, L, L')` where the implementation has them.
        """
        is_cross_attention = encoder_hidden_states is not None
        rows, length, _ = hidden_states.shape
        if is_cross_attention and encoder_hidden_states.shape[0] != rows:
            # Rows of one source are further queries of its keys.
            hidden_states = hidden_states.reshape(encoder_hidden_states.shape[0], -1, hidden_states.shape[-1])
        query = self._split_heads(self.q_proj(hidden_states))
        is_cached = False
        cache: Any = None
        if past_key_values is not None:
            is_cached = is_cross_attention and bool(past_key_values.is_updated.get(self.layer_idx))
            cache = (
                past_key_values.cross_attention_cache if is_cross_attention else past_key_values.self_attention_cache
            )

        if is_cached:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = encoder_hidden_states if is_cross_attention else hidden_states
            key, value = self._split_heads(self.k_proj(source)), self._split_heads(self.v_proj(source))
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None and not is_cached:
            key, value = cache.update(key, value, self.layer_idx)
            if is_cross_attention:
                past_key_values.is_updated[self.layer_idx] = True

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.out_proj(output.reshape(rows, length, -1))
        if weights is not None and weights.shape[0] != rows:
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return output, weights


class SparseqActivation(nn.Module):
    """Activation of a feed-forward layer, and the dropout behind it."""

    def __init__(self, activation_function: str, dropout: float):
        super().__init__()
        self.activation = ACT2FN[activation_function]
        self.dropout = dropout

    def forward(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """act(up), or act(gate) * up (arXiv 2002.05202, eq. 5), all of one shape."""
        inner = self.activation(up) if gate is None else self.activation(gate) * up
        return F.dropout(inner, p=self.dropout, training=self.training)


class SparseqMLP(nn.Module):
    """Dense feed-forward layer, eq. 2 of arXiv 1706.03762, or its gated form."""

    def __init__(self, config: SparseqConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, width, bias=config.ffn_bias) if config.gated_ffn else None
        self.up_proj = nn.Linear(config.d_model, width, bias=config.ffn_bias)
        self.down_proj = nn.Linear(width, config.d_model, bias=config.ffn_bias)
        self.act_fn = SparseqActivation(config.activation_function, config.activation_dropout)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Map `(B, L, H)` to the same shape; `token_mask` and routing are for sparse layers only."""
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        return self.down_proj(self.act_fn(self.up_proj(hidden_states), gate)), None


class SparseqRouter(nn.Module):
    """
    Scores the experts for each token and chooses the best K, in float32 whatever the model's type.

    With `router_balancing="loss_free"` (arXiv 2408.15664, eq. 3) a bias moves the choice but not the weights.
    """

    def __init__(self, config: SparseqConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.scoring = config.router_scoring
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        if config.router_balancing == "loss_free":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None
        # Tokens per expert since the last bias update. A plain tensor, because DDP copies rank 0's buffers to all.
        self.expert_counts: torch.Tensor | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # `model.to(torch.bfloat16)` casts buffers too; in bfloat16 the bias' steps would be lost beside what it holds.
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if kept is not None and moved.dtype != kept.dtype:
            self.e_score_correction_bias = nn.Buffer(kept.to(moved.device))
        return self

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits `(..., E)` to scores of the same shape."""
        return logits.softmax(dim=-1) if self.scoring == "softmax" else logits.sigmoid()

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices `(N, K)` of the best experts by logits `(N, E)`."""
        bias = self.e_score_correction_bias
        if self.norm_topk_prob and self.scoring == "softmax" and bias is None:
            # Softmax over all, divided by its sum over some, is softmax over these.
            best = logits.topk(self.top_k, dim=-1)
            return best.values.softmax(dim=-1), best.indices
        scores = self.scores(logits)
        indices = (scores if bias is None else scores.detach() + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.norm_topk_prob:
            # Sigmoids of strongly negative logits may all be zero.
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights, indices

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(N, H)`.
            token_mask: `(N,)`, False for padding, which is sent to the expert E that does not exist.

        Returns:
            Logits `(N, E)`, weights `(N, K)` and expert indices `(N, K)`; logits and weights in float32.
        """
        inputs = hidden_states.float()
        if self.training and self.jitter_noise > 0:
            inputs = inputs * torch.empty_like(inputs).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(inputs, self.weight.float())
        weights, indices = self.choose(logits)
        if token_mask is not None:
            indices = indices.masked_fill(~token_mask[:, None], self.num_experts)
            weights = weights.masked_fill(~token_mask[:, None], 0.0)
        return logits, weights, indices

    @torch.no_grad()
    def count(self, indices: torch.Tensor) -> None:
        """Add one training batch's choices `(N, K)` to the counts, without padding."""
        counts = F.one_hot(indices.flatten(), self.num_experts + 1).sum(dim=0)[: self.num_experts].float()
        self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts


def sorted_experts_forward(
    self: "SparseqExperts", hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Experts over tokens sorted by expert (dropless, as in arXiv 2211.15841): two grouped matrix products, no capacity,
    no copy of an expert's weights for a token, and off the CPU no data-dependent shape and no host synchronisation.
    Padding, with expert index E, sorts to the tail, which no group covers.

    Args:
        hidden_states: `(N, H)`.
        top_k_index: `(N, K)`, E for padding.
        top_k_weights: `(N, K)`.

    Returns:
        `(N, H)`.
    """
    tokens, top_k = top_k_index.shape
    ids, order = top_k_index.flatten().sort(stable=True)
    groups = find_groups(ids, self.num_experts)
    weight_in, bias_in, weight_out, bias_out = self.stacked_parameters()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    inputs = rearrange(hidden_states, order, inverse, top_k)
    inner = grouped_linear(inputs, weight_in, bias_in, groups)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outputs = grouped_linear(inner, weight_out, bias_out, groups)
    # Back in the order of the tokens, then a sum over K in a fixed order, which adding to rows would not have.
    outputs = rearrange(outputs, inverse, order, 1)
    outputs = outputs.view(tokens, top_k, hidden_states.shape[-1]) * top_k_weights[..., None]
    return outputs.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("sparseq", sorted_experts_forward)


class SparseqExperts(nn.Module):
    """
    Stacked parameters of E experts, under the names that the library's experts implementations read. Made by
    `make_experts`; the subclasses fix what `use_experts_implementation` must know.
    """

    gate_up_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter
    up_proj: nn.Parameter
    up_proj_bias: nn.Parameter
    down_proj_bias: nn.Parameter
    # Set by the decorator of the subclass.
    has_gate: bool
    has_bias: bool
    _is_expert_parallel: bool

    def __init__(self, config: SparseqConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden = config.expert_ffn_dim, config.d_model
        dropout = config.activation_dropout if config.expert_dropout is None else config.expert_dropout
        self.act_fn = SparseqActivation(config.activation_function, dropout)
        name, rows = ("gate_up_proj", 2 * width) if config.gated_ffn else ("up_proj", width)
        self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        if config.expert_bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden))

    def stacked_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the first projections `(E, F or 2F, H)`, `(E, F or 2F)`, then of the second ones."""
        weight = self.gate_up_proj if self.has_gate else self.up_proj
        if not self.has_bias:
            return weight, None, self.down_proj, None
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        return weight, bias, self.down_proj, self.down_proj_bias

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(up, gate)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The "eager" implementation: one expert after the other, over the tokens that chose it."""
        first, first_bias, second, second_bias = self.stacked_parameters()
        outputs = torch.zeros_like(hidden_states)
        # unbind, because indexing a stacked parameter would make a gradient of its full size for each expert.
        for expert, (weight_in, weight_out) in enumerate(zip(first.unbind(0), second.unbind(0), strict=True)):
            token, choice = torch.where(top_k_index == expert)
            inner = F.linear(hidden_states[token], weight_in, None if first_bias is None else first_bias[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            inner = F.linear(inner, weight_out, None if second_bias is None else second_bias[expert])
            inner = inner * top_k_weights[token, choice, None]
            outputs = outputs.index_add(0, token, inner.to(outputs.dtype))
        return outputs


# The decorator fixes gate and bias for a class, and the library finds it by reading the source of this file.
@use_experts_implementation(has_gate=True, has_bias=False)
class SparseqGatedExperts(SparseqExperts):
    """Experts down(act(gate(x)) * up(x))."""


@use_experts_implementation(has_gate=True, has_bias=True)
class SparseqGatedBiasExperts(SparseqExperts):
    """Gated experts with biases."""


@use_experts_implementation(has_gate=False, has_bias=False)
class SparseqPlainExperts(SparseqExperts):
    """Experts down(act(up(x)))."""


@use_experts_implementation(has_gate=False, has_bias=True)
class SparseqPlainBiasExperts(SparseqExperts):
    """Plain experts with biases."""


def make_experts(config: SparseqConfig) -> SparseqExperts:
    """Experts of the kind that `gated_ffn` and `expert_bias` ask for."""
    kinds = {
        (True, False): SparseqGatedExperts,
        (True, True): SparseqGatedBiasExperts,
        (False, False): SparseqPlainExperts,
        (False, True): SparseqPlainBiasExperts,
    }
    experts = kinds[config.gated_ffn, config.expert_bias](config)
    # The library's implementations expect the out-of-range index that padding gets only where this is set.
    experts._is_expert_parallel = True
    return experts


class SparseqSparseMLP(nn.Module):
    """
    Mixture-of-experts feed-forward layer: sum over the chosen experts e of weight_e * expert_e(x), plus the shared
    experts. Dropless: what a token gets depends on no other token.
    """

    def __init__(self, config: SparseqConfig):
        super().__init__()
        self.router = SparseqRouter(config)
        self.experts = make_experts(config)
        self.output_masking = config.expert_output_masking
        shared = config.num_shared_experts
        self.shared_experts = SparseqMLP(config, shared * config.expert_ffn_dim) if shared else None

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Map `(B, L, H)` to the same shape; where `token_mask` `(B, L)` is False, no routed expert runs."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, indices = self.router(flat, None if token_mask is None else token_mask.reshape(-1))
        # The router's choice is what is balanced and counted, whether or not its output is masked.
        chosen, chosen_weights = self._mask_outputs(indices, weights)
        if self.experts.num_experts < self.router.num_experts:
            chosen = self._spread_padding(chosen)
        outputs = self.experts(flat, chosen, chosen_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            outputs = outputs + self.shared_experts(hidden_states)[0]
        return outputs, (logits, indices)

    def _mask_outputs(self, indices: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert output masking: in training a share of the choices `(N, K)` goes to the expert E, as padding does."""
        if not self.training or self.output_masking == 0:
            return indices, weights
        masked = torch.rand_like(weights) < self.output_masking
        weights = (weights / (1.0 - self.output_masking)).masked_fill(masked, 0.0)
        return indices.masked_fill(masked, self.router.num_experts), weights

    def _spread_padding(self, indices: torch.Tensor) -> torch.Tensor:
        """
        `indices` `(N, K)` with real experts in place of E, evenly. Under expert parallelism the library sends each row
        to the process that has its expert; the expert E is nowhere. With a weight of zero the row adds nothing.
        """
        experts = self.router.num_experts
        spread = torch.arange(indices.numel(), device=indices.device).view_as(indices) % experts
        return torch.where(indices < experts, indices, spread)


def make_norm(config: SparseqConfig) -> nn.Module:
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over H."""
    kind = nn.LayerNorm if config.norm_type == "layernorm" else nn.RMSNorm
    return kind(config.d_model, eps=config.norm_eps)


def within_float16(states: torch.Tensor) -> torch.Tensor:
    """
    Residual sums that float16 can hold, the same in other types. mBART, M2M100 and Pegasus have sums beyond 65,504,
    and their own code bounds them likewise: an infinite one would make every later number NaN.
    """
    if states.dtype != torch.float16:
        return states
    limit = torch.finfo(torch.float16).max - 1000
    return states.clamp(-limit, limit)


class SparseqEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward, each with a residual connection and a norm before ("pre") or after ("post")."""

    def __init__(self, config: SparseqConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.self_attn = SparseqAttention(config, is_decoder=False, is_causal=False, layer_idx=layer_idx)
        self.self_attn_layer_norm = make_norm(config)
        is_sparse = layer_idx in config.sparse_layers("encoder")
        self.mlp = SparseqSparseMLP(config) if is_sparse else SparseqMLP(config, config.encoder_ffn_dim)
        self.final_layer_norm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Routing]:
        """Map `(B, S, H)` to the same shape, and say how its tokens were routed."""
        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, attention_mask, rotary=rotary, **kwargs)
        hidden_states = residual + F.dropout(hidden_states, p=self.dropout, training=self.training)
        if not self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states, routing = self.mlp(hidden_states, token_mask)
        hidden_states = within_float16(residual + F.dropout(hidden_states, p=self.dropout, training=self.training))
        if not self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, routing


class SparseqDecoderLayer(GradientCheckpointingLayer):
    """Causal self-attention, cross-attention over the encoder's output and feed-forward, each with a residual."""

    def __init__(self, config: SparseqConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.self_attn = SparseqAttention(config, is_decoder=True, is_causal=True, layer_idx=layer_idx)
        self.self_attn_layer_norm = make_norm(config)
        self.encoder_attn = SparseqAttention(config, is_decoder=True, is_causal=False, layer_idx=layer_idx)
        self.encoder_attn_layer_norm = make_norm(config)
        is_sparse = layer_idx in config.sparse_layers("decoder")
        self.mlp = SparseqSparseMLP(config) if is_sparse else SparseqMLP(config, config.decoder_ffn_dim)
        self.final_layer_norm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Routing]:
        """Map `(B, T, H)` to the same shape, and say how its tokens were routed."""
        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states, attention_mask, rotary=rotary, past_key_values=past_key_values, **kwargs
        )
        hidden_states = residual + F.dropout(hidden_states, p=self.dropout, training=self.training)
        if not self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.encoder_attn_layer_norm(hidden_states)
        hidden_states, _ = self.encoder_attn(
            hidden_states, encoder_attention_mask, encoder_hidden_states, past_key_values=past_key_values, **kwargs
        )
        hidden_states = residual + F.dropout(hidden_states, p=self.dropout, training=self.training)
        if not self.pre_norm:
            hidden_states = self.encoder_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states, routing = self.mlp(hidden_states, token_mask)
        hidden_states = within_float16(residual + F.dropout(hidden_states, p=self.dropout, training=self.training))
        if not self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, routing


def copy_code(folder: str | os.PathLike[str]) -> None:
    """Write the code that a model's folder needs to load without this package."""
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder) / name)


class SparseqPreTrainedModel(PreTrainedModel):
    """What all Sparseq models share: initial weights, tied weights, and which features of the library they support."""

    config: SparseqConfig
    config_class = SparseqConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseqEncoderLayer", "SparseqDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.d_model**-0.5 if std is None else std)
        elif isinstance(module, nn.Linear):
            self._init_projections(module.weight, 1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SparseqRouter):
            # Small logits: at the start every expert gets its share (arXiv 2202.08906, section 3.3).
            init.normal_(module.weight, std=0.02 if std is None else std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, SparseqExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    self._init_projections(parameter, 2 if name == "gate_up_proj" else 1)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.get_parameter("bias"))
        elif isinstance(module, SparseqForConditionalGeneration) and module.final_logits_bias is not None:
            init.zeros_(module.final_logits_bias)

    def _init_projections(self, weight: torch.Tensor, parts: int) -> None:
        """Fill `(..., parts * O, I)` as Xavier uniform fills each `(O, I)`, or normally with `initializer_range`."""
        if self.config.initializer_range is not None:
            init.normal_(weight, std=self.config.initializer_range)
        else:
            bound = math.sqrt(6.0 / (weight.shape[-2] // parts + weight.shape[-1]))
            init.uniform_(weight, -bound, bound)

    def __init__(self, config: SparseqConfig, *inputs: Any, **kwargs: Any):
        warn_of_floating_experts(config)
        # Fields that were set after the configuration was made, as `from_pretrained(..., num_experts=4)` does.
        config.validate_architecture()
        if (distributed_config := getattr(config, "distributed_config", None)) is not None:
            # Here `from_pretrained(..., distributed_config=...)` has read no weights yet.
            config.check_parallelism(distributed_config)
        super().__init__(config, *inputs, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # Ours where none is asked for: it takes sizes of any kind and loses no time on padding.
        sizes = {name: getattr(self.config, name) for name in ("d_model", "expert_ffn_dim")}
        if requested_experts == "grouped_mm" and any(size % 8 for size in sizes.values()):
            logger.warning_once(
                f"experts_implementation='grouped_mm' needs sizes that are multiples of 8, but they are {sizes}; "
                "'sparseq' is used instead, with the same results"
            )
            requested_experts = "sparseq"
        return super().get_correct_experts_implementation(requested_experts or "sparseq")

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The library ties nothing at all where `tie_word_embeddings` is False. Here that flag is about the output
        # projection alone, so each class lists what its configuration ties.
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """
        Recompute activations in the backward pass instead of keeping them.

        Raises:
            ValueError: for reentrant checkpointing of a sparse model, which would lose the auxiliary losses' gradient
                without a word.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant") and self.config.num_experts:
            raise ValueError(
                "Checkpointing with `use_reentrant=True` would drop the gradient of the router's auxiliary losses "
                f"(`num_experts` is {self.config.num_experts}); pass `use_reentrant=False`, which is exact"
            )
        if activation_checkpointing_kwargs is not None:
            # Left out or None, torch would take the reentrant kind.
            given = {name: value for name, value in activation_checkpointing_kwargs.items() if value is not None}
            activation_checkpointing_kwargs = {"use_reentrant": False, **given}
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Save as the library does, and with it the code and an `auto_map` for every auto class: the folder loads with
        `trust_remote_code=True` where this package is not installed. An adapter alone is saved without them.
        """
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not is_adapter:
            # The library would map the saved class alone.
            self.config.auto_map = dict(AUTO_MAP)
            if self.should_save_on_this_rank(is_main_process) and not os.path.isfile(save_directory):
                os.makedirs(save_directory, exist_ok=True)
                copy_code(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def init_parallel_plans(self) -> None:
        """The library's, without the rules for what this configuration has not, which it would warn about."""
        super().init_parallel_plans()
        names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in (*self.named_modules(), *self.named_parameters())}
        for kind in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
            setattr(self, kind, {name: style for name, style in getattr(self, kind).items() if name in names})

    def gather_sharded_state_dict_for_save(
        self, model_to_save: PreTrainedModel, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # Gathered, tied weights no longer share memory, by which the library finds what to save once.
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if gathered is state_dict:
            return state_dict
        tied = self.all_tied_weights_keys
        return {name: tensor for name, tensor in gathered.items() if tied.get(name) not in gathered}

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> Any:
        """
        The library's, with the code, and without weights of an earlier push: the library deletes nothing, and a
        model.safetensors left there would be loaded instead of shards pushed now. All in one commit, so that no state
        of the repository has the weights of neither or of both.
        """
        folder = Path(working_dir)
        if not (folder / "config.json").is_file():
            return super()._upload_modified_files(
                working_dir, repo_id, files_timestamps, commit_message, token, create_pr, revision, commit_description
            )
        copy_code(folder)
        api = HfApi(token=token)
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        held = [file.rfilename for file in there.siblings or ()]
        stale = [name for name in held if _WEIGHT_FILES.fullmatch(name) and not (folder / name).is_file()]
        new = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file()
            and (path.name in CODE_FILES or path.stat().st_mtime > files_timestamps.get(path.name, -math.inf))
        ]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path.name, path) for path in new),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
            revision=revision,
            # What is deleted must be what was seen: somebody else may push meanwhile, and is not to lose weights.
            parent_commit=there.sha if stale else None,
        )

    @classmethod
    def maybe_distribute_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """
        The library's, after which tied weights must be cut alike.

        Raises:
            ValueError: if the plan cuts tied weights differently.
        """
        model = super().maybe_distribute_model(model, *args, **kwargs)
        for target, source in model.all_tied_weights_keys.items():
            cuts = [getattr(model.get_parameter(name), "placements", None) for name in (target, source)]
            if cuts[0] != cuts[1]:
                raise ValueError(
                    f"`{target}` is tied to `{source}`, but the plan cuts them differently: {cuts[0]} and {cuts[1]}. "
                    "Give both modules rules that cut the vocabulary, as the model's own plan does "
                    '("embedding_rowwise", and "colwise_gather_output" for `lm_head`), or untie them: '
                    "`tie_word_embeddings=False`"
                )
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        # Called for every class loaded as remote code. The library would then save the file of the model's type, which
        # under FSDP2 is a file of torch's; `save_pretrained` above saves this one. A subclass elsewhere may register.
        if cls.__module__ != __name__:
            super().register_for_auto_class(auto_class)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but those of the experts that are not chosen, tied ones counted once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        idle = self.config.num_experts - self.config.num_experts_per_tok
        for module in self.modules():
            # Int8 experts are of another class.
            if hasattr(module, "stacked_parameters"):
                stacked = sum(parameter.numel() for parameter in module.parameters())
                total -= stacked // self.config.num_experts * idle
        return total

    def routers(self, stack: str) -> list[SparseqRouter]:
        """Routers of the sparse layers of "encoder" or "decoder", in order."""
        # By place, not by searching: PEFT's `modules_to_save` keeps a second router beside the one in use.
        layers = getattr(self.base_model, stack).layers
        return [layers[index].mlp.router for index in self.config.sparse_layers(cast(Any, stack))]

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """
        Move the selection biases of `router_balancing="loss_free"` by one step and forget the counts: up for experts
        with fewer tokens than the mean, down for those with more (arXiv 2408.15664, algorithm 1). To be called once
        after every optimizer step, by all processes: counts are summed over them. A router whose weight is frozen
        keeps its bias, which an adapter would not save.

        Raises:
            ValueError: with another kind of balancing.
        """
        if self.config.router_balancing != "loss_free":
            raise ValueError(
                'update_router_bias() needs `router_balancing="loss_free"`, but it is '
                f'"{self.config.router_balancing}"'
            )
        self._moves_biases = True
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        routers = [m for m in self.modules() if isinstance(m, SparseqRouter) and m.weight.requires_grad]
        if not distributed and all(router.expert_counts is None for router in routers):
            logger.warning_once(
                "update_router_bias() has nothing to balance by: since the last call no router with trained weights "
                "has counted a batch. Experts are counted in training, in forwards that get `labels`."
            )
        for router in routers:
            bias = router.e_score_correction_bias
            # A process that has seen no batch still takes part in the sum.
            counts = torch.zeros_like(bias) if router.expert_counts is None else router.expert_counts.to(bias.device)
            if distributed:
                torch.distributed.all_reduce(counts)
            bias.add_(torch.sign(counts.mean() - counts), alpha=self.config.router_bias_update_rate)
            router.expert_counts = None

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and not self.config.share_encoder_decoder_embeddings:
            # The library knows of one input embedding; the vocabulary is the same for both stacks.
            decoder.embed_tokens = self._get_resized_embeddings(decoder.embed_tokens, embeddings.weight.shape[0])
        return embeddings

    def _padding_mask(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """
        Mask `(B, S)` of the tokens that are no padding, or None where the ids do not tell: the pad token may also end
        or begin a sentence.
        """
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if input_ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return input_ids.ne(pad)


class SparseqStack(SparseqPreTrainedModel):
    """What the encoder and the decoder share: embeddings, positions, layers and the final norm."""

    layers: nn.ModuleList
    # Plans of `transformers.distributed`. Here, not in the configuration, whose plans the library would apply to the
    # root, the encoder and the decoder alike.
    _tp_plan = {
        "embed_tokens": "embedding_rowwise",
        **{f"layers.*.{kind}.{name}_proj": "colwise" for kind in ("self_attn", "encoder_attn") for name in "qkv"},
        **{f"layers.*.{kind}.out_proj": "rowwise" for kind in ("self_attn", "encoder_attn")},
        **{
            f"layers.*.mlp{kind}.{name}_proj": "colwise" for kind in ("", ".shared_experts") for name in ("gate", "up")
        },
        **{f"layers.*.mlp{kind}.down_proj": "rowwise" for kind in ("", ".shared_experts")},
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
    }
    _ep_plan = {
        "layers.*.mlp.experts": "ep_dispatch_experts",
        **{
            f"layers.*.mlp.experts.{name}_proj{bias}": "grouped_gemm"
            for name in ("gate_up", "up", "down")
            for bias in ("", "_bias")
        },
    }
    _fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", "norm": "keep_full_weight"}

    def __init__(self, config: SparseqConfig, layer_class: type[nn.Module], layers: int, heads: int):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        kind = config.position_embedding_type
        self.embed_positions: nn.Module | None = None
        if kind == "sinusoidal":
            self.embed_positions = SparseqSinusoidalPositions(config)
        elif kind == "learned":
            self.embed_positions = SparseqLearnedPositions(config)
        self.rotary = SparseqRotaryEmbedding(config, config.d_model // heads) if kind == "rotary" else None
        self.layernorm_embedding = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList([layer_class(config, layer_idx=i) for i in range(layers)])
        self.norm = make_norm(config) if config.final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, name: str) -> torch.Tensor:
        """Scaled token embeddings `(B, L, H)`; given `inputs_embeds` are taken as they come, before the scale."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"Give exactly one of `{name}input_ids` and `{name}inputs_embeds`")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return embeds * self.embed_scale if self.embed_scale != 1.0 else embeds

    def position_limit(self) -> int | None:
        """How many positions there are, where there is a limit."""
        is_learned = isinstance(self.embed_positions, SparseqLearnedPositions)
        return self.config.max_position_embeddings if is_learned else None

    def check_length(self, length: int) -> None:
        limit = self.position_limit()
        if limit is not None and length > limit:
            raise ValueError(
                f"The input has {length} tokens, padding included, but `position_embedding_type='learned'` has "
                f"`max_position_embeddings` = {limit} positions; truncate the input, or use a model with sinusoidal "
                "or rotary positions, which have no limit"
            )

    def positions(self, position_ids: torch.Tensor, dtype: torch.dtype) -> Positions:
        """What is added to embeddings, and the rotary cosines and sines, at positions `(B or 1, L)`."""
        vectors = None if self.embed_positions is None else self.embed_positions(position_ids).to(dtype)
        return vectors, None if self.rotary is None else self.rotary(position_ids, dtype)

    def add_positions(
        self, embeds: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Embeddings with positions, norm and dropout, and the rotary cosines and sines if they are in use."""
        vectors, rotary = positions
        if vectors is not None:
            embeds = embeds + vectors
        if self.layernorm_embedding is not None:
            embeds = self.layernorm_embedding(embeds)
        return F.dropout(embeds, p=self.config.dropout, training=self.training), rotary

    def _add_routings(
        self,
        output: "SparseqEncoderOutput | SparseqDecoderOutput",
        routings: list[Routing],
        output_router_logits: bool | None,
        output_router_indices: bool,
    ) -> None:
        # Collected by hand: the library's recorder takes a lock when it is first used, which fullgraph compilation of
        # a training step, where the auxiliary losses need this, cannot trace.
        sparse = [routing for routing in routings if routing is not None]
        if self.config.output_router_logits if output_router_logits is None else output_router_logits:
            output.router_logits = tuple(logits for logits, _ in sparse)
        if output_router_indices:
            output.router_indices = tuple(indices for _, indices in sparse)


class SparseqEncoder(SparseqStack):
    """The encoder: embeddings and `encoder_layers` layers over the whole source at once."""

    _can_record_outputs = {
        "hidden_states": SparseqEncoderLayer,
        "attentions": OutputRecorder(SparseqAttention, index=1, layer_name="self_attn"),
    }

    def __init__(self, config: SparseqConfig):
        super().__init__(config, SparseqEncoderLayer, config.encoder_layers, config.encoder_attention_heads)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        output_router_indices: bool = False,
        **kwargs: Any,
    ) -> SparseqEncoderOutput:
        """
        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 0 for padding; derived from `pad_token_id` when absent. A mask already prepared
                for the attention implementation, `(B, 1, S, S)`, is used as it is.
            inputs_embeds: `(B, S, H)` in place of `input_ids`.
            output_attentions, output_hidden_states, output_router_logits, output_router_indices: Return these as
                well.

        Raises:
            ValueError: for neither or both of `input_ids` and `inputs_embeds`, or a source too long for learned
                positions.
        """
        embeds = self.embed(input_ids, inputs_embeds, "")
        if attention_mask is None:
            attention_mask = self._padding_mask(input_ids)
        self.check_length(embeds.shape[1])
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask, position_ids = attention_mask.bool(), positions_from_mask(attention_mask)
        else:
            token_mask, position_ids = None, torch.arange(embeds.shape[1], device=embeds.device)[None]
        hidden_states, rotary = self.add_positions(embeds, self.positions(position_ids, embeds.dtype))
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        routings = []
        for layer in self.layers:
            hidden_states, routing = layer(hidden_states, layer_mask, rotary, token_mask, **kwargs)
            routings.append(routing)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        output = SparseqEncoderOutput(last_hidden_state=hidden_states)
        self._add_routings(output, routings, output_router_logits, output_router_indices)
        return output


class SparseqDecoder(SparseqStack):
    """The decoder: embeddings and `decoder_layers` layers, each position seeing those before it and the source."""

    _can_record_outputs = {
        "hidden_states": SparseqDecoderLayer,
        "attentions": OutputRecorder(SparseqAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(SparseqAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: SparseqConfig):
        super().__init__(config, SparseqDecoderLayer, config.decoder_layers, config.decoder_attention_heads)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        output_router_indices: bool = False,
        **kwargs: Any,
    ) -> SparseqDecoderOutput:
        """
        Args:
            input_ids: `(B, T)`, those after what `past_key_values` holds.
            attention_mask: `(B, cached + T)`, 0 for padding; never derived from ids, since the start token may be
                the pad token.
            encoder_hidden_states: `(B, S, H)`.
            encoder_attention_mask: `(B, S)`, 0 for padding.
            position_ids: `(B, T)`; counted from `attention_mask` when absent.
            past_key_values: Keys and values of earlier positions.
            inputs_embeds: `(B, T, H)` in place of `input_ids`.
            use_cache: Return keys and values.
            token_mask: `(B, T)`, False for tokens that no routed expert needs to see; `attention_mask` when absent.
            output_attentions, output_hidden_states, output_router_logits, output_router_indices: Return these as
                well.

        Raises:
            ValueError: for neither or both of `input_ids` and `inputs_embeds`, or too many positions for learned ones.
        """
        embeds = self.embed(input_ids, inputs_embeds, "decoder_")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            # A plain cache is for the target alone; the source's keys and values need one of their own.
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        past_length: Any = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows, length = embeds.shape[:2]
        if encoder_hidden_states is not None and past_key_values is not None and past_key_values.is_updated.get(0):
            first: Any = past_key_values.cross_attention_cache.layers[0]
            sources = first.keys.shape[0]
            encoder_hidden_states = _with_rows(encoder_hidden_states, sources)
            encoder_attention_mask = _with_rows(encoder_attention_mask, sources)
        if encoder_hidden_states is not None and rows % encoder_hidden_states.shape[0]:
            raise ValueError(
                f"The decoder has {rows} rows, but the source {encoder_hidden_states.shape[0]}: each source serves "
                "equally many rows that follow one another, so give a multiple of its rows"
            )
        if isinstance(past_length, int):
            self.check_length(past_length + length)
        else:
            # A static cache counts on the device, where a comparison would wait for it; its size must fit instead.
            self.check_length(past_key_values.self_attention_cache.layers[0].get_max_length())
        has_padding_mask = attention_mask is not None and attention_mask.dim() == 2
        if has_padding_mask and token_mask is None:
            token_mask = attention_mask[:, -length:].bool()
        if position_ids is None:
            if has_padding_mask:
                position_ids = positions_from_mask(attention_mask)[:, -length:]
            else:
                position_ids = (torch.arange(length, device=embeds.device) + past_length)[None]
        # With beams that share memory, the rows of a source make one row; their tokens are ordered by time first.
        shared = past_key_values if isinstance(past_key_values, SparseqCache) and past_key_values.beams > 1 else None
        if shared is not None:
            embeds = embeds.view(-1, shared.beams, length, embeds.shape[-1]).transpose(1, 2).flatten(1, 2)
            position_ids = position_ids.repeat_interleave(shared.beams, dim=1)
        hidden_states, rotary = self.add_positions(embeds, self.positions(position_ids, embeds.dtype))
        layer_mask: Any
        if shared is not None:
            layer_mask = shared.extend(rows // shared.beams, length, hidden_states)
        else:
            layer_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=None if past_key_values is None else past_key_values.self_attention_cache,
            )
        encoder_mask = self.source_mask(hidden_states, encoder_hidden_states, encoder_attention_mask)
        routings = []
        for layer in self.layers:
            hidden_states, routing = layer(
                hidden_states,
                layer_mask,
                encoder_hidden_states,
                encoder_mask,
                rotary,
                token_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            routings.append(routing)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if shared is not None:
            hidden_states = (
                hidden_states.unflatten(1, (length, shared.beams)).transpose(1, 2).reshape(rows, length, -1)
            )
        output = SparseqDecoderOutput(last_hidden_state=hidden_states, past_key_values=past_key_values)
        self._add_routings(output, routings, output_router_logits, output_router_indices)
        return output

    def source_mask(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> Any:
        """The source's padding mask for the attention implementation in use."""
        if encoder_hidden_states is not None and encoder_hidden_states.shape[0] != hidden_states.shape[0]:
            # The queries that cross-attention will have.
            hidden_states = hidden_states.reshape(encoder_hidden_states.shape[0], -1, hidden_states.shape[-1])
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )


class SparseqModel(SparseqPreTrainedModel):
    """Encoder and decoder without an output projection; `AutoModel` loads it."""

    _tp_plan = {"shared": "embedding_rowwise"}

    def __init__(self, config: SparseqConfig):
        super().__init__(config)
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SparseqEncoder(config)
        self.decoder = SparseqDecoder(config)
        self._tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
        if config.share_encoder_decoder_embeddings:
            self._tied_weights_keys["decoder.embed_tokens.weight"] = "shared.weight"
        # One module, not only one weight: FSDP2 refuses a weight that it finds in modules of different groups.
        self.set_input_embeddings(self.shared)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value
        if self.config.share_encoder_decoder_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        decoder_token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SparseqModelOutput:
        """
        Args:
            input_ids: Source `(B, S)`.
            attention_mask: `(B, S)`, 0 for padding; derived from `pad_token_id` when absent. A prepared mask must be
                `(B, 1, 1, S)`, since cross-attention reads it too.
            decoder_input_ids: Target so far `(B, T)`.
            decoder_attention_mask: `(B, cached + T)`, 0 for padding.
            encoder_outputs: The encoder's output, or a tuple that begins with its last hidden state, computed
                earlier; `input_ids` then only serve to derive the mask.
            past_key_values: Keys and values of earlier target positions and of the source.
            inputs_embeds, decoder_inputs_embeds: `(B, S, H)` and `(B, T, H)` in place of ids.
            decoder_position_ids: `(B, T)`.
            use_cache: Return keys and values.
            decoder_token_mask: `(B, T)`, False for target tokens that no routed expert needs to see.

        Raises:
            ValueError: if there is no target, or as encoder and decoder say.
        """
        if attention_mask is None:
            attention_mask = self._padding_mask(input_ids)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = SparseqEncoderOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            token_mask=decoder_token_mask,
            **kwargs,
        )
        return SparseqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            encoder_router_logits=getattr(encoder_outputs, "router_logits", None),
            decoder_router_logits=decoder_outputs.router_logits,
            encoder_router_indices=getattr(encoder_outputs, "router_indices", None),
            decoder_router_indices=decoder_outputs.router_indices,
        )


class SparseqEncoderModel(SparseqPreTrainedModel):
    """The encoder alone; `AutoModelForTextEncoding` loads it, also from a sequence-to-sequence checkpoint."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\.", "final_logits_bias"]
    _tp_plan = {"shared": "embedding_rowwise"}

    def __init__(self, config: SparseqConfig):
        super().__init__(config)
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SparseqEncoder(config)
        self._tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
        # One module, not only one weight: FSDP2 refuses a weight that it finds in modules of different groups.
        self.set_input_embeddings(self.shared)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SparseqEncoderOutput:
        """See `SparseqEncoder.forward`."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


# Caches that the calls of generate() of this thread have made.
_caches_with_steps: ContextVar[list[SparseqCache]] = ContextVar("caches_with_steps")


def _taking_back_steps(generate: Callable[..., Any]) -> Any:
    """generate() that leaves no step in a cache: who goes on with one may have trained the model meanwhile."""

    @functools.wraps(generate)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches: list[SparseqCache] = []
        token = _caches_with_steps.set(caches)
        try:
            return generate(self, *args, **kwargs)
        finally:
            _caches_with_steps.reset(token)
            for cache in caches:
                cache.step = None

    return wrapper


class SparseqForConditionalGeneration(SparseqPreTrainedModel, GenerationMixin):
    """
    Encoder, decoder and output projection: translation, summarization and any other sequence-to-sequence task;
    `AutoModelForSeq2SeqLM` loads it.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SparseqConfig):
        super().__init__(config)
        self.model = SparseqModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.final_logits_bias = nn.Buffer(torch.zeros(1, config.vocab_size)) if config.final_logits_bias else None
        if config.tie_word_embeddings:
            source = "shared" if config.share_encoder_decoder_embeddings else "decoder.embed_tokens"
            self._tied_weights_keys = {"lm_head.weight": f"model.{source}.weight"}
        # For callers of `model.loss_function`: the library's default for this class name would shift labels once more.
        self.loss_type = "ForMaskedLM"
        limit = config.max_position_embeddings or DEFAULT_MAX_LENGTH
        self.generation_config.max_length = min(DEFAULT_MAX_LENGTH, limit)
        # A trained parameter and its value when experts were first counted; see `_check_bias_updates`.
        self._watched: tuple[nn.Parameter, torch.Tensor] | None = None
        self._moves_biases = False
        self.post_init()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model.encoder

    def get_decoder(self) -> nn.Module:
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.model.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.final_logits_bias is not None:
            size = embeddings.weight.shape[0]
            kept = self.final_logits_bias[:, :size]
            self.final_logits_bias = nn.Buffer(F.pad(kept, (0, size - kept.shape[1])))
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs `(B, T)` for labels `(B, T)`; collators call it."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        if self._registers_with_fsdp("_maybe_prepare_encoder_kwargs_for_generation"):
            return self._maybe_prepare_encoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, model_input_name, generation_config
            )
        # generate() derives no mask for encoder-decoders; without this, padding would be attended to at every step.
        if model_input_name == "input_ids" and model_kwargs.get("attention_mask") is None:
            mask = self._padding_mask(inputs_tensor)
            if mask is not None:
                model_kwargs["attention_mask"] = mask.long()
        return super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]  # the mixin types self
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    def _registers_with_fsdp(self, method: str) -> bool:
        """
        Where FSDP2 has sharded this model, have it gather weights for `method`, too, and say whether that is new. For
        generate() runs the encoder before, and outside of, the forward of the model that gathers them.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or method in vars(self):
            return False
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if not isinstance(self, FSDPModule):
            return False
        register_fsdp_forward_method(self, method)
        return True

    generate = _taking_back_steps(GenerationMixin.generate)
    # Those who want gradients call it without its torch.no_grad.
    generate.__wrapped__ = _taking_back_steps(inspect.unwrap(GenerationMixin.generate))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # The source stays as it is: the decoder's rows share it.
        source: dict[str, Any] = {}
        for name in ("encoder_outputs", "attention_mask"):
            if name in model_kwargs:
                source[name] = model_kwargs.pop(name)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # the mixin types self
            expand_size, False, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **source}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # the mixin types self
            generation_config, model_kwargs, generation_mode, *args
        )
        implementation = generation_config.cache_implementation
        if given is not None or "past_key_values" not in model_kwargs or implementation not in (None, "dynamic"):
            return
        shows_more = any(
            getattr(settings, f"output_{name}", False)
            for settings in (generation_config, self.config)
            for name in ("attentions", "hidden_states", "router_logits")
        )
        beams = 1 if shows_more else self._sharing_beams(generation_config, model_kwargs, generation_mode)
        # Imported here, because it imports this file.
        from .decoding_sparseq import DecoderStep

        step = None if shows_more or not DecoderStep.serves(self.model.decoder) else DecoderStep(self.model.decoder)
        cache = SparseqCache(beams, step=step)
        _caches_with_steps.get([]).append(cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _sharing_beams(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any
    ) -> int:
        """How many rows of each source share the memory of their keys and values; 1 means none."""
        beams = int(generation_config.num_beams)
        searches = generation_mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
        has_masks = self.config._attn_implementation in ("sdpa", "eager")
        own_positions = any(
            model_kwargs.get(f"decoder_{name}") is not None for name in ("attention_mask", "position_ids")
        )
        shares = searches and has_masks and not own_positions and beams <= _SHARING_BEAMS
        return beams if shares else 1

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        """For beam search: row i continues row `beam_idx[i]`. Rows stay with their source, which nothing moves."""
        if isinstance(past_key_values, SparseqCache):
            past_key_values.reorder_cache(beam_idx)
        else:
            past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, SparseqCache) and cache.takes_steps and kwargs.get("next_sequence_length") == 1:
            inputs = {name: value for name, value in kwargs.items() if name != "next_sequence_length"}
            if inputs.keys() <= _STEP_INPUTS:
                return {"decoder_input_ids": args[0][:, -1:], **inputs}
        # A static cache turns the mask into one of four dimensions, from which positions cannot be counted.
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and mask.dim() == 2 and kwargs.get("decoder_position_ids") is None:
            kwargs["decoder_position_ids"] = positions_from_mask(mask)
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]  # the mixin types self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        skip_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        output_router_indices: bool = False,
        **kwargs: Any,
    ) -> SparseqSeq2SeqLMOutput | SparseqStepOutput:
        """
        Args:
            labels: `(B, T)`, not shifted, -100 where there is none. Decoder inputs are made from them when absent.
            skip_logits: Return `logits=None`, and compute the loss from the logits of a few label positions at a time;
                needs `labels`. Saves memory.
            num_items_in_batch: Label tokens of the whole optimizer step, over which the loss is averaged; Trainer
                passes it. When absent: those of `labels`.
            output_router_logits: Return router logits and the auxiliary losses also in evaluation.
            output_router_indices: Return the chosen experts.

        The others are those of `SparseqModel.forward`.

        Returns:
            `loss` is cross-entropy in evaluation, and with label smoothing and auxiliary losses in training. The steps
            of `generate()` get a `SparseqStepOutput`.

        Raises:
            ValueError: for `skip_logits` without labels, or as encoder and decoder say.
        """
        others = (decoder_attention_mask, decoder_inputs_embeds, decoder_position_ids, labels, output_router_logits)
        asks_for_more = skip_logits or output_router_indices or use_cache is False
        if isinstance(encoder_outputs, BaseModelOutput) and not asks_for_more and all(one is None for one in others):
            step = self._step(past_key_values, decoder_input_ids, kwargs)
            if step is not None:
                states = step(decoder_input_ids, past_key_values, encoder_outputs.last_hidden_state, attention_mask)
                logits = self._logits(states, step.head)
                return SparseqStepOutput(logits=logits, past_key_values=past_key_values)
        if skip_logits and labels is None:
            raise ValueError("`skip_logits=True` computes logits at the labels' positions, so it needs `labels`")
        if labels is not None:
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            use_cache = False
        if attention_mask is None:
            attention_mask = self._padding_mask(input_ids)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routes = labels is not None and self.config.num_experts > 0
        needs_losses = routes and (output_router_logits or (self.training and any(self.router_loss_coefs)))
        needs_counts = routes and self.training and self.config.router_balancing == "loss_free"
        target_mask = None
        if routes:
            target_mask = real_targets(labels, decoder_attention_mask)

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            # In evaluation every target token keeps its experts: its logits may be read even without a label.
            decoder_token_mask=target_mask if self.training else None,
            output_router_logits=output_router_logits or needs_losses,
            output_router_indices=output_router_indices or needs_losses or needs_counts,
            **kwargs,
        )
        if needs_counts:
            self._count_experts(outputs)

        logits = total = None
        if skip_logits:
            total = self._cross_entropy_of_states(outputs.last_hidden_state, labels)
        else:
            logits = self._logits(outputs.last_hidden_state)
            if labels is not None:
                total = self._cross_entropy(logits, labels)

        result = SparseqSeq2SeqLMOutput(
            loss=None if total is None else total / label_count(num_items_in_batch, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            encoder_router_logits=outputs.encoder_router_logits if output_router_logits else None,
            decoder_router_logits=outputs.decoder_router_logits if output_router_logits else None,
            encoder_router_indices=outputs.encoder_router_indices if output_router_indices else None,
            decoder_router_indices=outputs.decoder_router_indices if output_router_indices else None,
        )
        if needs_losses:
            self._add_router_losses(result, outputs, labels, attention_mask, target_mask, num_items_in_batch)
        return result

    def _step(self, cache: Any, decoder_input_ids: torch.Tensor | None, options: dict[str, Any]) -> Step | None:
        """The short way to compute one more token, where generate() has made one and it may be taken."""
        if not isinstance(cache, SparseqCache) or not cache.takes_steps:
            return None
        if decoder_input_ids is None or decoder_input_ids.shape[1] != 1:
            return None
        if any(option is not None and option is not False for option in options.values()):
            return None
        if self.training or torch.is_grad_enabled() or is_tracing(decoder_input_ids):
            return None
        return cache.step

    @property
    def router_loss_coefs(self) -> tuple[float, float]:
        """Weights of the load-balancing loss and of the z-loss in the training loss."""
        balances = self.config.router_balancing == "aux_loss"
        return self.config.router_aux_loss_coef if balances else 0.0, self.config.router_z_loss_coef

    def _logits(self, states: torch.Tensor, step: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        logits = self.lm_head(states) if step is None else step(self.lm_head, states)
        return logits if self.final_logits_bias is None else logits + self.final_logits_bias

    @property
    def _smoothing(self) -> float:
        return self.config.label_smoothing if self.training else 0.0

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over labels of the cross-entropy, smoothed in training."""
        return F.cross_entropy(
            logits.to(at_least_float32(logits.dtype)).view(-1, logits.shape[-1]),
            labels.to(logits.device).reshape(-1),
            reduction="sum",
            label_smoothing=self._smoothing,
        )

    def _cross_entropy_of_states(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same, of states `(B, T, H)` whose logits nobody sees."""
        is_label = labels.ne(-100)
        states, labels = states[is_label], labels[is_label]
        if not _is_plain(self.lm_head) or is_functional() or is_tracing():
            return self._cross_entropy(self._logits(states), labels)
        return ProjectedCrossEntropy.apply(
            states, self.lm_head.weight, self.final_logits_bias, labels.to(states.device), self._smoothing
        )

    def _add_router_losses(
        self,
        result: SparseqSeq2SeqLMOutput,
        outputs: SparseqModelOutput,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        target_mask: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> None:
        """Put each stack's auxiliary losses into `result`, and in training, weighted, into its loss."""
        weights = labels.ne(-100).sum(dim=1) / label_count(num_items_in_batch, labels)
        if attention_mask is None or attention_mask.dim() != 2:
            source = outputs.encoder_last_hidden_state
            attention_mask = torch.ones(source.shape[:2], device=source.device)
        for stack, mask in (("encoder", attention_mask.bool()), ("decoder", target_mask)):
            # Absent for an encoder whose output was given.
            logits = getattr(outputs, f"{stack}_router_logits")
            indices = getattr(outputs, f"{stack}_router_indices")
            if not logits or not indices:
                continue
            balance, z_loss = router_losses(
                logits, indices, self.config.router_scoring, mask, weights, self.config.router_balancing_scope
            )
            setattr(result, f"{stack}_aux_loss", balance)
            setattr(result, f"{stack}_z_loss", z_loss)
            for coefficient, term in zip(self.router_loss_coefs, (balance, z_loss), strict=True):
                # What has no weight is reported only, and costs no backward pass.
                if self.training and coefficient:
                    result.loss = result.loss + coefficient * term

    def _count_experts(self, outputs: SparseqModelOutput) -> None:
        if not is_tracing():
            self._check_bias_updates()
        for stack in ("encoder", "decoder"):
            # Absent for an encoder whose output was given.
            if indices := getattr(outputs, f"{stack}_router_indices"):
                for router, chosen in zip(self.routers(stack), indices, strict=True):
                    router.count(chosen)

    def _check_bias_updates(self) -> None:
        """Warn if the optimizer makes steps while the biases stay, until they move for the first time."""
        if self._moves_biases:
            return
        if self._watched is None:
            # By value, because fused optimizers do not raise a tensor's version; the smallest, because it is copied.
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            smallest = min(reversed(trained), key=torch.numel, default=None)
            self._watched = None if smallest is None else (smallest, smallest.detach().clone())
        elif not torch.equal(*self._watched):
            self._moves_biases = True
            logger.warning_once(
                'The model is trained with `router_balancing="loss_free"`, but its selection biases do not move, so '
                "nothing balances its experts: the optimizer has made a step without `model.update_router_bias()`. "
                "Call it after each step; for Trainer, `sparseq.training.callback.SparseqCallback` does it: "
                "`Trainer(..., callbacks=[SparseqCallback()])`. Without either, train with "
                '`router_balancing="aux_loss"`.'
            )


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is its class' forward and no more: nobody has put a hook or another forward to it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling it is a product with its weight and no more: no hooks, adapters, quantization or sharding."""
    has_weight = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)
    return has_weight and linear.bias is None and is_bare(linear)


def _with_rows(of_sources: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """What there is of each source, where a cache has more rows of each, or fewer."""
    if of_sources is None or of_sources.shape[0] == rows:
        return of_sources
    if of_sources.shape[0] > rows:
        return of_sources[:: of_sources.shape[0] // rows]
    return of_sources.repeat_interleave(rows // of_sources.shape[0], dim=0)


__all__ = ["SparseqEncoderModel", "SparseqForConditionalGeneration", "SparseqModel", "SparseqPreTrainedModel"]
