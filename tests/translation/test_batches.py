"""Batches filled by tokens, and windows on a stream."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq.translation.batches import fill_batches, windows


@given(
    st.lists(st.integers(min_value=1, max_value=50), max_size=60),
    st.integers(min_value=1, max_value=200),
    st.integers(min_value=1, max_value=5),
)
def test_batches_hold_each_sentence_once_within_the_budget(lengths: list[int], budget: int, rows: int) -> None:
    batches = list(fill_batches(lengths, budget, rows=rows))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * rows * longest <= budget
    for one, other in itertools.pairwise(batches):
        assert min(lengths[index] for index in one) >= max(lengths[index] for index in other)
        # No batch is closed while the next sentence would have fitted.
        assert (len(one) + 1) * rows * lengths[one[0]] > budget


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_tokens` must be at least 1, but is 0"):
        list(fill_batches([3], 0))


def test_windows_keep_order_and_read_no_further_than_they_need() -> None:
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield f"line {number}"

    endless = windows(stream(), size=7)
    assert next(endless) == [f"line {number}" for number in range(7)]
    assert read == 7
    assert next(endless)[0] == "line 7"
    assert read == 14


def test_windows_grow_to_their_size() -> None:
    assert [len(window) for window in windows(map(str, range(70)), size=20, first=3)] == [3, 6, 12, 20, 20, 9]
    assert [len(window) for window in windows(map(str, range(5000)))] == [256, 512, 1024, 2048, 1160]


@given(st.lists(st.text(alphabet="ab", max_size=9), max_size=40))
def test_windows_are_bounded_in_characters(lines: list[str]) -> None:
    cut = list(windows(lines, size=8, characters=20))
    assert list(itertools.chain(*cut)) == lines
    for window in cut:
        assert 1 <= len(window) <= 8
        assert sum(map(len, window[:-1])) < 20
