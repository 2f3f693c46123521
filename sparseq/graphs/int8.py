"""Linear maps, embeddings and experts in 8 bits."""

import numpy as np

from .activations import write_activation
from .nodes import MICROSOFT, Graph
from .operators import EXPERT_ACTIVATIONS, Experts

# Weights have as many steps on either side of zero.
_STEPS = 127
# What stands for zero where the operator takes unsigned weights.
_ZERO = 128
# Sizes of a block of an expert's weights with one scale: powers of two, within what is fast.
_BLOCKS = (128, 64, 32, 16)


class Int8Operators:
    """Weights in 8 bits, with one scale for each output (experts: for each block of inputs of an output).

    Inputs are rounded to 8 bits as they come: of linear maps with one scale for all rows, of experts with scales for
    each row. Routers, norms and attention stay in float32.
    """

    def linear(
        self, graph: Graph, states: str, name: str, weight: np.ndarray, bias: np.ndarray | None, activation: str = ""
    ) -> str:
        def quantized() -> list[np.ndarray]:
            steps, scales = _quantize(weight)
            return [steps.astype(np.int8).T, scales[:, 0]]

        inputs = list(graph.weights([f"{name}.int8", f"{name}.scales"], quantized))
        if bias is not None:
            inputs += ["", graph.weight(f"{name}.bias", bias)]
        outputs = graph.node("DynamicQuantizeMatMul", states, *inputs, domain=MICROSOFT)
        return write_activation(graph, activation, outputs) if activation else outputs

    def embed(self, graph: Graph, ids: str, name: str, table: np.ndarray, scale: float) -> str:
        def quantized() -> list[np.ndarray]:
            steps, scales = _quantize(table)
            return [_unsigned(steps), scales * np.float32(scale)]

        rows, scales = graph.weights([f"{name}.rows", f"{name}.rows.scales"], quantized)
        # One block is a whole row.
        block = max(1 << (table.shape[1] - 1).bit_length(), 16)
        return graph.node(
            *("GatherBlockQuantized", rows, ids, scales),
            domain=MICROSOFT,
            bits=8,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )

    def expert_activation(self, name: str, gated: bool) -> str | None:
        # The two kinds of GELU differ by much less than 8 bits do.
        known = "gelu" if name in ("gelu", "gelu_python") else EXPERT_ACTIVATIONS.get(name)
        if gated:
            return "swiglu" if known == "silu" else None
        return known

    def experts(self, graph: Graph, states: str, logits: str, experts: Experts, chosen: int, normalized: bool) -> str:
        sizes = (experts.first.shape[2], experts.second.shape[2])
        block = next((size for size in _BLOCKS if not any(width % size for width in sizes)), None)
        inputs = [
            *_expert_inputs(graph, f"{experts.name}.first", experts.first, experts.first_bias, block),
            *_expert_inputs(graph, f"{experts.name}.second", experts.second, experts.second_bias, block),
        ]
        attributes = experts.attributes(chosen, normalized) | {"expert_weight_bits": 8}
        if block:
            attributes["block_size"] = block
        return graph.node("QMoE", states, logits, *inputs, domain=MICROSOFT, **attributes)


def _expert_inputs(
    graph: Graph, name: str, weight: np.ndarray, bias: np.ndarray | None, block: int | None
) -> list[str]:
    def quantized() -> list[np.ndarray]:
        steps, scales = _quantize(weight, block)
        return [_unsigned(steps), scales if block else scales[..., 0]]

    weights = graph.weights([f"{name}.int8", f"{name}.scales"], quantized)
    return [*weights, "" if bias is None else graph.weight(f"{name}.bias", bias)]


def _quantize(weight: np.ndarray, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Round the last dimension of `(..., I)` to whole steps, in blocks of a size or as a whole.

    Returns:
        Steps from -127 to 127, of the same shape, and the size of a step `(..., I / block)`.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, block or weight.shape[-1])
    scales = np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1)) / np.float32(_STEPS)
    # A block of zeros has no scale of its own.
    scales[scales == 0] = 1
    steps = blocks / scales[..., None]
    return np.rint(steps, out=steps).reshape(weight.shape), scales


def _unsigned(steps: np.ndarray) -> np.ndarray:
    steps += _ZERO
    return steps.astype(np.uint8)
