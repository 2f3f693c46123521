"""Plain text becomes one row of tokens: nothing lost, nothing mixed, the last texts apart."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq import SparseqTokenizer
from sparseq.data import plain
from sparseq.data.plain import PlainText, TextPlace, TokenRow, tokenize_text
from sparseq.data.store import Store
from sparseq.training.tokenizer import train_tokenizer

LINES = [f"text {'one two three'[: 3 + i % 9]} {i % 7}" for i in range(40)]
# With blank lines, and one of white space, that are no texts.
WRITTEN = ["", *LINES[:20], "   ", *LINES[20:], ""]


@pytest.fixture(scope="module")
def tokenizer() -> SparseqTokenizer:
    return train_tokenizer(LINES, vocab_size=290, language_tags=["en"], show_progress=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.en.gz"
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in WRITTEN).encode()))
    return path


def ids_of(tokenizer: SparseqTokenizer, texts: list[str]) -> list[int]:
    """One text after another, each with its end."""
    return [token for text in texts for token in tokenizer(text)["input_ids"]]


def open_file(path: Path, **options: Any) -> PlainText:
    return TextPlace("en", files=(str(path),)).open(**options)


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6), st.data())
def test_a_row_in_chunks_is_read_as_one(chunks: list[list[int]], data: st.DataObject) -> None:
    row = TokenRow([np.array(chunk, dtype=np.int32) for chunk in chunks])
    whole = [token for chunk in chunks for token in chunk]
    assert len(row) == len(whole)
    assert list(row) == whole
    start, stop = (data.draw(st.integers(-1, len(whole) + 1)) for _ in range(2))
    assert np.asarray(row[start:stop]).tolist() == whole[start:stop]
    for beyond in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            row[beyond]


@pytest.mark.parametrize("chunk", [5, 1_000_000])
def test_tokens_are_those_of_the_texts(
    tokenizer: SparseqTokenizer, file: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_BATCH_TOKENS", chunk)
    monkeypatch.setattr(plain, "_BATCH_TEXTS", 7)
    train, held_out, report = tokenize_text(tokenizer, open_file(file), held_out=6)
    assert list(train) == ids_of(tokenizer, LINES[:-6])
    assert list(held_out) == ids_of(tokenizer, LINES[-6:])
    assert (report.texts, report.held_out, report.tokens, report.blank) == (40, 6, len(train), 3)
    assert str(report).startswith("en: 40 texts, 6 of them held out")
    assert str(report).endswith("3 left out: blank")


def test_the_first_texts_alone(tokenizer: SparseqTokenizer, file: Path) -> None:
    train, held_out, report = tokenize_text(tokenizer, open_file(file), held_out=2, max_texts=10)
    assert list(train) + list(held_out) == ids_of(tokenizer, LINES[:10])
    assert list(held_out) == ids_of(tokenizer, LINES[8:10])
    assert report.texts == 10
    assert list(open_file(file).texts(10)) == LINES[:10]
    assert list(open_file(file).texts(10, held_out=2)) == LINES[:8]
    assert list(open_file(file).texts(held_out=6)) == LINES[:-6]


def test_tokens_are_made_once(
    tokenizer: SparseqTokenizer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    first = tokenize_text(tokenizer, open_file(file), held_out=3, store=store)
    with monkeypatch.context() as patch:
        patch.setattr(plain, "_tokenize", None)
        again = tokenize_text(tokenizer, open_file(file), held_out=3, store=store)
        assert [list(row) for row in again[:2]] == [list(row) for row in first[:2]]
        assert again[2] == first[2]
    file.write_bytes(gzip.compress(b"other text\n" * 9))
    other, _, report = tokenize_text(tokenizer, open_file(file), held_out=3, store=store)
    assert list(other) == ids_of(tokenizer, ["other text"] * 6)
    assert report.files != first[2].files


def test_tables_and_files_give_the_same(tokenizer: SparseqTokenizer, file: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [line or None for line in WRITTEN]
    table.write_text("".join(json.dumps({"n": 1, "body": row}) + "\n" for row in rows))
    expected = tokenize_text(tokenizer, open_file(file), held_out=4)
    for place in (
        TextPlace("en", files=(str(table),), column="body"),
        TextPlace("en", dataset=str(table), column="body"),
        TextPlace("en", folder=str(tmp_path)),
    ):
        found = tokenize_text(tokenizer, place.open(), held_out=4)
        assert [list(row) for row in found[:2]] == [list(row) for row in expected[:2]], place
        assert found[2].blank == 3


def test_lines_that_are_not_utf8(tokenizer: SparseqTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text one\ntext \xe9\ntext 2\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8.*if_not_utf8"):
        tokenize_text(tokenizer, open_file(path))
    train, _, report = tokenize_text(tokenizer, open_file(path, if_not_utf8="skip"))
    assert list(train) == ids_of(tokenizer, ["text one", "text 2"])
    assert (report.texts, report.not_utf8) == (2, 1)
    assert "1 left out: not UTF-8" in str(report)


def test_patterns_and_repeated_files(tokenizer: SparseqTokenizer, file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text two 9\n")
    both = TextPlace("en", files=(str(tmp_path / "*.*"),)).open()
    assert list(both.files) == ["b.txt", "train.en.gz"]
    assert list(both.texts()) == ["text two 9", *LINES]
    twice = TextPlace("en", files=(str(tmp_path / "b.txt"),) * 2).open()
    store = Store(tmp_path / "cache")
    rows = [list(tokenize_text(tokenizer, one, store=store)[0]) for one in (open_file(tmp_path / "b.txt"), twice)]
    assert rows[1] == 2 * rows[0]


def test_special_tokens_written_out_are_text(tokenizer: SparseqTokenizer, tmp_path: Path) -> None:
    line = "text <s>one</s> <2en> <mask>"
    (tmp_path / "a.txt").write_text(line + "\n")
    row = list(tokenize_text(tokenizer, open_file(tmp_path / "a.txt"))[0])
    assert row[-1] == tokenizer.eos_token_id
    assert not set(row[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(row[:-1]) == line


def test_mistakes(tokenizer: SparseqTokenizer, file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean train\.en\.gz\?"):
        open_file(tmp_path / "train.en.g")
    with pytest.raises(FileNotFoundError, match=r"is a folder; name files, or give it as text\.folder"):
        open_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No file matches .*\*\.none"):
        open_file(tmp_path / "*.none")
    (tmp_path / "a.txt.xz").write_bytes(b"\xfd7zXZ")
    with pytest.raises(ValueError, match=r"a\.txt\.xz is compressed in a way that is not read"):
        tokenize_text(tokenizer, open_file(tmp_path / "a.txt.xz"))
    with pytest.raises(FileNotFoundError, match=r"has no train\.fr"):
        TextPlace("fr", folder=str(tmp_path)).open()
    with pytest.raises(ValueError, match=r"40 texts, and 40 are to be held out"):
        tokenize_text(tokenizer, open_file(file), held_out=40)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="every line is blank"):
        tokenize_text(tokenizer, open_file(tmp_path / "blank.txt"))
    (tmp_path / "t.jsonl").write_text('{"body": 3}\n')
    number = TextPlace(files=(str(tmp_path / "t.jsonl"),), column="body")
    with pytest.raises(ValueError, match="must hold text, but holds 3"):
        tokenize_text(tokenizer, number.open())
    with pytest.raises(ValueError, match="no column 'text'"):
        tokenize_text(tokenizer, TextPlace(files=(str(tmp_path / "t.jsonl"),)).open())
