"""The metrics as `evaluate` modules: they load without a network and without a cache, and say what they computed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseq.metrics import load, module_path, translation_scores
from sparseq.metrics.corpus import METRICS

PREDICTIONS = ["Ein Mann geht .", "Zwei Hunde spielen im Park", "eine Katze"]
REFERENCES = ["Ein Mann geht .", "Zwei Hunde rennen im Park", "Eine Katze"]
SEVERAL = [["Ein Mann läuft .", "Ein Mann geht ."], ["Zwei Hunde rennen im Park"], ["Eine Katze", "Katze"]]

CODE = """
import json, os, socket, sys

def refuse(*arguments, **options):
    raise AssertionError("a module must not use the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import evaluate
from sparseq.metrics import load, module_path

predictions, references, several = json.loads(sys.stdin.read())
found = {}
for name in ["bleu", "chrf", "exact_match", "rouge"]:
    by_path = evaluate.load(str(module_path(name)))
    ours = load(name)
    by_path.add_batch(predictions=predictions[:2], references=references[:2])
    by_path.add(prediction=predictions[2], reference=references[2])
    found[name] = {
        "description": by_path.description,
        "features": len(by_path.features),
        "added": by_path.compute(),
        "once": ours.compute(predictions=predictions, references=references),
        "again": ours.compute(predictions=predictions, references=references, bootstrap=50),
        "several": ours.compute(predictions=predictions, references=several),
        "lowercase": ours.compute(predictions=predictions, references=references, lowercase=True)
        if name != "rouge" else None,
    }
    for key, lists in {"empty": ([], []), "uneven": (predictions, references[:2])}.items():
        try:
            ours.compute(predictions=lists[0], references=lists[1])
        except ValueError as error:
            found[name][key] = str(error)
    try:
        ours.compute(predictions=predictions, references=references, lowercased=True)
    except TypeError as error:
        found[name]["option"] = str(error)
both = evaluate.combine([load("bleu"), load("rouge")])
found["combined"] = both.compute(predictions=predictions, references=references)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with an empty cache, that must not use the network, computes outside the clone."""
    folder = tmp_path_factory.mktemp("modules")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root},
        input=json.dumps([PREDICTIONS, REFERENCES, SEVERAL]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_scores_and_signatures_are_those_of_the_package(name: str, found: dict[str, Any]) -> None:
    expected = translation_scores(PREDICTIONS, REFERENCES)
    assert found[name]["once"]["score"] == expected[name]
    assert found[name]["once"]["signature"] == expected[f"{name}_signature"]
    intervals = translation_scores(PREDICTIONS, REFERENCES, bootstrap=50)
    assert found[name]["again"]["score_ci"] == intervals[f"{name}_ci"]
    assert found[name]["again"]["signature"] == intervals[f"{name}_signature"]
    lowercase = translation_scores(PREDICTIONS, REFERENCES, lowercase=True)
    assert found[name]["lowercase"]["score"] == lowercase[name]


def test_exact_match(found: dict[str, Any]) -> None:
    assert found["exact_match"]["once"]["score"] == pytest.approx(100 / 3)
    assert found["exact_match"]["lowercase"]["score"] == pytest.approx(200 / 3)
    assert found["exact_match"]["lowercase"]["signature"].startswith("nrefs:1|case:lc|")


def test_rouge_returns_all_kinds(found: dict[str, Any]) -> None:
    result = found["rouge"]["once"]
    # Of the second sentence four of five words, and two of four pairs, agree.
    assert result["rouge1"] == pytest.approx(100 * (1 + 4 / 5 + 1) / 3)
    assert result["rouge2"] == pytest.approx(100 * (1 + 2 / 4 + 1) / 3)
    assert result["score"] == result["rougeL"] == result["rougeLsum"]
    assert set(found["rouge"]["again"]) > {"score_ci", "rouge1_ci", "rouge2_ci", "rougeL_ci", "rougeLsum_ci"}


@pytest.mark.parametrize("name", METRICS)
def test_every_module(name: str, found: dict[str, Any]) -> None:
    results = found[name]
    assert results["description"]
    assert results["added"] == results["once"]
    # The first sentence has the same text among its references; nothing else has changed.
    assert results["several"]["score"] == pytest.approx(results["once"]["score"])
    assert results["several"]["signature"].startswith("nrefs:var|")
    assert "bs:50|seed:12345" in results["again"]["signature"]
    assert "nothing to score" in results["empty"]
    assert "Mismatch in the number of predictions (3) and references (2)" in results["uneven"]
    assert "lowercased" in results["option"]


def test_modules_combine(found: dict[str, Any]) -> None:
    combined = found["combined"]
    assert combined["bleu_score"] == found["bleu"]["once"]["score"]
    assert combined["rouge_signature"] == found["rouge"]["once"]["signature"]
    assert combined["rouge2"] == found["rouge"]["once"]["rouge2"]


def test_an_unknown_metric_is_refused() -> None:
    for function in (load, module_path):
        with pytest.raises(ValueError, match="Did you mean 'chrf'"):
            function("chrf1")


def test_a_missing_rouge_package_is_noticed_when_the_module_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda: _modules_folder(tmp_path, monkeypatch))
    with pytest.raises(ModuleNotFoundError, match="rouge_score"):
        load("rouge", cache_dir=str(tmp_path))


def _modules_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable folder for the copies that `evaluate` makes, in place of the one in the user's cache."""
    (folder / "copied_modules").mkdir()
    monkeypatch.syspath_prepend(folder)
    return str(folder / "copied_modules")
