"""Positions as nodes of a graph: exact for any length, since no table bounds them."""

import math
from typing import NamedTuple

import numpy as np
import torch
from onnx import helper
from torch import nn

from ..modeling_sparseq import SparseqLearnedPositions, SparseqRotaryEmbedding, SparseqSinusoidalPositions
from .heads import padded_width
from .nodes import MICROSOFT, Graph


class Rotary(NamedTuple):
    """Cosines and sines `(L, P / 2)`, and which row of them each token takes: `(B, L)`, or `(1,)` the first row."""

    cos: str
    sin: str
    rows: str

    def apply(self, graph: Graph, states: str, heads: int) -> str:
        """Rotate `(B, L, heads * P)`."""
        return graph.node("RotaryEmbedding", states, self.rows, self.cos, self.sin, domain=MICROSOFT, num_heads=heads)


def position_vectors(graph: Graph, positions: nn.Module, name: str, ids: str) -> str:
    """Vectors `(L, H)` of absolute positions `(L,)`."""
    if isinstance(positions, SparseqLearnedPositions):
        # The first rows are before position 0.
        table = positions.weight.detach().float().numpy()[positions.offset :]
        return graph.node("Gather", graph.weight(f"{name}.{positions.offset}", table), ids)
    assert isinstance(positions, SparseqSinusoidalPositions)
    exponents = np.arange(positions.pairs, dtype=np.float64) / positions.steps
    frequencies, phases = np.power(10_000.0, -exponents), np.zeros(positions.pairs)
    # A cosine is a sine a quarter further on. In double precision, as in the model.
    angles = np.stack([frequencies, frequencies])
    quarters = np.stack([phases, phases + math.pi / 2]) + positions.offset * angles
    if positions.interleaved:
        angles, quarters = angles.T, quarters.T
    moved = graph.node("Unsqueeze", graph.node("Cast", ids, to=_type(np.float64)), graph.constant([1]))
    turned = graph.node("Mul", moved, graph.constant(angles.reshape(-1), np.float64))
    sines = graph.node("Sin", graph.node("Add", turned, graph.constant(quarters.reshape(-1), np.float64)))
    return graph.node("Cast", sines, to=_type(np.float32))


def rotary_tables(graph: Graph, rotary: SparseqRotaryEmbedding, ids: str, rows: str) -> Rotary:
    """Cosines and sines of positions `(L,)`; `rows` says which of them each token takes."""
    exponents = torch.arange(0, rotary.head_dim, 2, dtype=torch.float32) / rotary.head_dim
    frequencies = torch.pow(rotary.theta, -exponents).numpy()
    # What fills up a head is not turned.
    frequencies = np.pad(frequencies, (0, (padded_width(rotary.head_dim) - rotary.head_dim) // 2))
    moved = graph.node("Unsqueeze", graph.node("Cast", ids, to=_type(np.float32)), graph.constant([1]))
    if rotary.factor != 1.0:
        moved = graph.node("Div", moved, graph.constant(rotary.factor, np.float32))
    # Angles in float32, as in the model; their cosines in double precision, which is exact for any angle.
    angles = graph.node("Mul", moved, graph.constant(frequencies, np.float32))
    angles = graph.node("Cast", angles, to=_type(np.float64))
    cos, sin = (graph.node("Cast", graph.node(name, angles), to=_type(np.float32)) for name in ("Cos", "Sin"))
    return Rotary(cos, sin, rows)


def _type(dtype: type) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
