"""Dense feed-forward layers made of mixtures of experts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.changes import (
    STACKS,
    Changed,
    FreshWeights,
    Stack,
    common_dtype,
    expert_width,
    ffn_width,
    input_projections,
    layer_count,
    stacked_inputs,
)
from sparseq.conversion.tensors import LeftOut, Planned, Source, Spec
from sparseq.losses_sparseq import at_least_float32


@dataclass(frozen=True, kw_only=True)
class MergedExperts:
    """Each mixture of experts becomes one dense feed-forward layer, which every token passes.

    Layers of one stack have one width; those that need less are filled up with units that have no weights going out,
    so that they add nothing until they are trained.

    Attributes:
        experts: Indices of the experts that are kept, the same in every layer. One is taken as it is; of several, the
            layer computes the mean of their outputs, with all their units side by side. None merges all experts into
            one by the mean of their weights. Shared experts stay beside them and keep their effect.
        seed: Of the weights of units that fill up.

    Raises:
        ValueError: No expert is kept, or one is named twice.
    """

    experts: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts is not None and (not self.experts or len(set(self.experts)) < len(self.experts)):
            raise ValueError(
                f"The experts to keep must be at least one, each named once, but are: {_listed(self.experts)}."
            )

    def fields(self, source: Source, config: SparseqConfig) -> dict[str, Any]:
        """As `Change.fields`. Weights are read only where experts are wider than the stack's dense layers.

        Raises:
            ValueError: The model has no experts, or not those that are to be kept.
        """
        if not config.num_experts:
            raise ValueError(f"{source.folder} has no experts: it is a dense model already.")
        if wrong := [index for index in self.experts or () if not 0 <= index < config.num_experts]:
            raise ValueError(
                f"There is no expert {_listed(wrong)}: {source.folder} has {config.num_experts} in each sparse layer, "
                f"which are counted from 0 to {config.num_experts - 1}."
            )
        return {
            "num_experts": 0,
            "num_shared_experts": 0,
            "router_balancing": SparseqConfig().router_balancing,
            "ffn_bias": _has_bias(config),
            **{f"{stack}_ffn_dim": self._width(source, config, stack) for stack in STACKS},
        }

    def apply(self, source: Source, old: SparseqConfig, new: SparseqConfig) -> Changed:
        """As `Change.apply`."""
        fresh = FreshWeights(new, self.seed)
        planned: list[Planned] = []
        left_out: list[LeftOut] = []
        for stack in STACKS:
            sparse, width = old.sparse_layers(stack), ffn_width(new, stack)
            for layer in range(layer_count(old, stack)):
                mlp = f"model.{stack}.layers.{layer}.mlp"
                if layer in sparse:
                    blocks = self._blocks(source, old, stack, mlp)
                    left_out += _routers(source, mlp)
                else:
                    blocks = [_Dense(source, mlp, ffn_width(old, stack), "copied")]
                planned += _Layer(source, new, fresh, mlp, width, blocks).planned()
        return Changed(planned=planned, left_out=left_out, notes=self._notes(old, new))

    def _blocks(self, source: Source, config: SparseqConfig, stack: Stack, mlp: str) -> "list[_Block]":
        """What the dense layer in place of a sparse one consists of."""
        width = _used_width(source, config, stack)
        blocks: list[_Block] = [_Experts(source, config, f"{mlp}.experts", self.experts, width)]
        if number := config.num_shared_experts:
            shared_width = number * expert_width(config)
            blocks.append(_Dense(source, f"{mlp}.shared_experts", shared_width, "the shared experts"))
        return blocks

    def _width(self, source: Source, config: SparseqConfig, stack: Stack) -> int:
        """The smallest width that all layers of a stack fit in."""
        sparse = len(config.sparse_layers(stack))
        dense_width = ffn_width(config, stack) if sparse < layer_count(config, stack) else 0
        merged_width = sum(block.units for block in self._blocks(source, config, stack, "")) if sparse else 0
        return max(dense_width, merged_width)

    def _notes(self, old: SparseqConfig, new: SparseqConfig) -> list[str]:
        if self.experts is None:
            notes = [
                f"The {old.num_experts} experts of each sparse layer are one now, the mean of their weights: unless "
                "they were equal, it computes something else than they did."
            ]
        else:
            notes = [
                f"Of the {old.num_experts} experts of each sparse layer there remain: {_listed(self.experts)}. Every "
                "token passes them, wherever its router sent it."
            ]
        if not old.norm_topk_prob:
            notes.append(
                "The experts' outputs were multiplied by scores that need not sum to 1 (norm_topk_prob is False). The "
                "dense layers do without scores, so their outputs may be larger or smaller than before."
            )
        return notes


class _Block(Protocol):
    """Units that become part of a dense layer."""

    @property
    def units(self) -> int:
        """How many they are."""

    @property
    def how(self) -> str:
        """What they are, in words."""

    def tensors(self, projection: str, kind: str) -> list[str]:
        """Names of what `read` reads."""

    def read(self, projection: str, kind: str) -> torch.Tensor | None:
        """The weight or bias of one projection, as `nn.Linear` has it; None where there is no such bias."""


@dataclass(frozen=True)
class _Dense:
    """Those of a dense feed-forward layer or of shared experts, as they are."""

    source: Source
    name: str
    units: int
    how: str

    def tensors(self, projection: str, kind: str) -> list[str]:
        name = f"{self.name}.{projection}.{kind}"
        return [name] if name in self.source.specs else []

    def read(self, projection: str, kind: str) -> torch.Tensor | None:
        names = self.tensors(projection, kind)
        return self.source.read(names[0]) if names else None


@dataclass(frozen=True)
class _Experts:
    """Those of one or several experts of a sparse layer, or of their mean.

    Attributes:
        name: Of the experts.
        kept: As `MergedExperts.experts`.
        width: Units of each expert that count, which come first.
    """

    source: Source
    config: SparseqConfig
    name: str
    kept: tuple[int, ...] | None
    width: int

    @property
    def units(self) -> int:
        return self.width * len(self.kept or (0,))

    @property
    def how(self) -> str:
        number = self.config.num_experts
        if self.kept is None:
            return f"mean of {number} experts"
        return f"expert{'s' * (len(self.kept) > 1)} {_listed(self.kept)} of {number}"

    def tensors(self, projection: str, kind: str) -> list[str]:
        stacked = projection if projection == "down_proj" else stacked_inputs(self.config)
        name = f"{self.name}.{stacked}" + ("_bias" if kind == "bias" else "")
        return [name] if name in self.source.specs else []

    def read(self, projection: str, kind: str) -> torch.Tensor | None:
        names = self.tensors(projection, kind)
        if not names:
            return None
        is_input = projection in input_projections(self.config)
        if self.kept is None or len(self.kept) == 1 or (kind == "bias" and not is_input):
            indices = range(self.config.num_experts) if self.kept is None else self.kept
            return _mean(self._one(names[0], projection, kind, index) for index in indices)
        chosen = [self._one(names[0], projection, kind, index) for index in self.kept]
        if is_input:
            return torch.cat(chosen)
        return torch.cat([one.to(at_least_float32(one.dtype)) / len(chosen) for one in chosen], dim=1)

    def _one(self, name: str, projection: str, kind: str, index: int) -> torch.Tensor:
        """The weight or bias of one expert."""
        # Not the whole stack, which is larger than what becomes of it.
        tensor, inputs = self.source.read(name, index), input_projections(self.config)
        if projection in inputs:
            # A copy, so that memory does not hold the other part of what was read.
            return tensor.chunk(len(inputs))[inputs.index(projection)][: self.width].clone()
        return tensor[..., : self.width] if kind == "weight" else tensor


@dataclass(frozen=True)
class _Layer:
    """A dense layer to be, in which the units of several blocks lie side by side.

    Attributes:
        config: The new model's.
        fresh: What weights of units that fill up begin as.
        name: Of the layer, in the source and in the new model.
        width: Its units.
        blocks: What it is made of; their units may be fewer.
    """

    source: Source
    config: SparseqConfig
    fresh: FreshWeights
    name: str
    width: int
    blocks: Sequence[_Block]

    def planned(self) -> Iterator[Planned]:
        for projection in (*input_projections(self.config), "down_proj"):
            for kind in ("weight", "bias") if self.config.ffn_bias else ("weight",):
                yield self._tensor(projection, kind)

    def _tensor(self, projection: str, kind: str) -> Planned:
        dim, width = self.config.d_model, self.width
        if projection == "down_proj":
            shape = (dim, width) if kind == "weight" else (dim,)
        else:
            shape = (width, dim) if kind == "weight" else (width,)
        sources = self._sources(projection, kind)
        dtype = common_dtype(self.source, sources or self._sources(projection, "weight"))
        parts = [block.how for block in self.blocks] + ([f"{self._new} new units"] if self._new else [])
        return Planned(
            name=f"{self.name}.{projection}.{kind}",
            spec=Spec(shape, dtype),
            sources=sources,
            how=" beside ".join(parts) if sources else "zeros",
            make=lambda: self._make(projection, kind).to(dtype),
        )

    def _sources(self, projection: str, kind: str) -> tuple[str, ...]:
        """Names of the tensors that one of the layer's is made of."""
        return tuple(name for block in self.blocks for name in block.tensors(projection, kind))

    @property
    def _new(self) -> int:
        """Units that no block has."""
        return self.width - sum(block.units for block in self.blocks)

    def _make(self, projection: str, kind: str) -> torch.Tensor:
        read = [block.read(projection, kind) for block in self.blocks]
        new = self._new
        if projection == "down_proj":
            parts = [part for part in read if part is not None]
            if kind == "bias":
                return torch.stack(parts).sum(dim=0) if parts else torch.zeros(self.config.d_model)
            return F.pad(torch.cat(parts, dim=1), (0, new))
        if kind == "bias":
            # Units without a bias behave as with one of zero.
            zeros = [torch.zeros(block.units) for block in self.blocks]
            parts = [zero if part is None else part for zero, part in zip(zeros, read, strict=True)]
            return F.pad(torch.cat(parts), (0, new))
        parts = [part for part in read if part is not None]
        if new:
            # At random, since units without weights in either direction would never get a gradient.
            parts.append(self.fresh.projection(self.width, f"{self.name}.{projection}/fill")[-new:])
        return torch.cat(parts)


