"""What counts as a complete checkpoint, and that one appears and disappears as a whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from sparseq.training.checkpoints import (
    INCOMPLETE,
    NOTE_FILE,
    checkpoint_defect,
    checkpoint_step,
    complete_checkpoints,
    last_complete_checkpoint,
    publish_checkpoint,
    publish_files,
    read_note,
    remove_leftovers,
    rotate_checkpoints,
    write_json,
)


def write(folder: Path) -> Path:
    """The files of a run of two processes."""
    folder.mkdir(parents=True)
    save_file({"w": torch.randn(50, 3), "empty": torch.zeros(0)}, folder / "model.safetensors", {"format": "pt"})
    torch.save({"state": torch.randn(100)}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    for rank in range(2):
        torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    return folder


def publish(folder: Path, step: int, **note: bool) -> Path:
    target = folder / f"checkpoint-{step}"
    publish_checkpoint(write(folder / INCOMPLETE / target.name), target, world_size=2, **note)
    return target


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def shard(folder: Path) -> None:
    """As if the weights had been saved in two parts, of which the second is absent."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (cut("model.safetensors"), "model.safetensors"),
    "header": (lambda folder: os.truncate(folder / "model.safetensors", 20), "model.safetensors"),
    "nothing": (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors|no weights"),
    "shard": (shard, "model-00002-of-00002.safetensors|model.safetensors"),
    "optimizer": (cut("optimizer.pt"), "optimizer.pt"),
    "empty optimizer": (lambda folder: os.truncate(folder / "optimizer.pt", 0), "optimizer.pt"),
    "schedule": (cut("scheduler.pt"), "scheduler.pt"),
    "random numbers": (cut("rng_state_1.pth"), "rng_state_1.pth"),
    "a rank": (lambda folder: (folder / "rng_state_0.pth").unlink(), "rng_state_0.pth"),
    "progress": (cut("trainer_state.json"), "trainer_state.json"),
    "no progress": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
}


