"""Two processes that are killed or stopped end, once resumed, bit for bit as two that were left alone."""

import signal
from pathlib import Path

import pytest

from sparseq.training.checkpoints import complete_checkpoints, read_note
from tests.training.resume_runs import Kill, assert_same_checkpoint, run, train

TRAINER = "sparseq.training.trainer:SparseqTrainer"
# An epoch has 5 steps, so the checkpoint of step 9 lies in the middle of the second.
ARGUMENTS = {"gradient_accumulation_steps": 1, "eval_steps": 5}


def on_two(folder: Path, *, resume: bool = False, kill: Kill | None = None) -> list[int]:
    errors = folder.with_suffix(".errors")
    status = run(train, folder, {}, ARGUMENTS, resume, errors=errors, kill=kill, processes=2)
    if kill is None:
        assert status == [0, 0], "".join(errors.with_name(f"{errors.name}.{rank}").read_text() for rank in (0, 1))
    return status


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    on_two(folder)
    return folder / "checkpoint-12"


KILLS = {
    "in the middle of a later epoch": (Kill(f"{TRAINER}.training_step", call=11), [9]),
    "in a save, of one process": (Kill(f"{TRAINER}._save_rng_state", call=3, rank=1), [6]),
}


@pytest.mark.parametrize("name", KILLS)
def test_two_killed_processes_end_as_if_nothing_had_happened(name: str, whole: Path, tmp_path: Path) -> None:
    kill, steps = KILLS[name]
    status = on_two(tmp_path / "run", kill=kill)
    assert -signal.SIGKILL in status
    assert 0 not in status
    assert complete_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{steps[-1]}"
    on_two(tmp_path / "run", resume=True)
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-12", whole)


def test_a_signal_to_one_process_stops_both_at_the_same_step(whole: Path, tmp_path: Path) -> None:
    kill = Kill(f"{TRAINER}.training_step", call=7, signum=signal.SIGTERM, rank=1)
    assert on_two(tmp_path / "run", kill=kill) == [143, 143]
    messages = [(tmp_path / f"run.errors.{rank}").read_text().count("stopped after step 7 of 12") for rank in (0, 1)]
    assert messages == [1, 0]
    last = complete_checkpoints(tmp_path / "run")[-1]
    assert last.name == "checkpoint-7"
    note = read_note(last)
    assert note is not None
    assert note.world_size == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} < note.files.keys()
    on_two(tmp_path / "run", resume=True)
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-12", whole)
