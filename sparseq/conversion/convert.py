"""Checkpoints of transformers' encoder-decoders as Sparseq models: the plan of what becomes of every tensor."""

import copy
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.families import family_of, family_to, unknown_fields
from sparseq.conversion.family import Family
from sparseq.conversion.plan import Plan
from sparseq.conversion.tensors import LeftOut, Planned, Source, Spec, copied, needed_tensors, tied_copy
from sparseq.losses_sparseq import at_least_float32
from sparseq.modeling_sparseq import SparseqForConditionalGeneration

SHARED = "model.shared.weight"
ENCODER = "model.encoder.embed_tokens.weight"
DECODER = "model.decoder.embed_tokens.weight"
OUTPUT = "lm_head.weight"
LOGITS_BIAS = "final_logits_bias"
_TABLE = re.compile(r"model\.(encoder|decoder)\.embed_positions\.weights?")
# What fairseq put beside its weights: the version of a stack, and a number that only had a type.
_MARKS = re.compile(r"(model\.)?(encoder|decoder)\.(version|embed_positions\._float_tensor)")

# Of a family's attention, and of its attention and feed-forward layers.
_KEY_VALUE = re.compile(r"attn\.[kv]_proj\.")
_BIAS = re.compile(r"(attn\.\w+_proj|\.fc[12])\.bias$")


def plan_import(
    source: Source,
    config: PreTrainedConfig,
    generation_config: GenerationConfig,
    *,
    dtype: torch.dtype | None = None,
) -> Plan:
    """How a checkpoint of a family in `families.FAMILIES` becomes a Sparseq model.

    Args:
        source: Its tensors.
        config: Its configuration.
        generation_config: How it generates, as transformers would load it.
        dtype: Type of the new weights; None keeps that of each.

    Raises:
        ValueError: Sparseq cannot represent it; the message has the reason.
    """
    family = family_of(config)
    new_config = imported_config(config, generation_config)
    tensors = _Import(source, family, config, new_config, dtype)
    planned = list(tensors.planned())
    return Plan(
        source=source,
        model_class=SparseqForConditionalGeneration,
        config=new_config,
        generation_config=copy.deepcopy(generation_config),
        planned=planned,
        left_out=list(tensors.left_out()),
        notes=list(_import_notes(family, config)),
    )


def imported_config(config: PreTrainedConfig, generation_config: GenerationConfig) -> SparseqConfig:
    """What Sparseq's configuration of a checkpoint is.

    Args:
        config: Its configuration.
        generation_config: How it generates: the start of a target may be known there alone.

    Raises:
        ValueError: As `family_of` and `Family.imported`.
    """
    family = family_of(config)
    if config.decoder_start_token_id is None:
        config = copy.copy(config)
        config.decoder_start_token_id = generation_config.decoder_start_token_id
    return family.imported(config)


def plan_export(
    source: Source,
    config: SparseqConfig,
    generation_config: GenerationConfig,
    to: str,
    *,
    dtype: torch.dtype | None = None,
) -> Plan:
    """How a dense Sparseq model becomes one of transformers.

    Args:
        source: Its tensors.
        config: Its configuration.
        generation_config: How it generates.
        to: The `model_type` of the family, one of `families.TARGETS`.
        dtype: Type of the new weights; None keeps that of each.

    Raises:
        ValueError: There is no such family, or it cannot represent the model; the message names every field that
            stands against it.
    """
    family = family_to(to)
    target = family.exported(config)
    if hasattr(target, "forced_eos_token_id"):
        target.forced_eos_token_id = generation_config.forced_eos_token_id
    return Plan(
        source=source,
        model_class=family.model_class,
        config=target,
        generation_config=copy.deepcopy(generation_config),
        planned=list(_Export(source, family, config, target, dtype).planned()),
        notes=list(_export_notes(family, config, target)),
    )


