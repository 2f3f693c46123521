"""Mixture-of-experts layers as nodes of a graph."""

from typing import NamedTuple

import numpy as np
import torch

from ..modeling_sparseq import SparseqExperts, SparseqMLP, SparseqRouter, SparseqSparseMLP
from .activations import write_activation
from .layers import Layers, array_of
from .nodes import Graph
from .operators import Experts

# Stands for minus infinity among routing logits.
_NEVER = -1e30


class _Routing(NamedTuple):
    """How tokens are sent to experts.

    Attributes:
        logits: `(N, E)`. The operator takes the K highest of each row.
        normalized: Whether it weighs them by their softmax over those K, not over all E.
        scale: `(N, 1)`, by which its outputs are multiplied; None for 1.
    """

    logits: str
    normalized: bool
    scale: str | None


def feed_forward(layers: Layers, states: str, name: str, mlp: SparseqMLP | SparseqSparseMLP) -> str:
    """Dense or sparse feed-forward layer, `(N, H)` to the same shape."""
    if not isinstance(mlp, SparseqSparseMLP):
        return layers.feed_forward(states, name, mlp)
    config = layers.config
    fused = layers.operators.expert_activation(config.activation_function, config.gated_ffn)
    if fused is None:
        outputs = _one_by_one(layers, states, name, mlp)
    else:
        routing = _route(layers, states, f"{name}.router", mlp.router)
        experts = _stacked(mlp.experts, f"{name}.experts", fused)
        outputs = layers.operators.experts(
            layers.graph, states, routing.logits, experts, config.num_experts_per_tok, routing.normalized
        )
        if routing.scale is not None:
            outputs = layers.graph.node("Mul", outputs, routing.scale)
    if not config.num_shared_experts:
        return outputs
    shared = layers.feed_forward(states, f"{name}.shared_experts", mlp.shared_experts)
    return layers.graph.node("Add", outputs, shared)


def _route(layers: Layers, states: str, name: str, router: SparseqRouter) -> _Routing:
    """What the operator is to be told, whose own routing is a softmax over logits and no more."""
    graph = layers.graph
    logits = _router_logits(layers, states, name, router)
    if router.scoring == "softmax" and layers.config.router_balancing != "loss_free":
        return _Routing(logits, router.norm_topk_prob, None)
    weights, chosen = _weights(layers, logits, name, router)
    # The softmax of logarithms is the numbers themselves over their sum.
    logarithms = graph.node("Log", graph.node("Max", weights, _least(graph)))
    nothing = graph.node("Expand", graph.constant(_NEVER, np.float32), graph.node("Shape", logits))
    told = graph.node("ScatterElements", nothing, chosen, logarithms, axis=1)
    scale = None
    if not router.norm_topk_prob:
        scale = graph.node("ReduceSum", weights, graph.constant([1]), keepdims=1)
    return _Routing(told, True, scale)


def _router_logits(layers: Layers, states: str, name: str, router: SparseqRouter) -> str:
    # In float32 whatever the precision of the rest: a small error would choose another expert.
    return layers.graph.node("Gemm", states, layers.graph.weight(name, array_of(router.weight)), transB=1)


def _weights(layers: Layers, logits: str, name: str, router: SparseqRouter) -> tuple[str, str]:
    """Scores of the chosen experts and their indices, `(N, K)` each, before they are divided by their sum."""
    graph = layers.graph
    is_softmax = router.scoring == "softmax"
    scores = graph.node("Softmax", logits, axis=-1) if is_softmax else graph.node("Sigmoid", logits)
    choice = scores
    if layers.config.router_balancing == "loss_free":
        bias = graph.weight(f"{name}.bias", array_of(router.e_score_correction_bias))
        choice = graph.node("Add", scores, bias)
    _, chosen = graph.node_of_many("TopK", choice, graph.constant([router.top_k]), outputs=2, axis=-1)
    return graph.node("GatherElements", scores, chosen, axis=1), chosen


def _stacked(experts: SparseqExperts, name: str, activation: str) -> Experts:
    first, first_bias, second, second_bias = _arrays(*experts.stacked_parameters())
    if experts.has_gate:
        # The operator takes gate and up in turn.
        first = _in_turn(first)
        first_bias = None if first_bias is None else _in_turn(first_bias)
    return Experts(name, activation, first, first_bias, second, second_bias)


def _arrays(
    first: torch.Tensor, first_bias: torch.Tensor | None, second: torch.Tensor, second_bias: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    return (
        array_of(first),
        None if first_bias is None else array_of(first_bias),
        array_of(second),
        None if second_bias is None else array_of(second_bias),
    )


def _in_turn(rows: np.ndarray) -> np.ndarray:
    """`(E, 2F, ...)`, the first F rows in turn with the last F."""
    split = rows.reshape(rows.shape[0], 2, -1, *rows.shape[2:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _one_by_one(layers: Layers, states: str, name: str, mlp: SparseqSparseMLP) -> str:
    """Each expert over the tokens that chose it, for activations that the operators of ONNX Runtime lack."""
    graph, router = layers.graph, mlp.router
    logits = _router_logits(layers, states, f"{name}.router", router)
    weights, chosen = _weights(layers, logits, f"{name}.router", router)
    if router.norm_topk_prob:
        total = graph.node("ReduceSum", weights, graph.constant([1]), keepdims=1)
        weights = graph.node("Div", weights, graph.node("Max", total, _least(graph)))
    nothing = graph.node("Expand", graph.constant(0, np.float32), graph.node("Shape", logits))
    by_expert = graph.node("ScatterElements", nothing, chosen, weights, axis=1)
    # (N, 1) each.
    parts = graph.node_of_many("Split", by_expert, outputs=router.num_experts, axis=-1, num_outputs=router.num_experts)
    outputs = graph.node("Expand", graph.constant(0, np.float32), graph.node("Shape", states))
    for index, weight in enumerate(parts):
        # (2, M): rows, and columns, which are all 0.
        places = graph.node("NonZero", weight)
        tokens = graph.node("Gather", places, graph.constant(0))
        output = _one_expert(layers, graph.node("Gather", states, tokens), name, mlp.experts, index)
        output = graph.node("Mul", output, graph.node("Gather", weight, tokens))
        rows = graph.node("Unsqueeze", tokens, graph.constant([1]))
        outputs = graph.node("ScatterND", outputs, rows, output, reduction="add")
    return outputs


def _least(graph: Graph) -> str:
    return graph.constant(np.finfo(np.float32).tiny, np.float32)


def _one_expert(layers: Layers, states: str, name: str, experts: SparseqExperts, index: int) -> str:
    graph, activation = layers.graph, layers.config.activation_function
    first, first_bias, second, second_bias = _arrays(*experts.stacked_parameters())
    names = [f"{name}.experts.{index}.{part}" for part in ("first", "second")]
    bias = None if first_bias is None else first_bias[index]
    inner = layers.operators.linear(graph, states, names[0], first[index], bias)
    if experts.has_gate:
        gate, up = graph.node_of_many("Split", inner, outputs=2, axis=-1, num_outputs=2)
        inner = graph.node("Mul", write_activation(graph, activation, gate), up)
    else:
        inner = write_activation(graph, activation, inner)
    bias = None if second_bias is None else second_bias[index]
    return layers.operators.linear(graph, inner, names[1], second[index], bias)
