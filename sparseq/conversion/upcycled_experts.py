"""Mixtures of experts made of dense feed-forward layers: sparse upcycling."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

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
    seeded,
    stacked_inputs,
)
from sparseq.conversion.tensors import Planned, Source, Spec
from sparseq.losses_sparseq import at_least_float32


@dataclass(frozen=True, kw_only=True)
class UpcycledExperts:
    """Dense feed-forward layers become mixtures of experts that begin as copies of them (arXiv 2212.05055, section 3).

    Routers are drawn as those of a new model. The weights of a token's experts are made to sum to 1
    (`norm_topk_prob`), so that a mixture of equal experts computes what the dense layer did. With one expert for each
    token that would leave the router without a gradient; there the expert's output is multiplied by its score.

    Attributes:
        number: Experts of each sparse layer.
        per_token: Experts that each token is sent to.
        encoder_step, decoder_step: Layer i of the stack becomes sparse where `(i + 1) % step == 0`; 0 leaves it dense.
        init: How the experts differ: not at all ("copies"); by Gaussian "noise" on their weights; or, with "drop", by
            a share of their units, for each expert others, that are drawn anew from the normal distribution with the
            mean and the standard deviation of the weights that they replace, matrix by matrix (Drop-Upcycling,
            arXiv 2502.19261, section 3, "diversity re-initialization").
        noise: Standard deviation of the noise, relative to that of the matrix.
        drop_ratio: Share of the units that are drawn anew, r of arXiv 2502.19261; of an inner width, rounded down.
        router_balancing: As in `SparseqConfig`.
        seed: Of all that is drawn.

    Raises:
        ValueError: A number is out of range.
    """

    number: int
    per_token: int = 2
    encoder_step: int = 2
    decoder_step: int = 2
    init: Literal["copies", "noise", "drop"] = "copies"
    noise: float = 0.01
    drop_ratio: float = 0.5
    router_balancing: Literal["aux_loss", "loss_free", "none"] = "aux_loss"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.number < 2:
            raise ValueError(f"There must be at least 2 experts, but {self.number} are asked for.")
        if not 1 <= self.per_token <= self.number:
            raise ValueError(
                f"A token can be sent to 1 to {self.number} experts, as many as there are, but {self.per_token} are "
                "asked for."
            )
        if not 0 < self.noise < float("inf"):
            raise ValueError(f"The noise must be above 0, but is {self.noise}: for none, choose plain copies.")
        if not 0 < self.drop_ratio <= 1:
            raise ValueError(
                f"The share of units to draw anew must be above 0 and at most 1, but is {self.drop_ratio}: for none, "
                "choose plain copies."
            )

    def fields(self, source: Source, config: SparseqConfig) -> dict[str, Any]:
        """As `Change.fields`.

        Raises:
            ValueError: The model has experts already, no layer would become sparse, or of so few units none would be
                drawn anew.
        """
        if config.num_experts:
            raise ValueError(
                f"{source.folder} has {config.num_experts} experts already, and experts are made of dense layers: "
                "make it dense first (`sparseq densify`), or leave its experts as they are."
            )
        for stack, step in self._steps().items():
            if step > (layers := layer_count(config, stack)):
                raise ValueError(
                    f"One layer in {step} is none of the {stack}'s {layers}: choose a step of at most {layers} "
                    f"layers, or leave the {stack} dense."
                )
        sparse = [stack for stack, step in self._steps().items() if step]
        if not sparse:
            raise ValueError("Neither the encoder nor the decoder would have a sparse layer: choose some in one.")
        for stack in sparse:
            if self.init == "drop" and not self._dropped_units(width := ffn_width(config, stack)):
                raise ValueError(
                    f"A share of {self.drop_ratio} of the {stack}'s {width} units is less than one unit, so nothing "
                    f"would be drawn anew: choose a share of {math.ceil(1e4 / width) / 1e4} or more, or plain copies."
                )
        return {
            "num_experts": self.number,
            "num_experts_per_tok": self.per_token,
            "encoder_sparse_step": self.encoder_step,
            "decoder_sparse_step": self.decoder_step,
            # One width for both stacks.
            "expert_ffn_dim": max(ffn_width(config, stack) for stack in sparse),
            "expert_bias": config.ffn_bias,
            "num_shared_experts": 0,
            "norm_topk_prob": self.per_token > 1,
            "router_balancing": self.router_balancing,
        }

    def apply(self, source: Source, old: SparseqConfig, new: SparseqConfig) -> Changed:
        """As `Change.apply`."""
        fresh = FreshWeights(new, self.seed)
        layers = [
            _Layer(self, source, new, fresh, f"model.{stack}.layers.{layer}.mlp", ffn_width(old, stack))
            for stack in STACKS
            for layer in new.sparse_layers(stack)
        ]
        return Changed(planned=[one for layer in layers for one in layer.planned()], notes=self._notes(old, new))

    def _dropped_units(self, width: int) -> int:
        """Units of each expert that are drawn anew, where the dense layer has `width`."""
        # The share as it was written, since 0.29 in binary is a little less, and 0.29 * 100 would be 28.
        return math.floor(Fraction(str(self.drop_ratio)) * width)

    def _steps(self) -> dict[Stack, int]:
        return dict(zip(STACKS, (self.encoder_step, self.decoder_step), strict=True))

    def _notes(self, old: SparseqConfig, new: SparseqConfig) -> list[str]:
        notes = []
        if self.per_token == 1:
            notes.append(
                "With one expert for each token its output is multiplied by the router's score (norm_topk_prob is "
                "False, since a weight that is always 1 would not train the router): the model does not begin as the "
                "dense one."
            )
        elif self.init == "copies":
            notes.append("The sparse layers begin as the dense ones: equal experts, whose weights sum to 1.")
        for stack in STACKS:
            narrow, wide = ffn_width(old, stack), expert_width(new)
            if new.sparse_layers(stack) and narrow < wide:
                notes.append(
                    f"Experts of both stacks have {wide} units, but the {stack}'s layers had {narrow}: "
                    f"{wide - narrow} of each expert are new, with no weights going out, so that they add nothing "
                    "until they are trained."
                )
        return notes


@dataclass(frozen=True)
class _Layer:
    """A sparse layer to be.

    Attributes:
        options: How its experts come about.
        source: Where the dense layer is.
        config: The new model's.
        fresh: What new weights begin as.
        name: Of the layer, in the source and in the new model.
        width: Inner width of the dense layer.
    """

    options: UpcycledExperts
    source: Source
    config: SparseqConfig
    fresh: FreshWeights
    name: str
    width: int

    def planned(self) -> Iterator[Planned]:
        inputs = [f"{self.name}.{projection}" for projection in input_projections(self.config)]
        stacked, down = f"{self.name}.experts.{stacked_inputs(self.config)}", f"{self.name}.down_proj"
        yield self._router()
        if self.config.router_balancing == "loss_free":
            yield Planned(
                name=f"{self.name}.router.e_score_correction_bias",
                spec=Spec((self.options.number,), torch.float32),
                sources=(),
                how="zeros",
                make=lambda: torch.zeros(self.options.number),
            )
        yield self._stacked([f"{name}.weight" for name in inputs], stacked)
        yield self._stacked([f"{down}.weight"], f"{self.name}.experts.down_proj")
        if self.config.expert_bias:
            yield self._stacked([f"{name}.bias" for name in inputs], f"{stacked}_bias")
            yield self._output_bias(f"{down}.bias", f"{self.name}.experts.down_proj_bias")

    def _router(self) -> Planned:
        spec = self.source.specs[f"{self.name}.up_proj.weight"]
        name = f"{self.name}.router.weight"
        return Planned(
            name=name,
            spec=Spec((self.options.number, self.config.d_model), spec.dtype),
            sources=(),
            how="drawn at random, as for a new model",
            make=lambda: self.fresh.router(name).to(spec.dtype),
        )

    def _stacked(self, parts: Sequence[str], name: str) -> Planned:
        """Parameters of the units of all experts: `parts` one below the other, once for each expert."""
        rows, *columns = self.source.specs[parts[0]].shape
        dtype = common_dtype(self.source, parts)
        is_output = name.endswith(".down_proj")
        wide = expert_width(self.config)
        shape = (rows, wide) if is_output else (len(parts) * wide, *columns)
        return Planned(
            name=name,
            spec=Spec((self.options.number, *shape), dtype),
            sources=tuple(parts),
            how=f"{self.options.number} {self._how(is_bias=not columns)}",
            make=lambda: self._make_stacked(parts, Spec((self.options.number, *shape), dtype), is_output),
        )

    def _how(self, *, is_bias: bool) -> str:
        """How the parameters of the units come about, in words."""
        options, init = self.options, self._init(is_bias)
        if init == "noise":
            return f"copies with noise of {options.noise} of their standard deviation"
        if init == "drop":
            return f"copies, {options._dropped_units(self.width)} of their {self.width} units drawn anew"
        return "copies"

    def _make_stacked(self, parts: Sequence[str], spec: Spec, is_output: bool) -> torch.Tensor:
        dense = [self.source.read(part) for part in parts]
        stacked = torch.zeros(spec.shape, dtype=spec.dtype)
        for number, expert in enumerate(stacked):
            for part, weight, place in zip(parts, dense, expert.chunk(len(parts)), strict=True):
                if is_output:
                    weight, place = weight.T, place.T
                # Units are rows now, in weights (units, H) and biases (units,).
                place[: self.width] = self._varied(weight, part, number)
                if not is_output and weight.dim() == 2 and len(place) > self.width:
                    # At random, since units without weights in either direction would never get a gradient.
                    key = f"{part}/fill/{number}"
                    place[self.width :] = self.fresh.projection(len(place), key)[self.width :]
        return stacked

    def _varied(self, units: torch.Tensor, part: str, expert: int) -> torch.Tensor:
        """The units' weights `(F, H)` or biases `(F,)` for one expert."""
        init = self._init(units.dim() == 1)
        if init == "copies":
            return units
        exact, key = units.to(at_least_float32(units.dtype)), f"{part}/{expert}"
        if init == "noise":
            with seeded(self.options.seed, key):
                return exact + torch.randn_like(exact) * exact.std(correction=0) * self.options.noise
        dropped = self._dropped(expert)
        replaced = exact[dropped]
        with seeded(self.options.seed, key):
            new = torch.randn_like(replaced) * replaced.std(correction=0) + replaced.mean()
        return exact.index_copy(0, dropped, new)

    def _init(self, is_bias: bool) -> str:
        """How parameters of units differ between experts: biases get no noise."""
        return "copies" if is_bias and self.options.init == "noise" else self.options.init

    def _dropped(self, expert: int) -> torch.Tensor:
        """Indices of the units that one expert begins anew with; the same in all its matrices."""
        with seeded(self.options.seed, f"{self.name}/dropped/{expert}"):
            return torch.randperm(self.width)[: self.options._dropped_units(self.width)]

    def _output_bias(self, bias: str, name: str) -> Planned:
        """The bias behind the units, which is no unit's and the same for all experts."""
        (columns,), dtype = self.source.specs[bias]
        number = self.options.number
        return Planned(
            name=name,
            spec=Spec((number, columns), dtype),
            sources=(bias,),
            how=f"{number} copies",
            make=lambda: self.source.read(bias).expand(number, -1),
        )
