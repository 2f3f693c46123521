"""Long texts are cut where it hurts least."""

# ruff: noqa: RUF001 (marks of other scripts look like ours, and are not the same)

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq.translation import sentences as sentences_module
from sparseq.translation.sentences import sentences, split_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rains. He ran! Why? Nobody knows…", ["It rains. ", "He ran! ", "Why? ", "Nobody knows…"]),
        ('She said: "Go home." Then (at last!) he went.', ['She said: "Go home." ', "Then (at last!) he went."]),
        ("今日は雨です。「帰ろう。」と言った。", ["今日は雨です。", "「帰ろう。」", "と言った。"]),
        ("真的吗？！是的。", ["真的吗？！", "是的。"]),
        ("Er heißt J. Smith. Sie kam um 3.30 Uhr.", ["Er heißt J. Smith. ", "Sie kam um 3.30 Uhr."]),
        ("Obst, z. B. Äpfel, ist gesund. Ja.", ["Obst, z. B. Äpfel, ist gesund. ", "Ja."]),
        ("Das kostet ca. zwei Euro. Gut.", ["Das kostet ca. zwei Euro. ", "Gut."]),
        ("هل تمطر؟ نعم.", ["هل تمطر؟ ", "نعم."]),
        ("no mark at all", ["no mark at all"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def at_most(limit: int) -> Callable[[str], bool]:
    return lambda text: len(text) <= limit


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (80, ["A man walks. A dog runs after him, and a child laughs."]),
        (42, ["A man walks.", "A dog runs after him, and a child laughs."]),
        (34, ["A man walks.", "A dog runs after him,", "and a child laughs."]),
        (15, ["A man walks.", "A dog runs", "after him,", "and a child", "laughs."]),
    ],
)
def test_the_best_place_that_fits_is_taken(limit: int, expected: list[str]) -> None:
    assert split_text("A man walks. A dog runs after him, and a child laughs.", at_most(limit)) == expected


def test_a_long_word_is_cut_but_no_accent_from_its_letter() -> None:
    word = "e\u0301" * 20
    pieces = split_text(word, at_most(7))
    assert "".join(pieces) == word
    assert all(len(piece) <= 7 and piece[0] == "e" for piece in pieces)


@given(st.text(alphabet="ab .,!?。，\n", max_size=120), st.integers(min_value=1, max_value=30))
def test_nothing_is_lost_but_blanks_and_all_pieces_fit(text: str, limit: int) -> None:
    pieces = split_text(text, at_most(limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece) <= limit for piece in pieces)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1), st.integers(min_value=5, max_value=30))
def test_pieces_are_filled(words: list[str], limit: int) -> None:
    pieces = split_text(" ".join(words), at_most(limit))
    for piece, following in itertools.pairwise(pieces):
        assert len(piece) + 1 + len(following.split()[0]) > limit


def test_what_is_looked_at_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    ends_sentence = sentences_module._ends_sentence

    def spy(before: str, after: str) -> bool:
        seen.append(len(before) + len(after))
        return ends_sentence(before, after)

    monkeypatch.setattr(sentences_module, "_ends_sentence", spy)
    # No mark but the last two ends a sentence: a lower-case letter follows, or a single one stands before.
    text = "ball. " * 1000 + "z. B. J. Smith reads. A dog."
    assert sentences(text) == [text[:-6], "A dog."]
    assert len(seen) == 1004
    assert max(seen) <= 5