def _mean(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    """The mean of several tensors, in float64, where sums of float32 are exact: that of equal ones is the same."""
    tensor = next(tensors)
    dtype, total, number = tensor.dtype, tensor.to(torch.float64, copy=True), 1
    for tensor in tensors:
        total += tensor
        number += 1
    return total.div_(number).to(dtype)


def _has_bias(config: SparseqConfig) -> bool:
    """Whether any unit of any layer has a bias, so that all get one."""
    all_sparse = all(len(config.sparse_layers(stack)) == layer_count(config, stack) for stack in STACKS)
    has_dense = not all_sparse or config.num_shared_experts > 0
    return config.expert_bias or (config.ffn_bias and has_dense)


def _used_width(source: Source, config: SparseqConfig, stack: Stack) -> int:
    """Units of each expert of a stack that have any effect.

    Experts of both stacks are equally wide. Where a stack's dense layers were narrower, upcycling fills its experts up
    with units that have no weights going out; unless they have been trained, they are left out again.
    """
    wide, narrow = expert_width(config), ffn_width(config, stack)
    if wide <= narrow:
        return wide
    for layer in config.sparse_layers(stack):
        name = f"model.{stack}.layers.{layer}.mlp.experts.down_proj"
        if any(source.read(name, index)[:, narrow:].any() for index in range(config.num_experts)):
            return wide
    return narrow


def _routers(source: Source, mlp: str) -> list[LeftOut]:
    names = [name for name in source.specs if name.startswith(f"{mlp}.router.")]
    return [LeftOut(name=name, reason="there are no experts to choose from") for name in names]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
