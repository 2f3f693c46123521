"""The driver that compares int8 with float32: it goes on where it stopped, and its report says what the files hold."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sparseq.metrics.corpus import Bleu, Chrf
from sparseq.metrics.scoring import paired_differences, score_predictions
from tests.tiny import tiny_model

TARGETS = [f"Satz {number} steht in diesem kleinen Text ." for number in range(130)]
# Every fifth sentence is another one.
INT8 = [line if number % 5 else f"Wort {number}" for number, line in enumerate(TARGETS)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with ways that copy the target, and a text and models as small as that."""
    module: Any = importlib.import_module("quantization")
    for language, lines in (("en", [str(number) for number in range(len(TARGETS))]), ("de", TARGETS)):
        (tmp_path / f"test_2016_flickr.{language}").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    for name, experts in (("dense", 0), ("sparse", 4)):
        tiny_model(num_experts=experts).save_pretrained(tmp_path / name)
    module.calls = []

    def make(folder: Path, scratch: Path, precision: str) -> Any:
        (scratch / "weights.bin").write_bytes(bytes(100 if precision == "int8" else 400))
        (scratch / "config.json").write_text("{}", "utf-8")

        def translate(texts: Sequence[str]) -> list[str]:
            module.calls.append(list(texts))
            return [(INT8 if precision == "int8" else TARGETS)[int(text)] for text in texts]

        return translate

    monkeypatch.setattr(module, "ctranslate2", make)
    ways = {"PyTorch float32": "float32", "PyTorch int8": "int8"}
    monkeypatch.setattr(module, "WAYS", {way: (make, precision, ("torch",)) for way, precision in ways.items()})
    return module


def run(driver: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quantization.py", *map(str, arguments)])
    driver.main()


def test_goes_on_where_it_was_killed(driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "dense" / "PyTorch int8"
    folder.mkdir(parents=True)
    # The last of these lines is cut off.
    (folder / "translations.txt").write_text("".join(f"{line}\n" for line in INT8[:60]) + "Satz 6", "utf-8")
    command = ("run", tmp_path, tmp_path / "out", "--model", f"dense={tmp_path / 'dense'}", "--ways", "PyTorch int8")
    run(driver, monkeypatch, *command)
    assert [text for call in driver.calls for text in call] == [str(number) for number in range(60, 130)]
    assert (folder / "translations.txt").read_text("utf-8").split("\n")[:-1] == INT8
    assert json.loads((folder / "facts.json").read_text("utf-8"))["bytes"] == 100
    run(driver, monkeypatch, *command)
    assert sum(map(len, driver.calls)) == 70


def test_what_cannot_be_run_is_left_out_with_the_reason(
    driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(driver.WAYS, "absent", (len, "int8", ("no_such_package",)))
    model = f"sparse={tmp_path / 'sparse'}"
    run(driver, monkeypatch, "run", tmp_path, tmp_path / "out", "--model", model)
    lines = capsys.readouterr().out.splitlines()
    # The fixture's ways stand for CTranslate2.
    assert lines == [
        "sparse, PyTorch float32: left out, since CTranslate2 has no mixture of experts",
        "sparse, PyTorch int8: left out, since CTranslate2 has no mixture of experts",
        "sparse, absent: left out, since no_such_package is not installed",
    ]
    assert not driver.calls


def test_report(
    driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(driver, monkeypatch, "run", tmp_path, tmp_path / "out", "--model", f"dense={tmp_path / 'dense'}")
    run(driver, monkeypatch, "report", tmp_path, tmp_path / "out", "--json", tmp_path / "report.json")
    base, int8 = json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"]
    assert (base["way"], base["bytes"], "versus_float32" in base) == ("PyTorch float32", 400, False)
    assert (int8["equal_sentences"], int8["sentences"]) == (104, 130)
    scored = [score_predictions(lines, TARGETS, [Bleu(), Chrf()], bootstrap=1000) for lines in (INT8, TARGETS)]
    assert int8["bleu"] == scored[0].scores["bleu"]
    expected = {figure: test.report() for figure, test in paired_differences(*scored).items()}
    assert int8["versus_float32"] == expected
    assert "80.0%" in capsys.readouterr().out
