"""A whole run from a recipe: what it leaves, that it can be repeated, resumed and loaded."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sparseq.cli import Command, main
from sparseq.metrics import translation_scores
from sparseq.training.averaging import average_checkpoints, complete_checkpoints
from sparseq.training.callback import SparseqCallback
from sparseq.training.recipes import build_recipe
from sparseq.training.run import TrainResult, train
from sparseq.training.text import locate_data
from tests.training.toy import toy_recipe

COMMANDS = {
    "train": Command("sparseq.training.train_command", ""),
    "score": Command("sparseq.metrics.score_command", ""),
}

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(toy_recipe(corpus), tmp_path_factory.mktemp("run") / "out", progress=False)


def test_the_folder_loads_and_translates_as_the_run_did(finished: TrainResult) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(finished.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.output_dir)
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (2, 20)
    for source, translation in zip(finished.sources, finished.translations, strict=True):
        output = model.generate(**tokenizer([f"<2de> {source}"], return_tensors="pt"))
        assert tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip() == translation


def test_the_weights_are_the_mean_of_the_last_checkpoints(finished: TrainResult) -> None:
    checkpoints = complete_checkpoints(finished.output_dir / "checkpoints")
    assert [path.name for path in checkpoints] == ["checkpoint-6", "checkpoint-9", "checkpoint-10"]
    saved = load_file(finished.output_dir / "model.safetensors")
    for name, tensor in average_checkpoints(checkpoints).items():
        assert torch.equal(saved[name], tensor), name


def test_results_and_manifest_say_what_was_done(finished: TrainResult, corpus: Path) -> None:
    results = json.loads((finished.output_dir / "results.json").read_text())
    assert results["scores"] == translation_scores(finished.translations, finished.references)
    assert (results["steps"], results["split"]) == (10, "test")
    assert results["seconds"]["total"] >= results["seconds"]["training"] > 0
    assert [entry["step"] for entry in results["log"] if "loss" in entry] == [2, 4, 6, 8, 10]
    manifest = json.loads((finished.output_dir / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    digest = hashlib.sha256((corpus / "train.de").read_bytes()).hexdigest()
    assert manifest["data"]["train"]["sha256"]["train.de"] == digest
    assert manifest["data"]["train"]["pairs"] == 90
    recipe = {**manifest["recipe"]}
    assert build_recipe(recipe.pop("name"), recipe) == toy_recipe(corpus)
    lines = (finished.output_dir / "test.de.translated").read_text().splitlines()
    assert lines == finished.translations


def test_a_finished_run_is_not_trained_again(finished: TrainResult, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.output_dir, tmp_path / "out")
    again = train(toy_recipe(corpus), tmp_path / "out", progress=False)
    assert (again.steps, again.translations, again.scores) == (10, finished.translations, finished.scores)
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())[0] == "checkpoint-10"


def test_a_killed_run_continues_to_the_same_weights(
    finished: TrainResult, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: SparseqCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SparseqCallback, "on_optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(toy_recipe(corpus), tmp_path / "out", progress=False)
    # As if the kill had come while the second checkpoint was being written.
    (tmp_path / "out" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = train(toy_recipe(corpus), tmp_path / "out", progress=False)
    expected = load_file(finished.output_dir / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.translations == finished.translations


def test_a_run_of_another_recipe_is_neither_continued_nor_overwritten(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    other = toy_recipe(corpus, learning_rate=0.02)
    with pytest.raises(ValueError, match=r"training\.learning_rate was 0\.01, is 0\.02.*--no-resume"):
        train(other, finished.output_dir, progress=False)
    shutil.copytree(finished.output_dir, tmp_path / "out")
    fresh = train(toy_recipe(corpus, learning_rate=0.02, max_steps=3), tmp_path / "out", resume=False, progress=False)
    assert fresh.steps == 3
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_checkpoints_of_another_program_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="of another program"):
        train(toy_recipe(corpus), tmp_path, resume=False, progress=False)
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()


def test_a_recipe_without_data_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs data\.folder, data\.source, data\.target: add"):
        locate_data(build_recipe("empty", {}), tmp_path)


def test_the_command_scores_the_folder_as_the_run_did(finished: TrainResult, corpus: Path, tmp_path: Path) -> None:
    options = ["--data", str(corpus), "--source", "en", "--target", "de", "--output", str(tmp_path / "score.json")]
    assert main(["score", str(finished.output_dir), *options, "--bootstrap", "50"], COMMANDS) == 0
    report = json.loads((tmp_path / "score.json").read_text())
    assert report["bleu"] == finished.scores["bleu"]
    assert report["chrf"] == finished.scores["chrf"]
    assert report["bleu_ci"] >= 0


def test_the_command_lists_checks_and_refuses(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--list"], COMMANDS) == 0
    assert "multi30k" in capsys.readouterr().out
    data = [f"data.folder={corpus}", "data.source=en", "data.target=de"]
    assert main(["train", "tiny-sparse", *data, "--dry-run"], COMMANDS) == 0
    assert "train: 90 of 90 sentence pairs" in capsys.readouterr().out
    assert main(["train", "tiny-sparse", "training.max_step=3", "--dry-run"], COMMANDS) == 2
    assert "did you mean `max_steps`?" in capsys.readouterr().err
    assert main(["train"], COMMANDS) == 2
    assert "name a recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
