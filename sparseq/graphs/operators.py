"""Linear maps, embeddings and experts in float32: what the int8 graphs write otherwise."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from .activations import write_activation
from .nodes import MICROSOFT, Graph


class Experts(NamedTuple):
    """The stacked experts of one layer.

    Attributes:
        name: Of their weights.
        activation: As ONNX Runtime names it: "swiglu" is a gated SiLU.
        first, first_bias: `(E, F, H)` and `(E, F)`; of gated experts `(E, 2F, H)` and `(E, 2F)`, gate and up in turn.
        second, second_bias: `(E, H, F)` and `(E, H)`.
    """

    name: str
    activation: str
    first: np.ndarray
    first_bias: np.ndarray | None
    second: np.ndarray
    second_bias: np.ndarray | None

    def attributes(self, chosen: int, normalized: bool) -> dict[str, Any]:
        """What all operators of ONNX Runtime for experts are told."""
        gate = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        return {
            "k": chosen,
            "activation_type": self.activation,
            "normalize_routing_weights": int(normalized),
            **(gate if self.activation == "swiglu" else {}),
        }


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

    def expert_activation(self, name: str, gated: bool) -> str | None:
        """What `experts` is to be told for an activation of the configuration's names; None where it lacks it."""
        ...

    def experts(self, graph: Graph, states: str, logits: str, experts: Experts, chosen: int, normalized: bool) -> str:
        """The weighted sum of the outputs of each token's experts, `(N, H)` to the same shape.

        Args:
            logits: `(N, E)`; each token goes to the `chosen` experts with the highest.
            normalized: Weigh them by the softmax over the chosen, not over all.
        """
        ...


# ONNX Runtime's names for the activations that its operators for experts know. Its "gelu" is the one by tanh.
EXPERT_ACTIVATIONS = {
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "linear": "identity",
    "relu": "relu",
}


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

    def expert_activation(self, name: str, gated: bool) -> str | None:
        known = EXPERT_ACTIVATIONS.get(name)
        if gated:
            return "swiglu" if known == "silu" else None
        return known

    def experts(self, graph: Graph, states: str, logits: str, experts: Experts, chosen: int, normalized: bool) -> str:
        inputs = [
            "" if array is None else graph.weight(f"{experts.name}.{part}", array)
            for part, array in zip(experts._fields[2:], experts[2:], strict=True)
        ]
        attributes = experts.attributes(chosen, normalized)
        return graph.node("MoE", states, logits, *inputs, domain=MICROSOFT, **attributes)
