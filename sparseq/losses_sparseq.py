# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
The losses: cross-entropy whose logits are not kept, and what balances the experts.

Shapes: B batch, S source length, T target length, L length of either, N rows, H hidden size, V vocabulary, E experts,
K experts per token.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows whose logits exist at a time where no logits are asked for: enough for a product at full speed.
_PROJECTED_ROWS = 256


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type to compute a softmax in."""
    return torch.promote_types(dtype, torch.float32)


def real_targets(labels: torch.Tensor, decoder_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mask `(B, T)` of the target positions that are no padding: those of a mask `(B, T)` where there is one, otherwise
    the positions up to each row's last label, since in a causal decoder the loss sees no others. A label in the middle
    may be masked out; its position is a token all the same.
    """
    if decoder_attention_mask is not None and decoder_attention_mask.dim() == 2:
        return decoder_attention_mask.bool()
    return labels.ne(-100).flip(1).cumsum(dim=1).flip(1).bool()


def label_count(num_items_in_batch: torch.Tensor | int | None, labels: torch.Tensor) -> torch.Tensor | int:
    """What a sum over labels is divided by: the labels of the optimizer step where known, else these."""
    # At least 1: an update without a single label costs nothing, and is no NaN.
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(-100).sum()
    if torch.is_tensor(num_items_in_batch):
        return num_items_in_batch.to(labels.device).clamp(min=1)
    return max(num_items_in_batch, 1)


class ProjectedCrossEntropy(torch.autograd.Function):
    """
    Sum over rows of the label-smoothed cross-entropy of projected states, of which no more logits exist at a time than
    those of some rows: their gradient is taken right away, which needs no second product (Hsu et al. 2024,
    arXiv 2410.10989, section 3.2).

    Args:
        states: `(N, H)`.
        weight: `(V, H)`.
        bias: `(1, V)` or None; it gets no gradient.
        labels: `(N,)`, each a token.
        smoothing: Share of the target that is spread over the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        of_states, of_weight, *_ = ctx.needs_input_grad
        losses = states.new_empty(len(states), dtype=at_least_float32(states.dtype))
        grad_states = torch.empty_like(states) if of_states else None
        # Summed over the pieces, which bfloat16 would round each time.
        grad_weight = torch.zeros_like(weight, dtype=at_least_float32(weight.dtype)) if of_weight else None
        for start in range(0, len(states), _PROJECTED_ROWS):
            rows = slice(start, start + _PROJECTED_ROWS)
            projected = F.linear(states[rows], weight)
            logits = projected.to(losses.dtype) if bias is None else projected.to(losses.dtype) + bias
            # (n, 1) each.
            normalizer, chosen = logits.logsumexp(1, keepdim=True), labels[rows, None]
            gain = logits.gather(1, chosen)
            if smoothing:
                gain = gain.lerp(logits.mean(1, keepdim=True), smoothing)
            losses[rows] = (normalizer - gain).squeeze(1)
            if grad_states is None and grad_weight is None:
                continue
            grad = logits.sub_(normalizer).exp_()
            if smoothing:
                grad.sub_(smoothing / len(weight))
            grad = grad.scatter_add_(1, chosen, grad.new_full(chosen.shape, smoothing - 1)).to(projected.dtype)
            if grad_states is not None:
                grad_states[rows] = grad @ weight.to(grad.dtype)
            if grad_weight is not None:
                inputs = states[rows].to(grad.dtype)
                if grad.dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.mT, inputs)
                else:
                    grad_weight += grad.mT @ inputs
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_states, grad_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return (
            None if grad_states is None else (grad * grad_states).to(grad_states.dtype),
            None if grad_weight is None else (grad * grad_weight).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def router_losses(
    logits: tuple[torch.Tensor, ...],
    indices: tuple[torch.Tensor, ...],
    scoring: str,
    mask: torch.Tensor,
    weights: torch.Tensor,
    scope: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Load-balancing loss, E * sum_e f_e P_e with f_e the share of choices and P_e the mean normalised score of expert e
    (arXiv 2101.03961, eq. 4-6), and router z-loss, the mean of logsumexp(logits)^2 (arXiv 2202.08906, eq. 5). Both are
    means over a stack's sparse layers. Padding takes no part.

    Args:
        logits: One `(B * L, E)` for each sparse layer.
        indices: One `(B * L, K)` for each sparse layer; E stands for padding.
        scoring: "softmax" or "sigmoid", as `router_scoring`.
        mask: `(B, L)`, False for padding.
        weights: `(B,)`, each sentence's share of the loss: its label tokens over those of the whole optimizer step.
            With scope "sequence" the sum over sentences is then the same however a batch is cut.
        scope: "sequence" balances within each sentence, "batch" over all tokens here, once, with the sum of `weights`.

    Returns:
        Both losses, float32 scalars.
    """
    rows, length = mask.shape
    stacked = torch.stack(list(logits)).float().view(len(logits), rows, length, -1)
    num_experts = stacked.shape[-1]
    log_total = stacked.logsumexp(dim=-1, keepdim=True)
    if scoring == "softmax":
        probabilities = (stacked - log_total).exp()
    else:
        # Normalised, so that uniform routing costs exactly 1 here too.
        probabilities = stacked.sigmoid()
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    # Sums over tokens, then over sentences too for scope "batch"; the means follow.
    counted = mask[None, :, :, None].to(stacked.dtype)
    tokens = counted.sum(dim=2)
    mean_score = (probabilities * counted).sum(dim=2)
    z_loss = (log_total.square() * counted).sum(dim=(2, 3))
    z_loss = ((z_loss / tokens[..., 0].clamp(min=1)) * weights).sum(dim=-1).mean()
    chosen = torch.stack(list(indices)).view(len(indices), rows, length, -1)
    top_k = chosen.shape[-1]
    # One column more for padding, whose choice is E; decoder tokens behind the last label have chosen in evaluation.
    choices = counted.expand(len(indices), rows, length, top_k).flatten(2) / top_k
    share = choices.new_zeros(len(indices), rows, num_experts + 1).scatter_add_(2, chosen.flatten(2), choices)
    share = share[..., :num_experts]
    if scope == "batch":
        tokens, share, mean_score = (x.sum(dim=1, keepdim=True) for x in (tokens, share, mean_score))
        weights = weights.sum()[None]
    tokens = tokens.clamp(min=1)
    balance = num_experts * (share / tokens * (mean_score / tokens)).sum(dim=-1)
    return (balance * weights).sum(dim=-1).mean(), z_loss
