"""Weights of attention in the order and the width that the fused operators of ONNX Runtime ask for."""

from collections.abc import Callable

import numpy as np

# GroupQueryAttention takes heads whose width is a multiple of this; others are filled up with zeros, which change no
# product.
_WIDTH = 8


def padded_width(head_dim: int) -> int:
    """The width of a head in the graphs."""
    return -(-head_dim // _WIDTH) * _WIDTH


def head_rows(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a projection's rows `(heads * D, ...)` those of heads of the graphs' width."""

    def pad(rows: np.ndarray) -> np.ndarray:
        head_dim = rows.shape[0] // heads
        # Each half by itself, since rotary positions pair dimension i with i + D/2.
        halves = 1 if head_dim % 2 else 2
        split = rows.reshape(heads, halves, head_dim // halves, *rows.shape[1:])
        missing = (padded_width(head_dim) - head_dim) // halves
        filled = np.pad(split, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return filled.reshape(-1, *rows.shape[1:])

    return pad


def grouped_rows(heads: int, kv_heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """As `head_rows`, the query heads ordered by their place in a group, then by group.

    In that order the query heads that share a key-value head follow each other as further queries of that head:
    `(L, heads * P)` read as `(L * heads / kv_heads, kv_heads * P)` is multi-head attention of `kv_heads` heads.
    """

    def reorder(rows: np.ndarray) -> np.ndarray:
        padded = head_rows(heads)(rows)
        split = padded.reshape(kv_heads, heads // kv_heads, -1, *rows.shape[1:])
        return split.swapaxes(0, 1).reshape(padded.shape)

    return reorder
