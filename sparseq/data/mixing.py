"""Several language pairs in one training set, the smaller ones repeated as a temperature asks."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset


class Pairs(Protocol):
    """A dataset of sources and targets as ids; `source_lengths[i]` and `target_lengths[i]` are tokens of pair i."""

    @property
    def source_lengths(self) -> Sequence[int] | np.ndarray: ...
    @property
    def target_lengths(self) -> Sequence[int] | np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of several pairs."""
        ...


class MixedPairs(Dataset[dict[str, list[int]]]):
    """Datasets of several language pairs, or of plain text of several languages, as one.

    Pair `l` with `n_l` sentences is drawn in proportion to `n_l^(1/T)` (Arivazhagan et al. 2019, arXiv 1907.05019).
    Nothing is left out: an epoch has every sentence of the pair that is repeated least once, and sentences of the
    others so many times that the proportions hold. Where that is no whole number, some sentences, chosen by `seed`,
    come once more than others.

    Args:
        parts: The datasets.
        temperature: T, at least 1. At 1 an epoch has every sentence once, in the order of `parts`.
        seed: Chooses what is repeated once more.

    Attributes:
        source_lengths, target_lengths: Lengths in tokens, as of `TokenizedPairs`.
    """

    def __init__(self, parts: Sequence[Pairs], *, temperature: float = 1.0, seed: int = 0) -> None:
        self.parts: list[Any] = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        generator = np.random.default_rng([seed])
        repeated, copies = [], []
        for part, start, times in zip(
            parts, self._starts, repetitions([len(p) for p in parts], temperature), strict=False
        ):
            whole, rest = divmod(round(times * len(part)), len(part))
            rows = np.tile(np.arange(len(part)), whole)
            extra = np.sort(generator.permutation(len(part))[:rest])
            repeated.append(start + np.concatenate([rows, extra]))
            copies.append(np.concatenate([np.repeat(np.arange(whole), len(part)), np.full(rest, whole)]))
        self._rows, self._copies = np.concatenate(repeated), np.concatenate(copies)
        self.source_lengths = np.concatenate([part.source_lengths for part in parts])[self._rows]
        self.target_lengths = np.concatenate([part.target_lengths for part in parts])[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Tell those parts that are made anew in every epoch which one it is."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """Several pairs at once, which is how a `DataLoader` asks for a batch."""
        rows, copies = self._rows[np.asarray(indices)], self._copies[np.asarray(indices)]
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        items: list[dict[str, list[int]]] = [{} for _ in indices]
        for owner in np.unique(owners):
            positions = np.flatnonzero(owners == owner)
            part, numbers = self.parts[owner], rows[positions] - self._starts[owner]
            if hasattr(part, "set_epoch"):
                # What is made anew is another one in each copy.
                numbers = numbers + copies[positions] * len(part)
            found = part.__getitems__(numbers.tolist())
            for position, item in zip(positions, found, strict=True):
                items[position] = item
        return items


def repetitions(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """How often an epoch has each sentence of each pair, on average: at least once, and in all so often that pair `l`
    comes in proportion to `sizes[l] ** (1 / temperature)`.

    Raises:
        ValueError: `temperature` is below 1.
    """
    if temperature < 1:
        raise ValueError(f"`temperature` must be at least 1, but is {temperature}.")
    per_sentence = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature - 1.0)
    return per_sentence / per_sentence.min()
