"""Attention as nodes of a graph, by the fused operators of ONNX Runtime."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..modeling_sparseq import SparseqAttention
from .heads import grouped_rows, head_rows, padded_width
from .layers import Layers, Projection, parameters_of
from .nodes import MICROSOFT
from .positions import Rotary

# Added to the scores of padding: large enough that the softmax makes them zero, and finite.
HIDDEN = -1e30


class Shape(NamedTuple):
    """Heads of an attention: A, K, D and P."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int

    @classmethod
    def of(cls, attention: SparseqAttention) -> "Shape":
        heads = attention.q_proj.out_features // attention.head_dim
        return cls(
            heads, heads // attention.num_key_value_groups, attention.head_dim, padded_width(attention.head_dim)
        )


class SourceAttention:
    """Attention over the source, in the encoder's layers and the decoder's.

    Query heads that share a key-value head are taken for further queries of that head, and so are the beams of one
    source: `MultiHeadAttention` of K heads, over `(B, queries, K * P)`, serves all of them, and keys and values are
    never repeated.

    Args:
        layers: Writes the linear layers.
        mask: Name of the source mask `(B, S)` int32.
    """

    def __init__(self, layers: Layers, mask: str):
        self.layers = layers
        self.graph = layers.graph
        self.mask = mask
        self._batch = self.graph.node("Shape", mask, start=0, end=1)
        self._shapes: dict[tuple[int, ...], str] = {}

    def by_source(self, states: str, *dims: int) -> str:
        """Reshape `(N, ...)` to `(B, -1, *dims)`."""
        if dims not in self._shapes:
            self._shapes[dims] = self.graph.node("Concat", self._batch, self.graph.constant([-1, *dims]), axis=0)
        return self.graph.node("Reshape", states, self._shapes[dims])

    def encode(self, states: str, name: str, attention: SparseqAttention, rotary: Rotary | None) -> str:
        """Self-attention of the encoder: `(N, H)` to the same shape."""
        graph, (heads, kv_heads, _, width) = self.graph, Shape.of(attention)
        projections = [
            Projection(f"{name}.q_proj", attention.q_proj, grouped_rows(heads, kv_heads)),
            Projection(f"{name}.k_proj", attention.k_proj, head_rows(kv_heads)),
            Projection(f"{name}.v_proj", attention.v_proj, head_rows(kv_heads)),
        ]
        states = self.layers.fused(states, f"{name}.qkv", projections)
        if rotary is None:
            sizes = graph.constant([heads * width, kv_heads * width, kv_heads * width])
            query, key, value = graph.node_of_many("Split", states, sizes, outputs=3, axis=-1)
        else:
            sizes = graph.constant([(heads + kv_heads) * width, kv_heads * width])
            turned, value = graph.node_of_many("Split", states, sizes, outputs=2, axis=-1)
            turned = rotary.apply(graph, self.by_source(turned, (heads + kv_heads) * width), heads + kv_heads)
            sizes = graph.constant([heads * width, kv_heads * width])
            query, key = graph.node_of_many("Split", turned, sizes, outputs=2, axis=-1)
        query, key, value = (self.by_source(part, kv_heads * width) for part in (query, key, value))
        return self.attend(query, key, value, name, attention)

    def query(self, states: str, name: str, attention: SparseqAttention) -> str:
        """Queries `(B, beams * A / K, K * P)` of the decoder for the source."""
        heads, kv_heads, _, width = Shape.of(attention)
        projection = Projection(f"{name}.q_proj", attention.q_proj, grouped_rows(heads, kv_heads))
        return self.by_source(self.layers.fused(states, f"{name}.q", [projection]), kv_heads * width)

    def attend(self, query: str, key: str, value: str, name: str, attention: SparseqAttention) -> str:
        """Attention's output `(N, H)`, of keys and values `(B, S, K * P)` or `(B, K, S, P)`."""
        heads, kv_heads, head_dim, width = Shape.of(attention)
        states = self.graph.node(
            *("MultiHeadAttention", query, key, value, "", self.mask),
            domain=MICROSOFT,
            num_heads=kv_heads,
            scale=head_dim**-0.5,
            mask_filter_value=HIDDEN,
        )
        states = self.graph.node("Reshape", states, self.graph.constant([-1, heads * width]))
        return _project_out(self.layers, states, name, attention, grouped_rows(heads, kv_heads))

    def weights(self, query: str, key: str, attention: SparseqAttention) -> str:
        """Cross-attention weights `(R, S)`, the mean over heads."""
        graph, (heads, kv_heads, head_dim, width) = self.graph, Shape.of(attention)
        groups = heads // kv_heads
        split = self.by_source(query, kv_heads, width)
        keys = graph.node("Transpose", key, perm=[0, 1, 3, 2])
        scores = graph.node("MatMul", graph.node("Transpose", split, perm=[0, 2, 1, 3]), keys)
        scores = graph.node("Mul", scores, graph.constant(head_dim**-0.5, np.float32))
        hidden = graph.node("Equal", self.mask, graph.constant(0, np.int32))
        hidden = graph.node("Unsqueeze", hidden, graph.constant([1, 2]))
        scores = graph.node("Where", hidden, graph.constant(HIDDEN, np.float32), scores)
        means = graph.node("ReduceMean", graph.node("Softmax", scores, axis=-1), graph.constant([1]), keepdims=0)
        length = graph.node("Shape", self.mask, start=1, end=2)
        by_row = graph.node("Concat", graph.constant([-1, groups]), length, axis=0)
        return graph.node("ReduceMean", graph.node("Reshape", means, by_row), graph.constant([1]), keepdims=0)


