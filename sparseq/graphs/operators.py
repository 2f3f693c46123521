"""Linear maps, embeddings and experts in float32: what the int8 graphs write otherwise."""

from typing import Protocol

import numpy as np

from .activations import write_activation
from .nodes import MICROSOFT, Graph


class Operators(Protocol):
    """How a graph computes with large weights. Names are those of the weights in the file."""

    def linear(
        self, graph: Graph, states: str, name: str, weight: np.ndarray, bias: np.ndarray | None, activation: str = ""
    ) -> str:
        """Map `(N, I)` to `(N, O)` by a weight `(O, I)`, and apply an activation of the configuration's names."""
        ...

    def embed(self, graph: Graph, ids: str, name: str, table: np.ndarray, scale: float) -> str:
        """Rows of a table `(V, H)`, times `scale`."""
        ...


class FloatOperators:
    """All in float32."""

    def linear(
        self, graph: Graph, states: str, name: str, weight: np.ndarray, bias: np.ndarray | None, activation: str = ""
    ) -> str:
        inputs = [states, graph.weight(name, weight)]
        if bias is not None:
            inputs.append(graph.weight(f"{name}.bias", bias))
        if activation == "relu":
            return graph.node("FusedGemm", *inputs, domain=MICROSOFT, transB=1, activation="Relu")
        outputs = graph.node("Gemm", *inputs, transB=1)
        return write_activation(graph, activation, outputs) if activation else outputs

    def embed(self, graph: Graph, ids: str, name: str, table: np.ndarray, scale: float) -> str:
        rows = graph.node("Gather", graph.weight(name, table), ids)
        return rows if scale == 1.0 else graph.node("Mul", rows, graph.constant(scale, np.float32))
