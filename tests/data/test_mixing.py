"""Several language pairs as one training set: shares follow the temperature, and nothing is left out."""

from collections import Counter

import numpy as np
import pytest

from sparseq.data.collation import TokenizedPairs
from sparseq.data.mixing import MixedPairs, repetitions


def part(first: int, size: int) -> TokenizedPairs:
    rows = [[first + row, *[1] * (row % 5), 2] for row in range(size)]
    return TokenizedPairs(rows, rows[::-1])


def test_without_temperature_it_is_the_parts_in_order() -> None:
    parts = [part(100, 7), part(200, 1), part(300, 12)]
    mixed = MixedPairs(parts)
    expected = [item[row] for item in parts for row in range(len(item))]
    assert [mixed[row] for row in range(len(mixed))] == expected
    order = np.random.default_rng(0).permutation(20).tolist()
    assert mixed.__getitems__(order) == [expected[row] for row in order]
    assert mixed.source_lengths.tolist() == [len(item["input_ids"]) for item in expected]
    assert mixed.target_lengths.tolist() == [len(item["labels"]) for item in expected]


@pytest.mark.parametrize("temperature", [1.0, 1.5, 3.0, 100.0])
def test_shares_follow_the_formula(temperature: float) -> None:
    sizes = [1000, 90, 400]
    mixed = MixedPairs([part(10_000 * i, size) for i, size in enumerate(sizes)], temperature=temperature)
    seen = Counter(mixed[row]["input_ids"][0] for row in range(len(mixed)))
    weights = [size ** (1 / temperature) for size in sizes]
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        times = [seen[10_000 * number + row] for row in range(size)]
        assert sum(times) / len(mixed) == pytest.approx(weight / sum(weights), rel=2e-3)
        # Evenly: no sentence comes two times more often than another, none is left out.
        assert min(times) >= 1
        assert max(times) - min(times) <= 1


def test_the_seed_chooses_what_comes_once_more() -> None:
    parts = [part(0, 100), part(1000, 30)]

    def rows(seed: int) -> list[int]:
        mixed = MixedPairs(parts, temperature=1.3, seed=seed)
        return [mixed[row]["input_ids"][0] for row in range(len(mixed))]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert len(rows(1)) == len(rows(2))


def test_repetitions_are_at_least_one() -> None:
    assert repetitions([10, 1000], 1.0).tolist() == [1.0, 1.0]
    assert repetitions([10, 1000], 2.0) == pytest.approx([10.0, 1.0])
    with pytest.raises(ValueError, match=r"`temperature` must be at least 1, but is 0\.5"):
        repetitions([1, 2], 0.5)