class TargetAttention:
    """The decoder's self-attention with its cache.

    Args:
        layers: Writes the linear layers.
        rows: The shape `(R, T, -1)`.
        past_lengths: `(R,)` int32, how many slots of the cache are looked at, but one.
        total_length: `(1,)` int32, the largest of them and one.
        slot_bias: What is added to the scores of each slot, `(1, 1, 1, total)`; empty for nothing.
        rotary: Cosines and sines, where positions are rotary.
    """

    def __init__(
        self, layers: Layers, rows: str, past_lengths: str, total_length: str, slot_bias: str, rotary: Rotary | None
    ):
        self.layers = layers
        self.rows = rows
        self.past_lengths = past_lengths
        self.total_length = total_length
        self.slot_bias = slot_bias
        self.rotary = rotary

    def __call__(
        self, states: str, name: str, attention: SparseqAttention, past: Sequence[str]
    ) -> tuple[str, str, str]:
        """Causal self-attention.

        Args:
            states: `(N, H)`.
            name: Of the module.
            attention: The module.
            past: Keys and values `(R, K, past, P)`; empty names where there are none.

        Returns:
            States `(N, H)`, keys and values with those of the new tokens.
        """
        graph, (heads, kv_heads, head_dim, width) = self.layers.graph, Shape.of(attention)
        projections = [
            Projection(f"{name}.{part}_proj", getattr(attention, f"{part}_proj"), head_rows(number))
            for part, number in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        ]
        query = graph.node("Reshape", self.layers.fused(states, f"{name}.qkv", projections), self.rows)
        key = value = ""
        if self.rotary is not None:
            sizes = graph.constant([(heads + kv_heads) * width, kv_heads * width])
            turned, value = graph.node_of_many("Split", query, sizes, outputs=2, axis=-1)
            turned = self.rotary.apply(graph, turned, heads + kv_heads)
            sizes = graph.constant([heads * width, kv_heads * width])
            query, key = graph.node_of_many("Split", turned, sizes, outputs=2, axis=-1)
        # Between them are rotary tables, which this has applied already, and positions of them.
        bias = ("", "", "", self.slot_bias) if self.slot_bias else ()
        states, keys, values = graph.node_of_many(
            *("GroupQueryAttention", query, key, value, *past, self.past_lengths, self.total_length, *bias),
            outputs=3,
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=head_dim**-0.5,
        )
        states = graph.node("Reshape", states, graph.constant([-1, heads * width]))
        return _project_out(self.layers, states, name, attention, head_rows(heads)), keys, values


def _project_out(
    layers: Layers, states: str, name: str, attention: SparseqAttention, arrange: Callable[[np.ndarray], np.ndarray]
) -> str:
    """The output projection of heads that were arranged so."""
    weight, bias = parameters_of(attention.out_proj, f"{name}.out_proj")
    return layers.operators.linear(layers.graph, states, f"{name}.out_proj", arrange(weight.T).T, bias)
