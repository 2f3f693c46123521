"""The unigram trainer against sums over all segmentations, written out."""

import math
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from sparseq.training.unigram import (
    _build_lattices,
    _count_substrings,
    _expected_counts,
    _pieces_to_keep,
    train_unigram,
)


def segmentations(word: str, pieces: set[str]) -> Iterator[list[str]]:
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in pieces:
            for rest in segmentations(word[end:], pieces):
                yield [word[:end], *rest]


@pytest.fixture
def model() -> tuple[dict[str, int], list[str], np.ndarray]:
    """Random words, and pieces with random log probabilities: the 3 characters first, then longer ones."""
    generator = random.Random(1)
    words = {"".join(generator.choices("abc", k=generator.randint(1, 6))): generator.randint(1, 9) for _ in range(20)}
    longer = sorted({word[start : start + size] for word in words for size in (2, 3, 4) for start in range(3)})
    longer = [piece for piece in longer if len(piece) > 1 and generator.random() < 0.6]
    pieces = ["a", "b", "c", *longer]
    scores = np.log(np.random.default_rng(2).dirichlet(np.ones(len(pieces))))
    return words, pieces, scores


def test_expected_counts(model: tuple[dict[str, int], list[str], np.ndarray]) -> None:
    words, pieces, scores = model
    index = {piece: number for number, piece in enumerate(pieces)}
    expected = np.zeros(len(pieces))
    for word, count in words.items():
        cuts = list(segmentations(word, set(pieces)))
        weights = [math.exp(sum(scores[index[piece]] for piece in cut)) for cut in cuts]
        for cut, weight in zip(cuts, weights, strict=True):
            for piece in cut:
                expected[index[piece]] += count * weight / sum(weights)
    lattices = _build_lattices(list(words), words.values(), index, longest=4)
    np.testing.assert_allclose(_expected_counts(lattices, scores), expected, rtol=1e-10)


def test_pruning_drops_what_costs_least(model: tuple[dict[str, int], list[str], np.ndarray]) -> None:
    _, pieces, scores = model
    index = {piece: number for number, piece in enumerate(pieces)}
    expected = np.random.default_rng(3).uniform(1, 9, len(pieces))
    loss = {}
    for piece in pieces[3:]:
        others = segmentations(piece, set(pieces) - {piece})
        best = max(sum(scores[index[part]] for part in cut) for cut in others)
        loss[piece] = expected[index[piece]] * (scores[index[piece]] - best)
    survivors = {"a", "b", "c", *sorted(loss, key=lambda piece: -loss[piece])[:5]}

    lattices = _build_lattices(pieces[3:], range(3, len(pieces)), index, longest=4)
    for one in lattices:
        one.pieces[:, -1, -1] = len(pieces)
    keep = _pieces_to_keep(lattices, expected, scores, characters=3, kept=8)
    assert {pieces[number] for number in keep} == survivors


@pytest.mark.parametrize(("longest", "least"), [(2, 1), (4, 2), (16, 5)])
def test_substring_counts(longest: int, least: int) -> None:
    generator = random.Random(4)
    words = {"".join(generator.choices("ab", k=generator.randint(1, 8))): generator.randint(1, 4) for _ in range(30)}
    plain = Counter[str]()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + longest) + 1):
                plain[word[start:end]] += count
    expected = {substring: count for substring, count in plain.items() if count >= least}
    assert _count_substrings(sorted(words), words, longest, least) == expected


def test_frequent_words_become_pieces() -> None:
    pieces = dict(train_unigram({"walks": 50, "walk": 40, "talks": 30, "stalk": 1}, size=12))
    assert len(pieces) == 12
    assert set("walkst") <= set(pieces)
    assert {"walks", "walk", "talks"} <= set(pieces)
    assert sum(math.exp(score) for score in pieces.values()) == pytest.approx(1.0, abs=1e-4)


def test_order_of_the_words_does_not_matter() -> None:
    words = {"".join(random.choices("abcd", k=5)): 2 for _ in range(200)}
    shuffled = dict(random.sample(sorted(words.items()), len(words)))
    assert train_unigram(words, 40) == train_unigram(shuffled, 40)


def test_no_room_for_the_characters() -> None:
    with pytest.raises(ValueError, match="`size` is 2, but the words have 3 distinct characters"):
        train_unigram({"abc": 1}, size=2)
