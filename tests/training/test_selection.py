"""Which checkpoint a run ends with, when it ends, and where its logs go."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sparseq.metrics import translation_scores
from sparseq.training.evaluation import translate_batchwise
from sparseq.training.run import train
from tests.training.toy import toy_recipe

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


def _log(folder: Path, key: str) -> dict[int, float]:
    """The first value of each step: the final weights are evaluated once more at the last one."""

    values: dict[int, float] = {}
    for entry in json.loads((folder / "results.json").read_text(encoding="utf-8"))["log"]:
        if key in entry:
            values.setdefault(entry["step"], entry[key])
    return values


def test_the_best_checkpoint_by_generated_text(corpus: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"final_weights": "best", "metric": "chrf", "average_checkpoints": 1}
    # It learns quickly and then, at this rate, forgets.
    recipe = toy_recipe(corpus, **chosen, max_steps=24, eval_steps=3, learning_rate=0.03, lr_scheduler="cosine")
    train(recipe, tmp_path, progress=False)
    scores = _log(tmp_path, "eval_chrf")
    assert list(scores) == list(range(3, 25, 3))
    best = max(scores, key=lambda step: (scores[step], -step))
    kept = tmp_path / "checkpoints" / f"checkpoint-{best}"
    final, saved = load_file(tmp_path / "model.safetensors"), load_file(kept / "model.safetensors")
    assert all((final[name] == saved[name]).all() for name in saved)
    # The score is that of greedy translations of the validation text.
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(kept), AutoTokenizer.from_pretrained(tmp_path)
    sources, targets = ((corpus / f"val.{side}").read_text(encoding="utf-8").splitlines() for side in ("en", "de"))
    translations = translate_batchwise(model, tokenizer, sources, prefix="<2de> ", num_beams=1, max_length=20)
    assert translation_scores(translations, targets)["chrf"] == pytest.approx(scores[best])
    # Given again, the command finds the same checkpoint.
    (tmp_path / "model.safetensors").unlink()
    train(recipe, tmp_path, progress=False)
    again = load_file(tmp_path / "model.safetensors")
    assert all((again[name] == saved[name]).all() for name in saved)


def test_early_stopping_ends_the_run_for_good(corpus: Path, tmp_path: Path) -> None:
    # Steps too small to change a weight, so nothing gets better after the first evaluation.
    recipe = toy_recipe(corpus, early_stopping_patience=2, eval_steps=3, learning_rate=1e-30)
    first = train(recipe, tmp_path, progress=False)
    assert first.steps == 9
    assert list(_log(tmp_path, "eval_loss")) == [3, 6, 9]
    assert train(recipe, tmp_path, progress=False).steps == 9
    assert list(_log(tmp_path, "eval_loss")) == [3, 6, 9]


def test_tensorboard_gets_what_the_results_have(corpus: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(toy_recipe(corpus, report_to="tensorboard"), tmp_path, progress=False)
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    names = {
        "loss": "train/loss",
        "padding": "train/padding",
        "router/max_vio": "train/router/max_vio",
        "eval_loss": "eval/loss",
    }
    for key, name in names.items():
        expected = _log(tmp_path, key)
        found = {event.step: event.value for event in reversed(events.Scalars(name))}
        assert found == pytest.approx(expected, rel=1e-5), name


def test_a_reporter_that_is_not_installed_is_noticed_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(corpus, report_to="wandb")
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        train(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "training",
    [{"final_weights": "best", "eval_steps": 5}, {"early_stopping_patience": 1, "eval_steps": 0}],
)
def test_what_is_compared_must_be_saved(corpus: Path, training: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`eval_steps` must be a multiple of `save_steps` \(3\)"):
        toy_recipe(corpus, **training)
