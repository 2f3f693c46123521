"""Unigram language model training (Kudo, 2018, "Subword Regularization", section 3.2), the same on every run.

The trainer of the `tokenizers` library visits its words in the order of a randomly seeded hash map, so its sums, and
with them its scores and ties, differ from one process to the next. This one visits them in sorted order. The model it
trains is the library's own and encodes at the library's speed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EM_STEPS = 2
_KEPT_PER_ROUND = 0.75
# A piece expected less than half a time scores as if it were: a character spelled only inside longer pieces keeps a
# usable score for words not seen in training.
_SMALLEST_COUNT = 0.5


@dataclass
class _Lattices:
    """All segmentations of W strings that have the same length L, over pieces of at most K characters.

    Attributes:
        pieces: `[W, L, K]`; entry `[w, e, k]` is the piece that spells characters `e - k` to `e` of string `w`, or the
            number of pieces where there is none.
        values: `[W]`; how often a word occurs, or which piece the string is.
    """

    pieces: NDArray[np.int32]
    values: NDArray[np.int64]


def train_unigram(
    word_counts: Mapping[str, int],
    size: int,
    *,
    max_piece_length: int = 16,
    min_frequency: int = 2,
    seed_size: int = 1_000_000,
) -> list[tuple[str, float]]:
    """Choose pieces and their log probabilities by expectation maximisation and pruning.

    Args:
        word_counts: How often each pre-tokenized word occurs.
        size: The number of pieces wanted. Every character of the words is one of them.
        max_piece_length: Longest piece, in characters.
        min_frequency: Longer pieces than one character must occur at least this often.
        seed_size: The number of candidates to begin with, the most frequent first.

    Returns:
        At most `size` pairs of piece and natural log probability, the most probable first; fewer where the words do
        not hold that many pieces.

    Raises:
        ValueError: If `size` is less than the number of distinct characters.
    """
    words = sorted(word for word in word_counts if word)
    characters = Counter[str]()
    for word in words:
        for character in word:
            characters[character] += word_counts[word]
    if size < len(characters):
        raise ValueError(f"`size` is {size}, but the words have {len(characters)} distinct characters.")

    seeds = _count_substrings(words, word_counts, max_piece_length, min_frequency)
    longer = sorted(seeds, key=lambda piece: (-seeds[piece] * len(piece), piece))
    pieces = sorted(characters) + longer[: max(0, seed_size - len(characters))]
    weights = [float(characters[piece] or seeds[piece] * len(piece)) for piece in pieces]
    scores = _log_probabilities(np.array(weights))

    index = {piece: number for number, piece in enumerate(pieces)}
    corpus = _build_lattices(words, [word_counts[word] for word in words], index, max_piece_length)
    candidates = _build_lattices(
        pieces[len(characters) :], range(len(characters), len(pieces)), index, max_piece_length
    )
    for lattices in candidates:
        # The whole string is the piece itself; what remains are the ways to spell it with others.
        lattices.pieces[:, -1, lattices.pieces.shape[1] - 1] = len(pieces)

    while True:
        for _ in range(_EM_STEPS):
            expected = _expected_counts(corpus, scores)
            scores = _log_probabilities(expected)
        if len(pieces) <= size:
            break
        kept = max(size, int(len(pieces) * _KEPT_PER_ROUND))
        keep = _pieces_to_keep(candidates, expected, scores, len(characters), kept)
        pieces = [pieces[number] for number in keep]
        corpus, candidates = _renumber(corpus, candidates, keep, len(scores))
        scores = scores[keep]
    return sorted(
        ((piece, round(float(score), 6)) for piece, score in zip(pieces, scores, strict=True)),
        key=lambda pair: (-pair[1], pair[0]),
    )


def _count_substrings(words: list[str], counts: Mapping[str, int], longest: int, least: int) -> dict[str, int]:
    """Count the substrings of 2 to `longest` characters that occur at least `least` times."""
    frequent: dict[str, int] = {}
    shorter: set[str] | None = None
    for length in range(2, longest + 1):
        words = [word for word in words if len(word) >= length]
        found = Counter[str]()
        for word in words:
            for start in range(len(word) - length + 1):
                substring = word[start : start + length]
                # No substring is more frequent than its own beginning, so the rare ones need no counter.
                if shorter is None or substring[:-1] in shorter:
                    found[substring] += counts[word]
        kept = {substring: count for substring, count in found.items() if count >= least}
        if not kept:
            break
        frequent |= kept
        shorter = set(kept)
    return frequent


def _log_probabilities(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.maximum(counts, _SMALLEST_COUNT)
    return np.log(counts) - np.log(counts.sum())


def _build_lattices(
    strings: list[str], values: Iterable[int], index: Mapping[str, int], longest: int
) -> list[_Lattices]:
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for string, value in zip(strings, values, strict=True):
        by_length[len(string)].append((string, value))
    lattices = []
    for length, rows in sorted(by_length.items()):
        width = min(length, longest)
        pieces = np.full((len(rows), length, width), len(index), dtype=np.int32)
        for row, (string, _) in enumerate(rows):
            for end in range(length):
                for back in range(min(width, end + 1)):
                    pieces[row, end, back] = index.get(string[end - back : end + 1], len(index))
        lattices.append(_Lattices(pieces, np.array([value for _, value in rows], dtype=np.int64)))
    return lattices


def _expected_counts(corpus: list[_Lattices], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the words of the posterior probability of each piece (forward-backward)."""
    scores = np.append(scores, -np.inf)
    expected = np.zeros(len(scores))
    for lattices in corpus:
        edges = scores[lattices.pieces]
        number, length, width = edges.shape
        forward = np.zeros((number, length + 1))
        backward = np.zeros((number, length + 1))
        for end in range(length):
            starts = np.maximum(end - np.arange(width), 0)
            forward[:, end + 1] = np.logaddexp.reduce(forward[:, starts] + edges[:, end], axis=1)
        for start in reversed(range(length)):
            backs = np.arange(min(width, length - start))
            ends = start + backs
            backward[:, start] = np.logaddexp.reduce(edges[:, ends, backs] + backward[:, ends + 1], axis=1)
        starts = np.maximum(np.arange(length)[:, None] - np.arange(width), 0)
        posterior = forward[:, starts] + edges + backward[:, 1:, None] - forward[:, -1, None, None]
        weights = np.exp(posterior) * lattices.values[:, None, None]
        expected += np.bincount(lattices.pieces.ravel(), weights.ravel(), minlength=len(scores))
    return expected[:-1]


