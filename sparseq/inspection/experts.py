"""Expert load: how the routers of a sparse model spread real tokens over its experts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sparseq.inspection.routing import STACKS, LayerLoad, RoutingTotals, Stack, cheap_scores
from sparseq.losses_sparseq import real_targets
from sparseq.modeling_sparseq import SparseqPreTrainedModel, shift_tokens_right
from sparseq.text_table import format_table
from sparseq.training.evaluation import evaluating

# The bar of a load L, where uniform routing gives 1/E: an eighth of a block for each quarter of 1/E, so that a
# uniform load is half a block and twice that, or more, a full one. An expert without tokens has no bar.
_NO_BAR, _BARS = "·", "▁▂▃▄▅▆▇█"


class Routing(NamedTuple):
    """How one stack routed a batch.

    Attributes:
        ids: The tokens that were routed, `(B, L)`; in the decoder its inputs, which begin with the start token.
        is_real: `(B, L)`, False for tokens that do not count besides those with index E.
        logits: Router logits `(B * L, E)` of each sparse layer.
        indices: Chosen experts `(B * L, K)` of each sparse layer, E for padding.
    """

    ids: torch.Tensor
    is_real: torch.Tensor
    logits: Sequence[torch.Tensor]
    indices: Sequence[torch.Tensor]


def expert_load(model: SparseqPreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> list[LayerLoad]:
    """Measure the expert load of every sparse layer over `batches`, without padding and without gradients.

    The model is run in evaluation mode and given back in the mode it was in.

    Args:
        model: Any Sparseq model. `SparseqEncoderModel` has encoder layers only.
        batches: Mappings with `input_ids` `(B, S)` and, for models with a decoder, `labels` `(B, T)` (-100 where there
            is none), or `decoder_input_ids` `(B, T)` with `decoder_attention_mask` `(B, T)`. `attention_mask` `(B, S)`
            is derived from the pad token when absent. Other keys are ignored, so a collator's output can be passed.

    Returns:
        One entry for each sparse layer, the encoder's first; none for a dense model.

    Raises:
        ValueError: There is no batch or no token in them, or a batch does not say which target tokens are real.
    """
    totals = empty_totals(model)
    if not totals:
        return []
    with evaluating(model):
        for batch in batches:
            add_routings(model, route_batch(model, batch), totals)
    return layer_loads(model, totals)


def empty_totals(model: SparseqPreTrainedModel) -> dict[Stack, RoutingTotals]:
    """Totals at 0 for each stack of the model that has sparse layers, the encoder's first."""
    config = model.config
    return {
        stack: RoutingTotals(len(config.sparse_layers(stack)), config.num_experts, model.device)
        for stack in STACKS
        if hasattr(model.base_model, stack) and config.sparse_layers(stack)
    }


def add_routings(
    model: SparseqPreTrainedModel, routings: Mapping[Stack, Routing], totals: Mapping[Stack, RoutingTotals]
) -> None:
    """Add what `route_batch` returned to the totals of each stack."""
    for stack, total in totals.items():
        routing = routings[stack]
        total.add(routing.logits, routing.indices, routing.is_real, cheap_scores(model.routers(stack)[0]))


def layer_loads(model: SparseqPreTrainedModel, totals: Mapping[Stack, RoutingTotals]) -> list[LayerLoad]:
    """The load of every sparse layer that there are totals of.

    Raises:
        ValueError: No real token was added.
    """
    return [
        load for stack, total in totals.items() for load in total.layer_loads(stack, model.config.sparse_layers(stack))
    ]


@torch.no_grad()
def route_batch(model: SparseqPreTrainedModel, batch: Mapping[str, Any]) -> dict[Stack, Routing]:
    """Run `model` on one batch and return what its routers did, for each stack that the model has.

    Args:
        model: As for `expert_load`; the caller chooses its mode.
        batch: One of the batches of `expert_load`.

    Raises:
        ValueError: The batch does not say which target tokens are real.
    """
    base: Any = model.base_model
    wanted = {"output_router_logits": True, "output_router_indices": True}
    batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "input_ids" not in batch:
        raise ValueError(f"A batch needs `input_ids`, but has only {sorted(batch)}.")
    source = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    # The router marks padding itself, with the index E, also where it derived the mask from the ids.
    is_real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if not hasattr(base, "decoder"):
        outputs = base(**source, **wanted)
        return {"encoder": Routing(batch["input_ids"], is_real, outputs.router_logits, outputs.router_indices)}
    decoder_input_ids, is_real_target = _target(model, batch)
    outputs = base(**source, decoder_input_ids=decoder_input_ids, use_cache=False, **wanted)
    return {
        "encoder": Routing(batch["input_ids"], is_real, outputs.encoder_router_logits, outputs.encoder_router_indices),
        "decoder": Routing(
            decoder_input_ids, is_real_target, outputs.decoder_router_logits, outputs.decoder_router_indices
        ),
    }


def _target(model: SparseqPreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoder inputs `(B, T)` and which of them are real."""
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
    decoder_input_ids = batch.get("decoder_input_ids")
    if decoder_input_ids is None and labels is not None:
        config = model.config
        decoder_input_ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    if decoder_input_ids is None or (labels is None and mask is None):
        raise ValueError(
            "The decoder's load counts real tokens only, and ids do not tell them from padding: a batch needs "
            f"`labels`, or `decoder_input_ids` with `decoder_attention_mask`, but has only {sorted(batch)}."
        )
    if labels is not None:
        return decoder_input_ids, real_targets(labels, mask)
    assert mask is not None
    return decoder_input_ids, mask.bool()


def format_expert_load(loads: Sequence[LayerLoad]) -> str:
    """A table for the terminal: one line for each sparse layer, one bar for each expert.

    A uniform load is half a block high, twice that or more a full block, and an expert that no token chose a dot.

    Args:
        loads: What `expert_load` returned.

    Returns:
        Lines without a newline at the end.
    """
    if not loads:
        return "No sparse layers: the model has no experts."
    rows = [("stack", "layer", "load of each expert", "MaxVio", "dead", "entropy", "top-1")]
    rows += [
        (
            entry.stack,
            str(entry.layer),
            "".join(_bar(share, len(entry.load)) for share in entry.load),
            f"{entry.max_violation:.2f}",
            str(len(entry.dead_experts)),
            f"{entry.router_entropy:.2f}",
            f"{entry.mean_top1_probability:.2f}",
        )
        for entry in loads
    ]
    # Words and bars to the left, numbers to the right.
    return format_table(rows, "lrlrrrr")


def _bar(share: float, num_experts: int) -> str:
    if share == 0:
        return _NO_BAR
    eighths = round(4 * share * num_experts)
    return _BARS[min(max(eighths, 1), 8) - 1]


__all__ = [
    "LayerLoad",
    "Routing",
    "Stack",
    "add_routings",
    "empty_totals",
    "expert_load",
    "format_expert_load",
    "layer_loads",
    "route_batch",
]
