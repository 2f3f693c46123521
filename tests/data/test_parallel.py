"""Reading aligned files: alignment survives odd characters, and every defect is named."""

import gzip
import hashlib
from pathlib import Path

import pytest

from sparseq.data.parallel import read_parallel


def _write(folder: Path, name: str, data: str | bytes) -> None:
    data = data.encode() if isinstance(data, str) else data
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def test_plain_and_compressed_files_are_read_in_line_order(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "one\ntwo\nthree\n")
    _write(tmp_path, "train.de.gz", "eins\nzwei\ndrei")
    text = read_parallel(tmp_path, "train", "en", "de")
    assert text.sources == ["one", "two", "three"]
    assert text.targets == ["eins", "zwei", "drei"]
    assert (text.report.pairs, text.report.kept, len(text)) == (3, 3, 3)
    assert text.report.files["train.en"] == hashlib.sha256(b"one\ntwo\nthree\n").hexdigest()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    _write(tmp_path, "train.en", f"a{separator}b\nc\n")
    _write(tmp_path, "train.de", "x\ny\n")
    assert read_parallel(tmp_path, "train", "en", "de").sources == [f"a{separator}b", "c"]


def test_windows_line_ends_and_byte_order_mark_are_not_text(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "\ufeffa\r\nb\r\n")
    _write(tmp_path, "train.de", "x\ny\n")
    assert read_parallel(tmp_path, "train", "en", "de").sources == ["a", "b"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_sides_are_counted_and_dropped_for_training_only(tmp_path: Path, split: str) -> None:
    _write(tmp_path, f"{split}.en", "a\n\nc\n \n")
    _write(tmp_path, f"{split}.de", "x\ny\n\t\n\n")
    text = read_parallel(tmp_path, split, "en", "de")
    assert text.report.pairs == 4
    assert {kind: (found.count, found.lines) for kind, found in text.report.defects.items()} == {
        "empty_source": (2, (2, 4)),
        "empty_target": (2, (3, 4)),
    }
    if split == "train":
        assert (text.sources, text.targets) == (["a"], ["x"])
        assert str(text.report).splitlines() == [
            "train: 1 of 4 sentence pairs",
            "  2 pairs with an empty source (skipped): lines 2, 4",
            "  2 pairs with an empty target (skipped): lines 3, 4",
        ]
    else:
        assert (text.sources, text.targets) == (["a", "", "c", " "], ["x", "y", "\t", ""])


def test_unequal_line_counts_are_refused_with_both_numbers(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "a\nb\nc\n")
    _write(tmp_path, "train.de", "x\ny\n")
    with pytest.raises(ValueError, match=r"train\.en has 3 lines and .*train\.de has 2"):
        read_parallel(tmp_path, "train", "en", "de")


def test_broken_utf8_names_file_and_line(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "a\nb\nc\n")
    _write(tmp_path, "train.de", b"x\nGr\xfc\xdfe\nz\n")
    with pytest.raises(ValueError, match=r"train\.de, line 2: not UTF-8 \(byte 0xfc\)"):
        read_parallel(tmp_path, "train", "en", "de")


def test_a_truncated_archive_is_reported_as_such(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "a\n")
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"x\n" * 1000)[:-12])
    with pytest.raises(ValueError, match=r"train\.de\.gz cannot be decompressed"):
        read_parallel(tmp_path, "train", "en", "de")


def test_a_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    _write(tmp_path, "train.en", "a\n")
    _write(tmp_path, "train.fr", "b\n")
    with pytest.raises(FileNotFoundError, match=r"no train\.de or train\.de\.gz.*train\.en, train\.fr"):
        read_parallel(tmp_path, "train", "en", "de")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_parallel(tmp_path / "nowhere", "train", "en", "de")


@pytest.mark.parametrize(("en", "de", "message"), [("", "", "are empty"), ("\n", "x\n", "nothing to train on")])
def test_no_usable_pair_is_an_error(tmp_path: Path, en: str, de: str, message: str) -> None:
    _write(tmp_path, "train.en", en)
    _write(tmp_path, "train.de", de)
    with pytest.raises(ValueError, match=message):
        read_parallel(tmp_path, "train", "en", "de")