@pytest.mark.parametrize("noted", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_cut_is_noticed_and_the_checkpoint_before_it_used(
    defect: str, noted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = [publish(tmp_path, step) for step in (90, 100)]
    if not noted:
        for path in checkpoints:
            (path / NOTE_FILE).unlink()
    assert last_complete_checkpoint(tmp_path) == checkpoints[1]
    assert not caplog.records
    break_it, named = DEFECTS[defect]
    break_it(checkpoints[1])
    found = checkpoint_defect(checkpoints[1])
    assert found is not None
    assert any(name in found for name in named.split("|")), found
    assert complete_checkpoints(tmp_path) == checkpoints[:1]
    assert last_complete_checkpoint(tmp_path) == checkpoints[0]
    assert f"{checkpoints[1]} is not used: {found}." in caplog.text


def test_what_is_gone_from_the_last_rank_is_noticed_by_the_note(tmp_path: Path) -> None:
    checkpoint = publish(tmp_path, 3)
    (checkpoint / "rng_state_1.pth").unlink()
    assert checkpoint_defect(checkpoint) == "rng_state_1.pth is missing"


@pytest.mark.parametrize(("name", "lack"), [("optimizer.pt", "optimizer"), ("rng_state_*.pth", "random numbers")])
def test_weights_alone_can_be_averaged_but_not_resumed(name: str, lack: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint-3")
    for path in checkpoint.glob(name):
        path.unlink()
    assert complete_checkpoints(tmp_path) == [checkpoint]
    assert last_complete_checkpoint(tmp_path) is None
    assert lack in str(checkpoint_defect(checkpoint, resumable=True))


def test_adapters_and_shards_are_weights_and_old_formats_pass(tmp_path: Path) -> None:
    adapter, shards = write(tmp_path / "checkpoint-1"), write(tmp_path / "checkpoint-2")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    torch.save([1], adapter / "optimizer.pt", _use_new_zipfile_serialization=False)
    shard(shards)
    shutil.copy(shards / "model-00001-of-00002.safetensors", shards / "model-00002-of-00002.safetensors")
    assert complete_checkpoints(tmp_path) == [adapter, shards]


def test_the_library_sees_no_checkpoint_until_it_is_published(tmp_path: Path) -> None:
    first = publish(tmp_path, 3)
    written = write(tmp_path / INCOMPLETE / "checkpoint-6")
    assert get_last_checkpoint(str(tmp_path)) == str(first)
    publish_checkpoint(written, tmp_path / "checkpoint-6", world_size=2)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_the_note_says_what_the_save_was(tmp_path: Path) -> None:
    note = read_note(publish(tmp_path, 3, scheduled=False, finished=True))
    assert note is not None
    assert (note.world_size, note.scheduled, note.diverging, note.finished) == (2, False, False, True)
    assert note.files.keys() == {path.name for path in (tmp_path / "checkpoint-3").iterdir()} - {NOTE_FILE}
    assert read_note(write(tmp_path / "checkpoint-4")) is None


def test_a_broken_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").touch()
    assert checkpoint_defect(publish(tmp_path, 3), resumable=True) is None


def rotated(folder: Path, newest: int, **options: object) -> list[int]:
    rotate_checkpoints(folder, folder / f"checkpoint-{newest}", **options)  # type: ignore[arg-type]
    assert not (folder / INCOMPLETE).exists()
    return sorted(checkpoint_step(path) for path in folder.iterdir())


def test_rotation_counts_scheduled_checkpoints_and_spares_the_protected(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        publish(tmp_path, step)
    assert rotated(tmp_path, 12, keep=None) == [3, 6, 9, 12]
    assert rotated(tmp_path, 12, keep=2, protected=[tmp_path / "checkpoint-3"]) == [3, 9, 12]
    assert rotated(tmp_path, 12, keep=1) == [12]


def test_an_interruption_s_checkpoint_displaces_no_scheduled_one_and_goes_with_the_next(tmp_path: Path) -> None:
    for step in (3, 6):
        publish(tmp_path, step)
    publish(tmp_path, 7, scheduled=False)
    assert rotated(tmp_path, 7, keep=2) == [3, 6, 7]
    publish(tmp_path, 8, scheduled=False)
    assert rotated(tmp_path, 8, keep=2) == [3, 6, 8]
    assert [path.name for path in complete_checkpoints(tmp_path, scheduled=True)] == ["checkpoint-3", "checkpoint-6"]
    publish(tmp_path, 9)
    assert rotated(tmp_path, 9, keep=None) == [3, 6, 9]


def test_the_last_good_checkpoint_outlives_diverging_ones(tmp_path: Path) -> None:
    for step, diverging in ((3, False), (6, False), (9, True), (12, True), (15, True)):
        publish(tmp_path, step, diverging=diverging)
    assert rotated(tmp_path, 15, keep=2) == [6, 12, 15]
    publish(tmp_path, 18)
    assert rotated(tmp_path, 18, keep=2) == [15, 18]


def test_checkpoints_of_another_run_and_broken_ones_go_first(tmp_path: Path) -> None:
    for step in (3, 6, 1000):
        publish(tmp_path, step)
    cut("optimizer.pt")(publish(tmp_path, 5))
    assert rotated(tmp_path, 6, keep=2) == [3, 6]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = publish(tmp_path, 3)
    write(tmp_path / INCOMPLETE / "checkpoint-6")
    for _ in range(2):
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [checkpoint]


def test_files_are_replaced_so_that_no_mixture_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.safetensors", "b.txt", "sub/c.txt", "config.json", "results.json")
    folder = tmp_path / "folder"
    for generation, parent in (("old", folder), ("new", tmp_path / "written")):
        for name in names:
            (parent / name).parent.mkdir(parents=True, exist_ok=True)
            (parent / name).write_text(generation)
    (folder / "stale.safetensors").touch()
    (folder / "checkpoint-3").mkdir()
    seen = []

    def look(*args: object) -> None:
        texts = {name: (folder / name).read_text() for name in names if (folder / name).is_file()}
        seen.append(texts)
        if "results.json" in texts:
            assert len(texts) == len(names)
        if "config.json" in texts:
            assert len({text for name, text in texts.items() if name != "results.json"}) == 1
            assert (folder / "stale.safetensors").exists() == (texts["config.json"] == "old")

    for method in ("unlink", "replace"):
        original = getattr(Path, method)

        def spied(self: Path, *args: object, original: Callable[..., None] = original, **kwargs: object) -> None:
            look()
            original(self, *args, **kwargs)
            look()

        monkeypatch.setattr(Path, method, spied)
    publish_files(tmp_path / "written", folder, last=("config.json", "results.json"), replaced="*.safetensors")
    assert seen[0] == dict.fromkeys(names, "old")
    assert seen[-1] == dict.fromkeys(names, "new")
    assert len(seen) >= 2 * (2 + 1 + 5)
    assert {path.name for path in folder.iterdir()} == {*(Path(name).parts[0] for name in names), "checkpoint-3"}
    assert not (tmp_path / "written").exists()


def test_json_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "note.json", {"ä": 1})
    assert (tmp_path / "note.json").read_text(encoding="utf-8") == '{\n  "ä": 1\n}\n'
    contents = []
    original = Path.replace

    def spied(self: Path, target: Path) -> Path:
        contents.append((json.loads(self.read_text()), json.loads(target.read_text())))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", spied)
    write_json(tmp_path / "note.json", [2])
    assert contents == [([2], {"ä": 1})]
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
