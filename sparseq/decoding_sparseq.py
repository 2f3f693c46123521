# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
One step of decoding, as `generate()` takes it: the same numbers as the decoder's `forward`, without what is the same
at each step, and without calls of modules, each of which takes as long as a small product.

Shapes: B sources, N beams of each side by side (or 1), R = B * N rows, S source length, L' tokens in a cache, H hidden
size, K experts per token.
"""

import functools
import math
import platform
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from .cache_sparseq import Positions, SparseqCache
from .modeling_sparseq import (
    SparseqActivation,
    SparseqAttention,
    SparseqDecoder,
    SparseqDecoderLayer,
    SparseqExperts,
    SparseqGatedBiasExperts,
    SparseqGatedExperts,
    SparseqMLP,
    SparseqPlainBiasExperts,
    SparseqPlainExperts,
    SparseqRouter,
    SparseqSparseMLP,
    apply_rotary,
    is_bare,
    within_float16,
)

# The classes that a step knows, with what their forward was when this was written.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *(SparseqDecoder, SparseqDecoderLayer, SparseqAttention, SparseqMLP, SparseqSparseMLP, SparseqRouter),
        *(SparseqGatedExperts, SparseqGatedBiasExperts, SparseqPlainExperts, SparseqPlainBiasExperts),
        *(SparseqActivation, nn.Linear),
    )
}


class LinearStep:
    """
    A linear layer in one step of decoding.

    On the CPU a step waits for its weight from memory, and a product of few rows takes longer to bring it into order
    than to compute. So a weight that many steps need is laid out in the order in which it is read: for several rows by
    oneDNN, for a single one with the numbers that one input is multiplied by side by side. It is a copy, made for one
    call of generate().
    """

    # Numbers of a weight below which nothing is gained, because a product takes no longer than the way to oneDNN, and
    # rows up to which the other layout gains where oneDNN is missing.
    _SMALL, _FEW_ROWS = 1 << 17, 16

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        # Whether oneDNN has laid the weight out.
        self.is_packed = False

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        if not self.is_packed:
            return F.linear(states, self.weight, self.bias)
        flat = states.reshape(-1, states.shape[-1])
        rows = flat.shape[0]
        size = padded(rows)
        if size > rows:
            flat = F.pad(flat, (0, 0, 0, size - rows))
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, "none", [], "")
        return product[:rows].view(*states.shape[:-1], -1)

    def lay_out(self, rows: int) -> int:
        """Lay the weight out anew for products of so many rows, if that gains; returns how many numbers are copied."""
        weight = self.weight.detach()
        is_plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.layout == torch.strided
        if not is_plain or weight.numel() < self._SMALL:
            return 0
        if rows > 1 and packs():
            self.weight, self.is_packed = torch.ops.mkldnn._reorder_linear_weight(weight, padded(rows)), True
            # Of a bias oneDNN takes no strides.
            self.bias = None if self.bias is None else self.bias.detach().contiguous()
        elif rows <= self._FEW_ROWS and weight.shape[0] >= 2 * weight.shape[1]:
            self.weight = weight.t().contiguous().t()
        else:
            return 0
        return weight.numel()


def padded(rows: int) -> int:
    """
    The rows that a product of oneDNN has for so many: 4, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40 and so on. For each
    number of rows it makes a program, which takes half a millisecond and more than half a megabyte of the process.
    """
    if rows <= 8:
        return 4 if rows <= 4 else 8
    step = 1 << ((rows - 1).bit_length() - 3)
    return -(-rows // step) * step


def packs() -> bool:
    """Whether weights may be laid out by oneDNN."""
    return bool(torch.backends.mkldnn.enabled) and _can_pack()


@functools.cache
def _can_pack() -> bool:
    """
    Whether torch has the products with weights laid out by oneDNN that its compiler uses, and they are right: they are
    not of its public interface.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    states, weight, bias = (
        torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").view(shape)
        for shape in ((2, 1, 3), (4, 3), (4,))
    )
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        product = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(product, F.linear(states, weight, bias))


