"""Activations of the configuration, by the names that `transformers.activations.ACT2FN` gives them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .nodes import MICROSOFT, Graph


def check_activation(name: str) -> None:
    """Refuse an activation that no graph can express.

    Raises:
        ValueError: names it, and those that can be exported.
    """
    if name not in _WRITERS:
        raise ValueError(
            f"`activation_function` '{name}' has no ONNX graph; graphs know {sorted(_WRITERS)}. Run the model with "
            "PyTorch instead"
        )


def write_activation(graph: Graph, name: str, states: str) -> str:
    """Add the nodes of an activation."""
    return _WRITERS[name](graph, states)


def _number(graph: Graph, value: float) -> str:
    return graph.constant(value, np.float32)


def _clipped_gelu(graph: Graph, states: str) -> str:
    return graph.node("Clip", _gelu(graph, states), _number(graph, -10.0), _number(graph, 10.0))


def _gelu(graph: Graph, states: str) -> str:
    return graph.node("Gelu", states)


def _tanh_gelu(graph: Graph, states: str) -> str:
    return graph.node("Gelu", states, approximate="tanh")


def _laplace(graph: Graph, states: str) -> str:
    """0.5 (1 + erf((x - mu) / (sigma sqrt 2))) of arXiv 2209.10655."""
    shifted = graph.node("Sub", states, _number(graph, 0.707107))
    scaled = graph.node("Div", shifted, _number(graph, 0.282095 * math.sqrt(2.0)))
    raised = graph.node("Add", graph.node("Erf", scaled), _number(graph, 1.0))
    return graph.node("Mul", raised, _number(graph, 0.5))


def _squared_relu(graph: Graph, states: str) -> str:
    positive = graph.node("Relu", states)
    return graph.node("Mul", positive, positive)


def _sigmoid_gate(alpha: float) -> Callable[[Graph, str], str]:
    """x sigmoid(alpha x): SiLU at 1, the quick GELU at 1.702."""
    return lambda graph, states: graph.node("QuickGelu", states, domain=MICROSOFT, alpha=alpha)


def _plain(operator: str, **attributes: Any) -> Callable[[Graph, str], str]:
    return lambda graph, states: graph.node(operator, states, **attributes)


_WRITERS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": _plain("HardSwish"),
    "laplace": _laplace,
    "leaky_relu": _plain("LeakyRelu", alpha=0.01),
    "linear": lambda graph, states: states,
    "mish": _plain("Mish"),
    "quick_gelu": _sigmoid_gate(1.702),
    "relu": _plain("Relu"),
    "relu2": _squared_relu,
    "relu6": lambda graph, states: graph.node("Clip", states, _number(graph, 0.0), _number(graph, 6.0)),
    "sigmoid": _plain("Sigmoid"),
    "silu": _sigmoid_gate(1.0),
    "sqrtsoftplus": lambda graph, states: graph.node("Sqrt", graph.node("Softplus", states)),
    "swish": _sigmoid_gate(1.0),
    "tanh": _plain("Tanh"),
}