def _pieces_to_keep(
    candidates: list[_Lattices],
    expected: NDArray[np.float64],
    scores: NDArray[np.float64],
    characters: int,
    kept: int,
) -> NDArray[np.int64]:
    """Choose the pieces whose removal would cost the most likelihood; the first `characters` pieces always stay."""
    scores = np.append(scores, -np.inf)
    loss = np.full(len(expected), np.inf)
    for lattices in candidates:
        edges = scores[lattices.pieces]
        number, length, width = edges.shape
        best = np.zeros((number, length + 1))
        for end in range(length):
            starts = np.maximum(end - np.arange(width), 0)
            best[:, end + 1] = (best[:, starts] + edges[:, end]).max(axis=1)
        own = lattices.values
        loss[own] = expected[own] * (scores[own] - best[:, -1])
    order = np.argsort(-loss[characters:], kind="stable")[: kept - characters] + characters
    return np.concatenate([np.arange(characters), np.sort(order)])


def _renumber(
    corpus: list[_Lattices], candidates: list[_Lattices], keep: NDArray[np.int64], total: int
) -> tuple[list[_Lattices], list[_Lattices]]:
    """Rewrite the piece numbers after pruning, and forget the lattices of the pieces that went."""
    number = np.full(total + 1, len(keep), dtype=np.int32)
    number[keep] = np.arange(len(keep), dtype=np.int32)
    pruned = []
    for lattices in candidates:
        rows = number[lattices.values] < len(keep)
        if rows.any():
            pruned.append(_Lattices(number[lattices.pieces[rows]], number[lattices.values[rows]].astype(np.int64)))
    return [_Lattices(number[lattices.pieces], lattices.values) for lattices in corpus], pruned