class AttentionStep:
    """An attention layer in one step of decoding, in which each query sees all keys but those that a mask hides."""

    # Numbers of a weight up to which those of queries, keys and values are put together for one product. It saves the
    # time of two calls, which beside a larger product is nothing, and takes memory.
    _FUSED = 1 << 20

    def __init__(self, attention: SparseqAttention, is_cross_attention: bool) -> None:
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.groups = attention.num_key_value_groups
        self.out = LinearStep(attention.out_proj.weight, attention.out_proj.bias)
        inputs = [attention.q_proj] if is_cross_attention else [attention.q_proj, attention.k_proj, attention.v_proj]
        self.inputs = [LinearStep(each.weight, each.bias) for each in inputs]
        # In heads.
        self.sizes = [linear.out_features // self.head_dim for linear in inputs]
        if len(inputs) > 1 and attention.q_proj.weight.numel() <= self._FUSED:
            biases: list[torch.Tensor] = [each.bias for each in inputs if each.bias is not None]
            weight = torch.cat(tuple(each.weight for each in inputs))
            self.inputs = [LinearStep(weight, torch.cat(biases) if biases else None)]

    def over_target(
        self,
        states: torch.Tensor,
        cache: Any,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Add `(B, N, H)` to the cache and attend to all in it; `mask` is `(B, 1, N, L')`. Returns `(B, N, H)`."""
        sources, rows, _ = states.shape
        if len(self.inputs) == 1:
            heads = self.inputs[0](states).view(sources, rows, -1, self.head_dim).transpose(1, 2)
            query, key, value = heads.split(self.sizes, dim=1)
        else:
            query, key, value = (
                each(states).view(sources, rows, -1, self.head_dim).transpose(1, 2) for each in self.inputs
            )
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        key, value = cache.update(key, value)
        return self._attend(query, key, value, mask, states)

    def over_source(self, states: torch.Tensor, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend to the source in the cache; `mask` is `(B, 1, 1, S)`. `(B, N, H)` to the same shape."""
        key = cache.keys
        query = self.inputs[0](states).view(key.shape[0], -1, self.sizes[0], self.head_dim)
        return self._attend(query.transpose(1, 2), key, cache.values, mask, states)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        states: torch.Tensor,
    ) -> torch.Tensor:
        groups = self.groups
        if groups > 1:
            # Query heads of one group are further queries of their key-value head: nothing is copied for them.
            query = query.unflatten(1, (-1, groups)).flatten(2, 3)
            if mask is not None and mask.shape[2] > 1:
                mask = mask.repeat(1, 1, groups, 1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        if groups > 1:
            output = output.unflatten(2, (groups, -1)).flatten(1, 2)
        return self.out(output.transpose(1, 2).reshape(states.shape))


class MLPStep:
    """A dense feed-forward layer in one step of decoding."""

    def __init__(self, mlp: SparseqMLP) -> None:
        self.up, self.down = (LinearStep(each.weight, each.bias) for each in (mlp.up_proj, mlp.down_proj))
        self.gate = None if mlp.gate_proj is None else LinearStep(mlp.gate_proj.weight, mlp.gate_proj.bias)
        self.activation = mlp.act_fn.activation

    def linears(self) -> Iterator[list[LinearStep]]:
        """Its products, each by itself."""
        yield from ([each] for each in (self.up, self.down, self.gate) if each is not None)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.up(states)
        inner = self.activation(inner) if self.gate is None else self.activation(self.gate(states)) * inner
        return self.down(inner)


class ExpertStep:
    """One expert in one step of decoding."""

    def __init__(self, first: LinearStep, second: LinearStep, experts: SparseqExperts) -> None:
        self.first, self.second = first, second
        self.has_gate, self.activation = experts.has_gate, experts.act_fn.activation

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(N, H)` to the same shape."""
        inner = self.first(tokens)
        if self.has_gate:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        return self.second(inner)


class SparseMLPStep:
    """A sparse feed-forward layer in one step of decoding."""

    # Choices of an expert by a token up to which experts are applied one by one: sorting would take longer.
    _FEW = 8

    def __init__(self, mlp: SparseqSparseMLP) -> None:
        self.mlp, self.router = mlp, mlp.router
        self.router_weight = mlp.router.weight.float()
        self.shared = None if mlp.shared_experts is None else MLPStep(mlp.shared_experts)

    @functools.cached_property
    def experts(self) -> list[ExpertStep]:
        """Each expert by itself; made when they are needed, because they may be many."""
        experts = self.mlp.experts
        parts = (
            [None] * experts.num_experts if stacked is None else stacked.unbind()
            for stacked in experts.stacked_parameters()
        )
        return [
            ExpertStep(LinearStep(weight_in, bias_in), LinearStep(weight_out, bias_out), experts)
            for weight_in, bias_in, weight_out, bias_out in zip(*parts, strict=True)
        ]

    def linears(self, rows: int) -> Iterator[list[LinearStep]]:
        """Its products that may be laid out anew for a step of so many rows; those of the experts together."""
        if self.shared is not None:
            yield from self.shared.linears()
        # Without oneDNN these would not be used, because the layer itself multiplies stacked weights.
        if rows > 1 and rows * self.router.top_k > self._FEW and packs():
            yield [linear for expert in self.experts for linear in (expert.first, expert.second)]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.view(-1, states.shape[-1])
        is_autocast = torch.is_autocast_enabled(states.device.type)
        has_few = flat.shape[0] * self.router.top_k <= self._FEW
        if states.device.type != "cpu" or is_autocast or not (has_few or self.experts[0].first.is_packed):
            return self.mlp(states)[0]
        weights, indices = self.router.choose(F.linear(flat.float(), self.router_weight))
        mix = self._one_by_one if has_few else self._sorted
        mixed = mix(flat, weights, indices).to(states.dtype).view(states.shape)
        return mixed if self.shared is None else mixed + self.shared(states)

    def _one_by_one(self, tokens: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """What the experts `(N, K)` make of tokens `(N, H)`, in the sum that `weights` `(N, K)` say; `(N, H)`."""
        outputs = []
        for row, chosen in enumerate(indices.tolist()):
            made = torch.cat([self.experts[expert](tokens[row : row + 1]) for expert in chosen])
            outputs.append(torch.mm(weights[row : row + 1], made.to(weights.dtype)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _sorted(self, tokens: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The same with one product for all tokens of an expert."""
        ids, order = indices.flatten().sort(stable=True)
        parts = tokens.index_select(0, order // self.router.top_k).split(
            torch.bincount(ids, minlength=len(self.experts)).tolist()
        )
        made = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if part.shape[0]]
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        outputs = torch.cat(made).index_select(0, places).view(*indices.shape, -1)
        return (outputs * weights[..., None]).sum(dim=1)


class LayerStep:
    """A decoder layer in one step of decoding."""

    def __init__(self, layer: SparseqDecoderLayer) -> None:
        self.pre_norm, self.index = layer.pre_norm, layer.self_attn.layer_idx
        self.self_attn = AttentionStep(layer.self_attn, is_cross_attention=False)
        self.encoder_attn = AttentionStep(layer.encoder_attn, is_cross_attention=True)
        self.mlp = MLPStep(layer.mlp) if isinstance(layer.mlp, SparseqMLP) else SparseMLPStep(layer.mlp)
        self.norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)

    def linears(self, rows: int) -> Iterator[list[LinearStep]]:
        """Its products that may be laid out anew for a step of so many rows; together those of use only together."""
        for attention in (self.self_attn, self.encoder_attn):
            yield from ([each] for each in (*attention.inputs, attention.out))
        yield from self.mlp.linears() if isinstance(self.mlp, MLPStep) else self.mlp.linears(rows)

    def __call__(
        self,
        states: torch.Tensor,
        cache: SparseqCache,
        mask: torch.Tensor | None,
        source_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        target = cache.self_attention_cache.layers[self.index]
        source = cache.cross_attention_cache.layers[self.index]
        first, second, third = self.norms
        if self.pre_norm:
            states = states + self.self_attn.over_target(first(states), target, mask, rotary)
            states = states + self.encoder_attn.over_source(second(states), source, source_mask)
            return within_float16(states + self.mlp(third(states)))
        states = first(states + self.self_attn.over_target(states, target, mask, rotary))
        states = second(states + self.encoder_attn.over_source(states, source, source_mask))
        return third(within_float16(states + self.mlp(states)))


class HeadStep:
    """The product of a step's states with the vocabulary's weight, which is laid out anew once it has paid."""

    # Steps by which laying it out would have paid, and numbers up to which it is worth its memory.
    _PAID_BY, _LARGEST = 8, 1 << 25

    def __init__(self) -> None:
        self.linear: LinearStep | None = None
        self._steps = 0
        # What `linear` is of, and which version of it.
        self._source: tuple[torch.Tensor, int] | None = None

    def __call__(self, head: Any, states: torch.Tensor) -> torch.Tensor:
        """What `head` makes of `(R, 1, H)`."""
        self._steps += 1
        rows = states.shape[0]
        # A product of one row takes so little that it pays later.
        if self._steps == (self._PAID_BY if rows > 1 else 2 * self._PAID_BY) and self._serves(head, states):
            linear = LinearStep(head.weight, None)
            if linear.lay_out(rows):
                self.linear, self._source = linear, (head.weight, head.weight._version)
        if self.linear is not None and self._source is not None and self._serves(head, states):
            weight, version = self._source
            if weight is head.weight and version == weight._version:
                return self.linear(states)
        logits: torch.Tensor = head(states)
        return logits

    def _serves(self, head: Any, states: torch.Tensor) -> bool:
        """Whether calling `head` is a product with a weight that would be read faster."""
        is_linear = type(head) is nn.Linear
        if not is_linear or head.bias is not None or not _is_ours(head):
            return False
        weight = head.weight
        # Those of inference mode do not say when they are changed.
        is_plain = weight.dtype == states.dtype == torch.float32 and weight.device.type == "cpu"
        is_plain = is_plain and not weight.is_inference() and not torch.is_autocast_enabled("cpu")
        return is_plain and weight.numel() <= self._LARGEST


class DecoderStep:
    """
    The decoder for one more token of each row, in inference: the same as its `forward`, without what is the same at
    each step, and without calls of modules, each of which takes as long as a small product. It is made for one call of
    generate(), and holds some of the decoder's weights a second time, so those must not change meanwhile.
    """

    # Steps by which it has paid to lay the weights out anew, half as many for so many rows, which gain more; and how
    # many numbers may be copied for that.
    _PAID_BY, _MANY_ROWS, _COPIED = 32, 32, 1 << 25

    def __init__(self, decoder: SparseqDecoder) -> None:
        self.decoder = decoder
        self.head = HeadStep()
        self.limit = decoder.position_limit()
        self.layers = [LayerStep(cast(SparseqDecoderLayer, layer)) for layer in decoder.layers]
        self._steps = 0

    @staticmethod
    def serves(decoder: SparseqDecoder) -> bool:
        """
        Whether it does what the decoder does: with sdpa, in evaluation, where all that it bypasses is what this
        package made it, and where nobody looks into it. (An adapter has a weight too, which is not all of it.)
        """
        if decoder.config._attn_implementation != "sdpa" or any(module.training for module in decoder.modules()):
            return False
        return all(map(_is_ours, _bypassed(decoder)))

    def __call__(
        self,
        input_ids: torch.Tensor,
        cache: SparseqCache,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: `(R, 1)`.
            cache: Of what came before, that of the source included.
            encoder_hidden_states: `(B, S, H)`.
            encoder_attention_mask: `(B, S)`, 0 for padding.

        Returns:
            Hidden states `(R, 1, H)`.
        """
        decoder, limit = self.decoder, self.limit
        self._steps += 1
        rows = input_ids.shape[0]
        paid_by = self._PAID_BY if rows < self._MANY_ROWS else self._PAID_BY // 2
        if self._steps == paid_by and not torch.is_autocast_enabled(input_ids.device.type):
            self._lay_out(rows)
        past, beams = cache.get_seq_length(), cache.beams
        if limit is not None:
            decoder.check_length(past + 1)
        # The beams of a source are so many tokens of one row.
        embeds = decoder.embed(input_ids.view(-1, beams), None, "decoder_")

        def make_positions(start: int, end: int) -> Positions:
            end = end if limit is None else min(end, limit)
            return decoder.positions(torch.arange(start, end, device=embeds.device)[None], embeds.dtype)

        def make_mask() -> torch.Tensor | None:
            # Of one query, for however many there are.
            first = embeds[: encoder_hidden_states.shape[0], :1]
            return decoder.source_mask(first, encoder_hidden_states, encoder_attention_mask)

        states, rotary = decoder.add_positions(embeds, cache.positions(past, make_positions))
        mask = None if beams == 1 else cache.extend(states.shape[0], 1, states)
        source_mask = cache.source_mask(encoder_attention_mask, make_mask)
        for layer in self.layers:
            states = layer(states, cache, mask, source_mask, rotary)
        if decoder.norm is not None:
            states = decoder.norm(states)
        return states.view(rows, 1, -1)

    def _lay_out(self, rows: int) -> None:
        """Lay the weights out anew, as many as there may be copies of."""
        left = self._COPIED
        for layer in self.layers:
            for linears in layer.linears(rows):
                if sum(linear.weight.numel() for linear in linears) <= left:
                    left -= sum(linear.lay_out(rows) for linear in linears)


def _bypassed(decoder: nn.Module) -> Iterator[nn.Module]:
    """The modules that a step does not call, as far as they are what they should be, and those in their place."""
    yield decoder
    for layer in decoder.layers if isinstance(decoder, SparseqDecoder) else ():
        yield layer
        if isinstance(layer, SparseqDecoderLayer):
            parts: list[nn.Module] = [layer.self_attn, layer.encoder_attn]
            if isinstance(layer.mlp, SparseqSparseMLP):
                yield from (layer.mlp, layer.mlp.router)
                parts += [layer.mlp.experts, *([layer.mlp.shared_experts] if layer.mlp.shared_experts else [])]
            else:
                parts.append(layer.mlp)
            for module in parts:
                yield module
                yield from (child for name, child in module.named_children() if name.endswith(("_proj", "act_fn")))


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is exactly of a class that a step knows, with the forward of that class."""
    forward = _FORWARDS.get(type(module))
    if forward is None or type(module).forward is not forward or not is_bare(module):
        return False
    # Quantized weights are tensors of other types.
    return all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
