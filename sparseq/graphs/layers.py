"""The layers of a Sparseq model as nodes of a graph: linear maps, norms, residual connections and feed-forward layers.

Shapes in this package: B source sentences, R target rows (the beams of one source side by side), S source length, T
target length, L length of either, N tokens (B * S or R * T), H hidden size, V vocabulary, A attention heads, K
key-value heads, D width of a head, P its width in the graphs, E experts, F inner width of one expert. Hidden states
are `(N, H)` throughout.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..configuration_sparseq import SparseqConfig
from ..modeling_sparseq import SparseqMLP
from .nodes import Graph
from .operators import Operators


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A weight in float32."""
    return tensor.detach().to("cpu", torch.float32).numpy()


def parameters_of(linear: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight `(O, I)` and bias of a linear map.

    Raises:
        ValueError: It is not a plain one.
    """
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"`{name}` is a {type(linear).__name__}, but graphs are made of plain linear layers: merge an adapter "
            "into the model (`merge_and_unload()`), or load the model without quantization"
        )
    return array_of(linear.weight), None if linear.bias is None else array_of(linear.bias)


class Projection(NamedTuple):
    """A linear map, and how its rows are rearranged."""

    name: str
    linear: nn.Module
    arrange: Callable[[np.ndarray], np.ndarray]


class Layers:
    """Writes layers into one graph.

    Args:
        graph: The graph.
        config: The model's configuration.
        operators: What large weights are computed with.
    """

    def __init__(self, graph: Graph, config: SparseqConfig, operators: Operators):
        self.graph = graph
        self.config = config
        self.operators = operators

    def linear(self, states: str, name: str, linear: nn.Module, activation: str = "") -> str:
        """A linear map, and maybe an activation."""
        return self.operators.linear(self.graph, states, name, *parameters_of(linear, name), activation)

    def fused(self, states: str, name: str, projections: Iterable[Projection]) -> str:
        """Several linear maps of the same states as one, their outputs side by side."""
        weights, biases = [], []
        for part, linear, arrange in projections:
            weight, bias = parameters_of(linear, part)
            weights.append(arrange(weight))
            if bias is not None:
                biases.append(arrange(bias))
        bias = np.concatenate(biases) if biases else None
        return self.operators.linear(self.graph, states, name, np.concatenate(weights), bias)

    def norm(self, states: str, name: str, norm: nn.Module) -> str:
        """LayerNorm or RMSNorm over H."""
        inputs = [states, self.graph.weight(name, array_of(norm.get_parameter("weight")))]
        if self.config.norm_type == "layernorm":
            inputs.append(self.graph.weight(f"{name}.bias", array_of(norm.get_parameter("bias"))))
        operator = "LayerNormalization" if self.config.norm_type == "layernorm" else "RMSNormalization"
        return self.graph.node(operator, *inputs, axis=-1, epsilon=self.config.norm_eps)

    def enter(self, states: str, name: str, norm: nn.Module) -> str:
        """What a sub-layer reads: the states, normalised with `norm_position="pre"`."""
        return self.norm(states, name, norm) if self.config.norm_position == "pre" else states

    def leave(self, states: str, output: str, name: str, norm: nn.Module) -> str:
        """The residual sum behind a sub-layer, normalised with `norm_position="post"`.

        Not by SkipLayerNormalization, which on the CPU takes four times as long as its parts where there are many
        rows.
        """
        total = self.graph.node("Add", states, output)
        return self.norm(total, name, norm) if self.config.norm_position == "post" else total

    def feed_forward(self, states: str, name: str, mlp: SparseqMLP) -> str:
        """Dense feed-forward layer, plain or gated."""
        activation = self.config.activation_function
        if self.config.gated_ffn:
            gate = self.linear(states, f"{name}.gate_proj", mlp.gate_proj, activation)
            inner = self.graph.node("Mul", gate, self.linear(states, f"{name}.up_proj", mlp.up_proj))
        else:
            inner = self.linear(states, f"{name}.up_proj", mlp.up_proj, activation)
        return self.linear(inner, f"{name}.down_proj", mlp.down_proj)