@dataclass
class _Import:
    """The tensors of a checkpoint under the names that its class in transformers gives them, and what they become."""

    source: Source
    family: Family
    config: Any
    new_config: SparseqConfig
    dtype: torch.dtype | None
    stored: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        # A model without its output projection is saved without this prefix.
        is_bare = not any(name.startswith("model.") for name in self.source.specs)
        outside = (OUTPUT, LOGITS_BIAS)
        self.stored = {
            f"model.{name}" if is_bare and name not in outside else name: name for name in self.source.specs
        }

    def planned(self) -> Iterator[Planned]:
        """One for each tensor of the new model that there is something to make of."""
        tied = dict(self._tied())
        for name, spec in needed_tensors(SparseqForConditionalGeneration, self.new_config).items():
            if name == LOGITS_BIAS:
                yield self._logits_bias(spec)
                continue
            experts = self.family.expert_names(name, self.new_config.num_experts)
            if experts and all(one in self.stored for one in experts):
                yield self._stacked(name, [self.stored[one] for one in experts])
                continue
            origins = [one for one in tied.get(name, (self.family.source_name(name),)) if one in self.stored]
            if origins:
                yield copied(self.source, self.stored[origins[0]], name, self.dtype)

    def left_out(self) -> Iterator[LeftOut]:
        """One for each tensor that is known to be needless."""
        for _, origins in self._tied():
            same = [self.stored[name] for name in origins if name in self.stored]
            for name in same[1:]:
                yield tied_copy(self.source, same[0], name)
        for name, stored in self.stored.items():
            if name == SHARED and not self.config.tie_word_embeddings:
                yield LeftOut(name=stored, reason="no forward of a model with untied embeddings reads it")
            elif self.family.has_tables and _TABLE.fullmatch(name):
                yield _table(self.source, stored, self.new_config)
            elif _MARKS.fullmatch(name):
                yield LeftOut(name=stored, reason="a mark of fairseq, which is no weight")

    def _tied(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each embedding of the new model, with the names of those that are one tensor in transformers."""
        if self.new_config.tie_word_embeddings and self.new_config.share_encoder_decoder_embeddings:
            yield SHARED, (SHARED, ENCODER, DECODER, OUTPUT)
            return
        yield SHARED, (ENCODER,)
        if self.new_config.tie_word_embeddings:
            yield DECODER, (DECODER, OUTPUT)
        else:
            yield DECODER, (DECODER,)
            yield OUTPUT, (OUTPUT,)

    def _logits_bias(self, spec: Spec) -> Planned:
        """The bias of the logits, with zeros where there is none: as wide as the vocabulary, whose size may have been
        changed after it was trained."""
        if LOGITS_BIAS not in self.stored:
            dtype = self.dtype or self._main_dtype()
            return zeros(LOGITS_BIAS, Spec(spec.shape, dtype), "zeros, as transformers has it where none is stored")
        whole = copied(self.source, LOGITS_BIAS, LOGITS_BIAS, self.dtype)
        missing = spec.shape[1] - whole.spec.shape[-1]
        if not missing:
            return whole
        what = f"filled up with {missing} zeros" if missing > 0 else f"without its last {-missing} numbers"
        return Planned(
            name=LOGITS_BIAS,
            spec=Spec(spec.shape, whole.spec.dtype),
            sources=whole.sources,
            how=f"{whole.how} {what}, as transformers resizes it with the vocabulary",
            make=lambda: torch.nn.functional.pad(whole.make(), (0, missing)),
        )

    def _stacked(self, name: str, origins: Sequence[str]) -> Planned:
        """A tensor of all experts, made of one tensor of each, of which one at a time is in memory."""
        specs = {self.source.specs[origin] for origin in origins}
        if len(specs) > 1:
            raise ValueError(
                f"{origins[0]} and those of the other experts in {self.source.folder} differ in shape or type: "
                f"{', '.join(f'{one.shape} of {one.dtype}' for one in specs)}."
            )
        one = specs.pop()
        spec = Spec((len(origins), *one.shape), self.dtype or one.dtype)
        scale = self.family.output_scale(self.config) if ".down_proj" in name else 1.0

        def make() -> torch.Tensor:
            stacked = torch.empty(spec.shape, dtype=spec.dtype)
            for part, origin in zip(stacked, origins, strict=True):
                tensor = self.source.read(origin)
                if scale == 1.0:
                    part.copy_(tensor)
                else:
                    torch.mul(tensor.to(at_least_float32(tensor.dtype)), scale, out=part)
            return stacked

        # Expert output masking scales nothing in training and, in inference, what experts put out by the share that
        # is kept (arXiv 2207.04672, section 6.2); Sparseq's scales in training, as dropout does.
        how = "stacked" if spec.dtype == one.dtype else f"stacked as {str(spec.dtype).removeprefix('torch.')}"
        if scale != 1.0:
            how += f", times {scale:g}, the share of outputs that masking keeps"
        return Planned(name=name, spec=spec, sources=tuple(origins), how=how, make=make)

    def _main_dtype(self) -> torch.dtype:
        """The type of the embeddings."""
        names = [self.stored[name] for _, origins in self._tied() for name in origins if name in self.stored]
        return self.source.specs[names[0]].dtype if names else torch.float32


@dataclass
class _Export:
    """The tensors of a Sparseq model, and what they become in a family."""

    source: Source
    family: Family
    config: SparseqConfig
    target: Any
    dtype: torch.dtype | None

    def planned(self) -> Iterator[Planned]:
        """One for each tensor of the new model that there is something to make of."""
        embeddings = self._embeddings()
        for name, spec in needed_tensors(self.family.model_class, self.target).items():
            origin = embeddings.get(name, self.family.own_name(name))
            if origin in self.source.specs:
                whole = copied(self.source, origin, name, self.dtype)
                yield self._repeated(whole, spec) if _KEY_VALUE.search(name) else whole
            elif self.family.has_tables and _TABLE.fullmatch(name):
                yield self._table(name, spec)
            elif self._is_absent_bias(name):
                yield zeros(name, Spec(spec.shape, self._main_dtype()), "zeros, for a bias that is not there")

    def _embeddings(self) -> dict[str, str]:
        """The embedding that each one of the family is a copy of."""
        decoder = SHARED if self.config.share_encoder_decoder_embeddings else DECODER
        return {
            SHARED: SHARED,
            ENCODER: SHARED,
            DECODER: decoder,
            OUTPUT: decoder if self.config.tie_word_embeddings else OUTPUT,
        }

    def _repeated(self, whole: Planned, spec: Spec) -> Planned:
        """Keys' or values' projection with as many heads as the queries have: each head of a group gets the same."""
        stack = "encoder" if whole.name.startswith("model.encoder.") else "decoder"
        heads = getattr(self.config, f"{stack}_num_key_value_heads")
        times = getattr(self.config, f"{stack}_attention_heads") // heads
        if times == 1:
            return whole
        return Planned(
            name=whole.name,
            spec=Spec(spec.shape, whole.spec.dtype),
            sources=whole.sources,
            how=f"{whole.how}, each of {heads} heads {times} times",
            make=lambda: whole.make().unflatten(0, (heads, -1)).repeat_interleave(times, dim=0).flatten(0, 1),
        )

    def _table(self, name: str, spec: Spec) -> Planned:
        dtype = self._main_dtype()
        return Planned(
            name=name,
            spec=Spec(spec.shape, dtype),
            sources=(),
            how="computed, a table of sinusoids",
            make=lambda: sinusoids(spec.shape[0], self.config).to(dtype),
        )

    def _is_absent_bias(self, name: str) -> bool:
        if name == LOGITS_BIAS:
            return not self.config.final_logits_bias
        has_bias = self.config.attention_bias if "attn." in name else self.config.ffn_bias
        return _BIAS.search(name) is not None and not has_bias

    def _main_dtype(self) -> torch.dtype:
        """The type of the embeddings."""
        if self.dtype is not None or SHARED not in self.source.specs:
            return self.dtype or torch.float32
        return self.source.specs[SHARED].dtype


def zeros(name: str, spec: Spec, how: str) -> Planned:
    """The plan of a tensor that nothing is stored of because it is zero."""
    return Planned(name=name, spec=spec, sources=(), how=how, make=lambda: torch.zeros(spec.shape, dtype=spec.dtype))


def sinusoids(rows: int, config: SparseqConfig) -> torch.Tensor:
    """Sinusoids `(rows, H)` of the positions 0, 1, ... in float64, laid out in halves (arXiv 1706.03762, section 3.5).

    Args:
        rows: How many.
        config: Says their width and the spacing of the frequencies.
    """
    pairs = config.d_model // 2
    steps = pairs if config.sinusoidal_spacing == "paper" else pairs - 1
    exponents = torch.arange(pairs, dtype=torch.float64) / steps
    angles = torch.arange(rows, dtype=torch.float64)[:, None] / torch.pow(10_000.0, exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _table(source: Source, name: str, config: SparseqConfig) -> LeftOut:
    """A table that is not needed, since it is that of the sinusoids up to rounding.

    Raises:
        ValueError: It is another table.
    """
    stored = source.read(name)
    expected = sinusoids(stored.shape[0], config)
    # A model that once was of a shorter type still has its numbers. And a table that was computed in float32 has
    # angles that are off by some roundings.
    shorter = (torch.bfloat16, torch.float16)
    precision = next((dtype for dtype in shorter if torch.equal(stored.to(dtype).to(stored), stored)), stored.dtype)
    angles = 4 * torch.finfo(torch.float32).eps * torch.arange(len(expected), dtype=torch.float64)
    allowed = torch.finfo(precision).eps + angles[:, None]
    # The rows before the first position are never read.
    first = config.position_offset
    if stored.shape != expected.shape or ((stored - expected).abs() > allowed)[first:].any():
        raise ValueError(
            f"{name} in {source.folder} is not the table of sinusoids that its architecture has. Sparseq computes "
            "sinusoids, so it cannot represent others."
        )
    reason = "a table of sinusoids, which Sparseq computes"
    is_exact = precision not in shorter
    if not is_exact:
        difference = float((stored - expected).abs()[first:].max())
        reason += f"; there rounded to {str(precision).removeprefix('torch.')}, by up to {difference:.1e}"
    return LeftOut(name=name, reason=reason, is_exact=is_exact)


def _import_notes(family: Family, config: Any) -> Iterator[str]:
    for name, reason in family.training_only.items():
        if getattr(config, name, None):
            yield f"`{name}` ({getattr(config, name)}) is not carried over: in training, {reason}."
    if unknown := unknown_fields(family, config):
        listed = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in sorted(unknown.items()))
        yield f"Not carried over, because no {family.title} that is known here reads it: {listed}."
    yield (
        "In training, the embedding of the pad token learns nothing in transformers from where it is an input; in "
        "Sparseq it learns like any other."
    )
    yield from family.notes


def _export_notes(family: Family, config: SparseqConfig, target: Any) -> Iterator[str]:
    ties = ("tie_word_embeddings", "share_encoder_decoder_embeddings")
    if any(getattr(config, name) and not getattr(target, name, target.tie_word_embeddings) for name in ties):
        yield (
            f"{family.title} has no embeddings that are tied as they are here, so it gets copies of them, which "
            "training moves apart."
        )
    for stack in ("encoder", "decoder"):
        heads, kv_heads = getattr(config, f"{stack}_attention_heads"), getattr(config, f"{stack}_num_key_value_heads")
        if kv_heads < heads:
            yield (
                f"{family.title} has no groups of heads: the {stack}'s {kv_heads} key-value heads are repeated to "
                f"{heads}, so its cache takes {heads // kv_heads} times the memory."
            )
    if config.label_smoothing:
        yield (
            f"`label_smoothing` ({config.label_smoothing}) is not carried over: in training, give it to the trainer."
        )
    yield from family.notes
