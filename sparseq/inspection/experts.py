"""Expert load: how the routers of a sparse model spread real tokens over its experts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparseq.modeling_sparseq import SparseqPreTrainedModel, shift_tokens_right, until_last_label

Stack = Literal["encoder", "decoder"]

# The bar of a load L, where uniform routing gives 1/E: an eighth of a block for each quarter of 1/E, so that a
# uniform load is half a block and twice that, or more, a full one. An expert without tokens has no bar.
_NO_BAR, _BARS = "·", "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What the router of one sparse layer did.

    Attributes:
        stack: "encoder" or "decoder".
        layer: Index of the layer in its stack.
        tokens: Real tokens that were routed.
        load: Each expert's share of the choices; the shares sum to 1.
        router_entropy: Mean over tokens of the entropy of the router's normalised scores, in nats: 0 for a router that
            is certain, ln E for one that sees no difference.
        mean_top1_probability: Mean over tokens of the largest normalised score.
    """

    stack: Stack
    layer: int
    tokens: int
    load: tuple[float, ...]
    router_entropy: float
    mean_top1_probability: float

    @property
    def max_violation(self) -> float:
        """MaxVio of arXiv 2408.15664, eq. 4, (max load - mean load) / mean load: 0 is perfect balance."""
        mean = sum(self.load) / len(self.load)
        return (max(self.load) - mean) / mean

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple(expert for expert, share in enumerate(self.load) if share == 0)


@dataclass
class _Sums:
    """Running sums of one sparse layer, in float64 so that many batches add up exactly enough."""

    counts: torch.Tensor
    tokens: int = 0
    entropy: float = 0.0
    top1: float = 0.0


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
    layers: list[tuple[Stack, int]] = [
        (stack, layer)
        for stack in ("encoder", "decoder")
        if hasattr(model.base_model, stack)
        for layer in model.config.sparse_layers(stack)
    ]
    if not layers:
        return []
    sums = {key: _Sums(torch.zeros(model.config.num_experts, dtype=torch.float64)) for key in layers}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                _add_batch(model, batch, sums)
    finally:
        model.train(was_training)
    return [_layer_load(stack, layer, sums[stack, layer]) for stack, layer in layers]


def _add_batch(
    model: SparseqPreTrainedModel, batch: Mapping[str, Any], sums: Mapping[tuple[Stack, int], _Sums]
) -> None:
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
        _add_stack(model, "encoder", outputs.router_logits, outputs.router_indices, is_real, sums)
        return
    decoder_input_ids, is_real_target = _target(model, batch)
    outputs = base(**source, decoder_input_ids=decoder_input_ids, use_cache=False, **wanted)
    _add_stack(model, "encoder", outputs.encoder_router_logits, outputs.encoder_router_indices, is_real, sums)
    _add_stack(model, "decoder", outputs.decoder_router_logits, outputs.decoder_router_indices, is_real_target, sums)


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
    if mask is not None:
        return decoder_input_ids, mask.bool()
    assert labels is not None
    # A label in the middle may be masked out; its position is a token all the same.
    return decoder_input_ids, until_last_label(labels)


def _add_stack(
    model: SparseqPreTrainedModel,
    stack: Stack,
    logits: Sequence[torch.Tensor] | None,
    indices: Sequence[torch.Tensor] | None,
    is_real: torch.Tensor,
    sums: Mapping[tuple[Stack, int], _Sums],
) -> None:
    layers = model.config.sparse_layers(stack)
    num_experts = model.config.num_experts
    for layer, router, layer_logits, layer_indices in zip(
        layers, model.routers(stack), logits or (), indices or (), strict=True
    ):
        counted = is_real.flatten() & (layer_indices < num_experts).all(dim=-1)
        scores = router.scores(layer_logits[counted].double())
        # Sigmoid scores do not sum to 1.
        probabilities = scores / scores.sum(dim=-1, keepdim=True)
        total = sums[stack, layer]
        total.counts += torch.bincount(layer_indices[counted].flatten(), minlength=num_experts).cpu()
        total.tokens += int(counted.sum())
        total.entropy += float(torch.special.entr(probabilities).sum())
        total.top1 += float(probabilities.amax(dim=-1).sum())


def _layer_load(stack: Stack, layer: int, sums: _Sums) -> LayerLoad:
    if sums.tokens == 0:
        raise ValueError("The expert load cannot be measured: the batches hold no real token.")
    return LayerLoad(
        stack=stack,
        layer=layer,
        tokens=sums.tokens,
        load=tuple((sums.counts / sums.counts.sum()).tolist()),
        router_entropy=sums.entropy / sums.tokens,
        mean_top1_probability=sums.top1 / sums.tokens,
    )


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # Words and bars to the left, numbers to the right.
    is_left = (True, False, True, False, False, False, False)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    )


def _bar(share: float, num_experts: int) -> str:
    if share == 0:
        return _NO_BAR
    eighths = round(4 * share * num_experts)
    return _BARS[min(max(eighths, 1), 8) - 1]
