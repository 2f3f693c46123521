"""`sparseq train-tokenizer`: what it writes, what it refuses, and that nothing is lost on the way."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from sparseq import SparseqTokenizer
from sparseq.cli import Command, main
from sparseq.training.tokenizer import tokenizer_report

ROOT = Path(__file__).parents[2]
COMMANDS = {"train-tokenizer": Command("sparseq.training.tokenizer_command", "train a tokenizer")}


@pytest.fixture
def files(tmp_path: Path, corpus: list[str]) -> list[str]:
    """The corpus as one plain file, with a byte order mark and blank lines, and one compressed file."""
    english, german = tmp_path / "train.en", tmp_path / "train.de.gz"
    english.write_text("\ufeff" + "\r\n\r\n".join(corpus[:48]), "utf-8", newline="")
    german.write_bytes(gzip.compress("\n".join(corpus[48:]).encode()))
    return [str(english), str(german)]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["train-tokenizer", *map(str, arguments)], COMMANDS)
        output = capfd.readouterr()
        return code, output.out, output.err

    return command


Run = Callable[..., tuple[int, str, str]]


def test_files(run: Run, files: list[str], tmp_path: Path, tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    report = tmp_path / "report.json"
    folder = tmp_path / "new" / "tokenizer"
    code, out, _ = run(
        *files,
        "--vocab-size",
        420,
        "--language",
        "de",
        "--language",
        "fr",
        "--output",
        folder,
        "--report-json",
        report,
    )
    assert code == 0
    loaded = SparseqTokenizer.from_pretrained(folder)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    expected = tokenizer_report(tokenizer, dict(zip(files, (corpus[:48], corpus[48:]), strict=True)))
    assert json.loads(report.read_text("utf-8")) == expected
    assert "vocabulary: 420 tokens" in out
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json", "saved", "saved with splits"])
def test_dataset(run: Run, tmp_path: Path, tokenizer: SparseqTokenizer, corpus: list[str], kind: str) -> None:
    table = datasets.Dataset.from_dict({"en": corpus[:48], "de": corpus[48:], "number": list(range(48))})
    path = tmp_path / f"pairs.{kind.split()[0]}"
    if kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "json":
        table.to_json(path)
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    folder = tmp_path / "tokenizer"
    options = ("--vocab-size", 420, "--language", "de", "--language", "fr")
    code, _, err = run("--dataset", path, "--column", "en", "--column", "de", *options, "--output", folder)
    assert code == 0, err
    loaded = SparseqTokenizer.from_pretrained(folder)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_nested_column(run: Run, tmp_path: Path, tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    pairs = [{"en": english, "de": german} for english, german in zip(corpus[:48], corpus[48:], strict=True)]
    path = tmp_path / "wmt"
    datasets.Dataset.from_dict({"translation": pairs}).save_to_disk(path)
    common = ("--dataset", path, "--vocab-size", 420, "--language", "de", "--language", "fr", "--output")
    columns = ("--column", "translation.en", "--column", "translation.de")
    assert run(*common, tmp_path / "tokenizer", *columns)[0] == 0
    loaded = SparseqTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    code, _, err = run(*common, tmp_path / "other", "--column", "translation")
    assert (code, "name one of its fields, such as translation." in err) == (2, True)
    code, _, err = run(*common, tmp_path / "other", "--column", "translation.fr")
    assert code == 2
    assert "has no column 'translation.fr'" in err
    assert "Its columns: translation, translation.en, translation.de" in err


def test_dry_run_writes_nothing(run: Run, files: list[str], tmp_path: Path, corpus: list[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(*files, "--vocab-size", 420, "--output", tmp_path / "tokenizer", "--dry-run")
    assert code == 0
    assert f"smallest workable vocabulary size: {260 + len(set(''.join(corpus)))}" in out
    assert f"{files[0]}: 48 texts" in out
    assert run(*files, "--vocab-size", 100, "--output", tmp_path / "tokenizer", "--dry-run")[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_text_is_said(run: Run, files: list[str], tmp_path: Path) -> None:
    code, _, err = run(*files, "--output", tmp_path / "tokenizer")
    assert code == 0
    assert "warning" in err
    assert "10000 were asked for" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.txt"], "missing.txt is missing"),
        (["."], ". is a folder, not a text file"),
        ([], "Give either text files or --dataset"),
        (["good.txt", "--dataset", "x"], "Give either text files or --dataset"),
        (["good.txt", "--column", "x"], "--column and --config-name go with --dataset"),
        (["broken.txt"], "broken.txt, line 3: not UTF-8 (byte 0xfc)"),
        (["cut.gz"], "cut.gz cannot be decompressed"),
        (["good.gz"], "good.gz cannot be decompressed"),
        (["empty.txt"], "There is no text in empty.txt"),
        (["good.txt", "--language", "d e"], "'d e' is not a language code"),
        (["good.txt", "--vocab-size", "100"], "`vocab_size` is 100, but the smallest that works here is 26"),
        (["good.txt", "--report-json", "no/report.json"], "the folder no does not exist"),
        (["--dataset", "table.csv"], "--dataset needs --column"),
        (
            ["--dataset", "table.csv", "--column", "english"],
            "table.csv has no column 'english' (did you mean 'en'?). Its columns: en, number",
        ),
        (["--dataset", "table.jsonl", "--column", "number"], "row 1: the column 'number' must hold text, but holds 1"),
        (["--dataset", "good.gz", "--column", "en"], "a data file must end in .jsonl"),
        (["--dataset", "table.csv", "--split", "no split", "--column", "en"], "no split"),
        (["--dataset", "nobody/nothing", "--column", "en"], "nobody/nothing"),
    ],
)
def test_refusals(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("a b\n", "utf-8")
    Path("good.gz").write_text("a b\n", "utf-8")
    Path("broken.txt").write_bytes("a\nb\nfür\n".encode("latin-1"))
    Path("cut.gz").write_bytes(gzip.compress(b"some text\n" * 100)[:-12])
    Path("empty.txt").write_text("\n \n", "utf-8")
    Path("table.csv").write_text("en,number\na,1\n", "utf-8")
    Path("table.jsonl").write_text('{"number": 1}\n', "utf-8")
    code, _, err = run(*options, "--output", "tokenizer")
    assert code == 2
    assert message in err
    assert not Path("tokenizer").exists()


def test_output_is_not_overwritten_unasked(run: Run, files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    assert run(*files, "--vocab-size", 400, "--output", folder)[0] == 0
    written = (folder / "tokenizer.json").read_bytes()
    code, _, err = run(*files, "--vocab-size", 420, "--output", folder)
    assert code == 2
    assert "is not empty" in err
    assert (folder / "tokenizer.json").read_bytes() == written
    assert run(*files, "--vocab-size", 420, "--output", folder, "--overwrite")[0] == 0
    assert len(SparseqTokenizer.from_pretrained(folder)) == 420
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "train.de.gz", "train.en"]


def test_overwrite_spares_what_is_no_tokenizer(run: Run, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"precious")
    code, _, err = run(*files, "--vocab-size", 420, "--output", tmp_path / "model", "--overwrite")
    assert code == 2
    assert "model.safetensors" in err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"precious"


def test_output_may_not_be_a_file(run: Run, files: list[str]) -> None:
    code, _, err = run(*files, "--output", files[0])
    assert (code, "is a file; name a folder" in err) == (2, True)


def test_a_failed_save_leaves_the_old_tokenizer(
    run: Run, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokenizer"
    assert run(*files, "--vocab-size", 400, "--output", folder)[0] == 0
    save = SparseqTokenizer.save_pretrained

    def full_disk(self: SparseqTokenizer, target: Path, **options: object) -> None:
        save(self, target)
        raise OSError("no space left on device")

    monkeypatch.setattr(SparseqTokenizer, "save_pretrained", full_disk)
    code, _, err = run(*files, "--vocab-size", 420, "--output", folder, "--overwrite")
    assert (code, "no space left" in err) == (2, True)
    assert len(SparseqTokenizer.from_pretrained(folder)) == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "train.de.gz", "train.en"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train-tokenizer", "--help"], COMMANDS)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "sparseq train-tokenizer train.en.gz train.de.gz --language de --output tokenizer" in text
    assert "--dry-run" in text


def test_script(files: list[str], tmp_path: Path) -> None:
    script = ROOT / "scripts" / "train_tokenizer.py"
    arguments = [*files, "--vocab-size", "420", "--output", str(tmp_path / "tokenizer")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert len(SparseqTokenizer.from_pretrained(tmp_path / "tokenizer")) == 420
