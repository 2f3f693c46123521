"""A run that is killed anywhere, and started again, ends bit for bit as one that was left alone."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from sparseq.training.checkpoints import complete_checkpoints, read_note
from tests.training.resume_runs import Kill, assert_same_checkpoint, run, train

TRAINER = "sparseq.training.trainer:SparseqTrainer"
CHECKPOINTS = "sparseq.training.checkpoints"

# Two micro-batches make a step; 3 steps a checkpoint, 4 an evaluation; an epoch has 5 or 6 steps.
KILLS = {
    "before the first checkpoint": Kill(f"{TRAINER}.training_step", call=3),
    "in the middle of an accumulation": Kill(f"{TRAINER}.training_step", call=10),
    "between the optimizer's step and the biases'": Kill(
        "sparseq.training.callback:SparseqCallback.on_optimizer_step", call=5
    ),
    "in a later epoch": Kill(f"{TRAINER}.training_step", call=22),
    "inside an evaluation": Kill("sparseq.training.callback:SparseqCallback.on_prediction_step", call=4),
    "save: weights only": Kill(f"{TRAINER}._save_optimizer_and_scheduler", call=2),
    "save: half an optimizer": Kill("torch:save", call=6, half=True),
    "save: no random numbers": Kill(f"{TRAINER}._save_rng_state", call=2),
    "save: all but the name": Kill(f"{CHECKPOINTS}:_flush_tree", call=2, after=True),
    "save: named, older ones not deleted": Kill(f"{CHECKPOINTS}:rotate_checkpoints", call=3),
    "save: half a deletion": Kill("shutil:rmtree", call=1),
}
# Like others in the list, and as long.
SLOW = {
    "before the first checkpoint",
    "between the optimizer's step and the biases'",
    "save: weights only",
    "save: no random numbers",
    "save: all but the name",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(train, folder / "run", {}, {}, errors=folder / "errors.txt") == [0]
    return folder / "run"


def finish(folder: Path, *args: Any) -> None:
    status = run(train, folder, *args, True, errors=folder.with_suffix(".errors"))
    assert status == [0], folder.with_suffix(".errors").read_text()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in KILLS])
def test_a_killed_run_ends_as_if_nothing_had_happened(name: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(train, folder, {}, {}, errors=tmp_path / "errors.txt", kill=KILLS[name]) == [-signal.SIGKILL]
    complete = complete_checkpoints(folder)
    assert sorted(complete) == sorted(folder.glob("checkpoint-*"))
    # What a stock script asks for.
    assert get_last_checkpoint(str(folder)) == (str(complete[-1]) if complete else None)
    assert folder / "checkpoint-12" not in complete
    finish(folder, {}, {})
    assert_same_checkpoint(folder / "checkpoint-12", whole / "checkpoint-12")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-9"]


def test_evaluations_leave_training_as_it_is(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(train, folder, {}, {"eval_strategy": "no"}, errors=tmp_path / "errors.txt") == [0]
    assert_same_checkpoint(folder / "checkpoint-12", whole / "checkpoint-12")


# Where the signal comes, and the checkpoint that the run leaves when it stops.
SIGNALS = {
    "in the middle of an accumulation": (Kill(f"{TRAINER}.training_step", call=9, signum=signal.SIGTERM), 5),
    "inside a save": (Kill(f"{TRAINER}._save_rng_state", call=2, signum=signal.SIGTERM), 6),
    "inside an evaluation": (
        Kill("sparseq.training.callback:SparseqCallback.on_prediction_step", call=1, signum=signal.SIGTERM),
        4,
    ),
    "Ctrl-C": (Kill(f"{TRAINER}.training_step", call=14, signum=signal.SIGINT), 7),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_at_the_end_of_the_step_with_a_checkpoint(name: str, whole: Path, tmp_path: Path) -> None:
    kill, step = SIGNALS[name]
    folder, errors = tmp_path / "run", tmp_path / "errors.txt"
    status = run(train, folder, {}, {}, errors=errors, kill=kill)
    assert status == ([143] if kill.signum == signal.SIGTERM else [1])
    assert ("KeyboardInterrupt" in errors.read_text()) == (kill.signum == signal.SIGINT)
    message = (
        f"{signal.Signals(kill.signum).name}: stopped after step {step} of 12, checkpoints are in {folder}. Go on"
    )
    assert message in errors.read_text()
    last = get_last_checkpoint(str(folder))
    assert last == str(folder / f"checkpoint-{step}")
    note = read_note(last)
    assert note is not None
    assert note.scheduled == (step % 3 == 0)
    finish(folder, {}, {})
    assert_same_checkpoint(folder / "checkpoint-12", whole / "checkpoint-12")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-9"]


def test_a_run_may_be_stopped_again_and_again(whole: Path, tmp_path: Path) -> None:
    folder, errors = tmp_path / "run", tmp_path / "errors.txt"
    # Each call of `train` makes four steps more and is then asked to stop.
    kill = Kill(f"{TRAINER}.training_step", call=7, signum=signal.SIGTERM)
    for step in (4, 8):
        assert run(train, folder, {}, {}, True, errors=errors, kill=kill) == [143]
        names = {path.name for path in folder.iterdir()}
        assert names == {f"checkpoint-{n}" for n in {step} | set(range(3, step + 1, 3)[-2:])}
    finish(folder, {}, {})
    assert_same_checkpoint(folder / "checkpoint-12", whole / "checkpoint-12")


# A checkpoint is due at the last step of an epoch, an evaluation at its end.
EPOCHS = {"eval_strategy": "epoch", "save_steps": 5, "max_steps": -1, "num_train_epochs": 3}


def history(folder: Path) -> dict[str, Any]:
    return json.loads((complete_checkpoints(folder)[-1] / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epochs")
    assert run(train, folder / "run", {}, EPOCHS, errors=folder / "errors.txt") == [0]
    return folder / "run"


@pytest.mark.parametrize("point", ["end of an epoch", "evaluation at its end"])
def test_what_is_due_at_the_end_of_an_epoch_is_neither_lost_nor_done_twice(
    point: str, three_epochs: Path, tmp_path: Path
) -> None:
    folder, expected = tmp_path / "run", history(three_epochs)
    assert expected["max_steps"] == 15
    kill = {
        "end of an epoch": Kill(f"{TRAINER}.training_step", call=20, signum=signal.SIGTERM),
        "evaluation at its end": Kill("sparseq.training.callback:SparseqCallback.on_prediction_step", call=7),
    }[point]
    status = run(train, folder, {}, EPOCHS, errors=tmp_path / "errors.txt", kill=kill)
    assert status == [143 if kill.signum == signal.SIGTERM else -signal.SIGKILL]
    finish(folder, {}, EPOCHS)
    last = complete_checkpoints(folder)[-1]
    assert_same_checkpoint(last, three_epochs / last.name)
    measured = [
        [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        for state in (history(folder), expected)
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 3


# At this rate the validation loss rises after a few steps.
STOPPING = {
    "patience": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "max_steps": 60,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    assert run(train, folder / "run", {}, STOPPING, errors=folder / "errors.txt") == [0]
    return folder / "run"


@pytest.mark.parametrize("point", ["before the patience ends", "after it"])
def test_early_stopping_remembers_how_long_it_has_waited(point: str, stopped_early: Path, tmp_path: Path) -> None:
    end = history(stopped_early)["global_step"]
    assert end < 60
    folder = tmp_path / "run"
    kill = {
        "before the patience ends": Kill(f"{TRAINER}.training_step", call=2 * end - 1),
        "after it": Kill(f"{TRAINER}._load_best_model"),
    }[point]
    assert run(train, folder, {}, STOPPING, errors=tmp_path / "errors.txt", kill=kill) == [-signal.SIGKILL]
    finish(folder, {}, STOPPING)
    names = [path.name for path in complete_checkpoints(stopped_early)]
    assert names == [path.name for path in complete_checkpoints(folder)]
    for name in names:
        assert_same_checkpoint(folder / name, stopped_early / name)
