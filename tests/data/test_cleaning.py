"""Defects: each is found where it is, counted as a slow reference counts, and treated as asked."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq.data.cleaning import Defect, Inspector, Policy
from sparseq.data.parallel import ParallelText, read_pairs
from sparseq.data.sources import FilePair, Side
from sparseq.data.store import Store

PAIRS: list[tuple[str | bytes | None, str | bytes | None]] = [
    ("one", "eins"),  # 1
    ("", "zwei"),  # 2 empty source
    ("three", None),  # 3 empty target
    (b"f\xfcnf", "five"),  # 4 not UTF-8
    ("fünf", "f\ufffdnf"),  # 5 replacement character
    ("six", " six "),  # 6 identical
    ("one", "eins"),  # 7 duplicate of 1
    ("one", "uno"),  # 8
    ("six", " six "),  # 9 identical, duplicate of 6
    (" ", "\u3000"),  # 10 both empty
    ("one", "eins"),  # 11 duplicate of 1
]
LINES = {
    "not_utf8": (4,),
    "empty_source": (2, 10),
    "empty_target": (3, 10),
    "replacement_character": (5,),
    "identical": (6, 9),
    "duplicate": (7, 9, 11),
}


class Listed:
    """A source of pairs that are in memory."""

    name, unit, files, options = "the list", "line", {"list": "0"}, {}  # type: ignore[var-annotated]

    def __init__(self, pairs: list[Any], size: int = 3) -> None:
        self.pairs, self.size = pairs, size

    def batches(self) -> Iterator[tuple[Side, Side]]:
        for start in range(0, len(self.pairs), self.size):
            sources, targets = zip(*self.pairs[start : start + self.size], strict=True)
            yield sources, targets


def read(policy: Policy, pairs: list[Any] = PAIRS, **options: Any) -> ParallelText:
    return read_pairs(Listed(pairs), "train", policy, **options)


def numbers(text: ParallelText) -> list[int]:
    return [text.line(row) for row in range(len(text))]


def test_the_defaults_leave_out_what_cannot_be_trained_on() -> None:
    text = read(Policy(not_utf8="skip"))
    assert numbers(text) == [1, 5, 6, 7, 8, 9, 11]
    assert {kind: defect.lines for kind, defect in text.report.defects.items()} == LINES
    assert {kind: defect.count for kind, defect in text.report.defects.items()} == {
        k: len(v) for k, v in LINES.items()
    }
    assert (text.report.pairs, text.report.kept) == (11, 7)
    assert list(text.sources) == ["one", "fünf", "six", "one", "one", "six", "one"]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("empty", [1, 5, 6, 7, 8, 9, 11]),
        ("replacement_character", [1, 2, 3, 6, 7, 8, 9, 10, 11]),
        ("identical", [1, 2, 3, 5, 7, 8, 10, 11]),
        # Of repeated pairs the first stays.
        ("duplicate", [1, 2, 3, 5, 6, 8, 10]),
    ],
)
def test_each_kind_is_left_out_alone(kind: str, left: list[int], on_disk: bool, tmp_path: Path) -> None:
    keep_all: dict[str, Any] = {"empty": "keep", "not_utf8": "skip"}
    text = read(Policy(**keep_all | {kind: "skip"}), store=Store(tmp_path) if on_disk else None)
    assert numbers(text) == left
    found = {key: defect.lines for key, defect in text.report.defects.items()}
    # Skipped pairs are no repetitions of each other.
    expected = LINES | ({"duplicate": (7, 11)} if kind == "identical" else {})
    assert found == expected


@pytest.mark.parametrize("kind", ["empty", "not_utf8", "replacement_character", "identical", "duplicate"])
def test_each_kind_is_refused_with_counts_and_lines(kind: str, tmp_path: Path) -> None:
    actions: dict[str, Any] = {"not_utf8": "skip"} | {kind: "refuse"}
    first = LINES["empty_source" if kind == "empty" else kind]
    number = f"{len(first)} pair"
    lines = ", ".join(map(str, first))
    with pytest.raises(ValueError, match=rf"the list: refused.* {number}.*lines? {lines}.*data\.if_{kind}=skip"):
        read(Policy(**actions), store=Store(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_evaluation_keeps_every_line_whatever_training_does() -> None:
    pairs = [pair for pair in PAIRS if not isinstance(pair[0], bytes)]
    actions: dict[str, Any] = dict.fromkeys(["empty", "replacement_character", "identical", "duplicate"], "skip")
    text = read(Policy(**actions, too_long="skip", unbalanced="skip").for_evaluation(), pairs)
    assert len(text) == len(pairs)
    assert list(text.targets) == [target or "" for _, target in pairs]
    assert text.report.count("duplicate") == 3
    assert Policy(unbalanced="refuse", too_long="refuse").for_evaluation() == Policy().for_evaluation()


def test_only_the_first_lines_are_listed() -> None:
    inspector = Inspector(Policy(), "text")
    inspector.inspect([""] * 9, ["x"] * 9)
    inspector.finish([])
    assert inspector.defects == {"empty_source": Defect(9, (1, 2, 3, 4, 5), "skip")}
    text = read(Policy(), [("a", "b")] * 30)
    assert str(text.report).splitlines()[1] == (
        "  29 pairs that repeat an earlier pair (kept): lines 2, 3, 4, 5, 6, ..."
    )


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b", "c\ufffd"]), st.sampled_from(["", " ", "a", "b"])), min_size=1)
)
def test_counts_are_those_of_a_slow_reference(pairs: list[tuple[str, str]]) -> None:
    expected: Counter[str] = Counter()
    kept = []
    for row, (source, target) in enumerate(pairs):
        empty = [name for name, side in (("empty_source", source), ("empty_target", target)) if not side.strip()]
        expected.update(empty)
        if empty:
            continue
        expected["replacement_character"] += "\ufffd" in source + target
        expected["identical"] += source == target
        expected["duplicate"] += (source, target) in pairs[:row]
        if (source, target) not in pairs[:row]:
            kept.append((source, target))
    policy = Policy(duplicate="skip")
    if not kept:
        with pytest.raises(ValueError, match="nothing to train on"):
            read(policy, pairs)
        return
    text = read(policy, pairs)
    assert {kind: defect.count for kind, defect in text.report.defects.items()} == dict(+expected)
    assert list(zip(text.sources, text.targets, strict=True)) == kept


def test_the_first_pairs_of_a_large_text(tmp_path: Path) -> None:
    pairs = [(f"s{row}", f"t{row}") for row in range(10)]
    for limit in (1, 3, 4, 9, 10, 11):
        text = read(Policy(), pairs, max_pairs=limit, store=Store(tmp_path))
        assert list(text.sources) == [f"s{row}" for row in range(min(limit, 10))]
        assert text.report.pairs == min(limit, 10)


def test_bytes_that_are_not_utf8_are_skipped_on_either_side(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"a\nb\xff\nc\nd\n")
    (tmp_path / "a.de").write_bytes(b"x\ny\nz\xfc\nu\n")
    source = FilePair(tmp_path / "a.en", tmp_path / "a.de", refuse_bytes=False)
    text = read_pairs(source, "train", Policy(not_utf8="skip"))
    assert list(zip(text.sources, text.targets, strict=True)) == [("a", "x"), ("d", "u")]
    assert text.report.defects["not_utf8"] == Defect(2, (2, 3), "skip")
