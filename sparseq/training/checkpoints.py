"""What a complete checkpoint is, and how one comes to be: written aside, then renamed, so whole or not at all."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

NOTE_FILE = "saved_files.json"
# Trainer's own scans look for "checkpoint-*"; the underscore also keeps it out of pushes to the Hub.
INCOMPLETE = "_incomplete"

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
# Folders that FSDP and DeepSpeed write in place of single files.
_SHARDED_WEIGHTS = ("pytorch_model_fsdp*", "global_step*")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


@dataclass(frozen=True)
class CheckpointNote:
    """What a save of `SparseqTrainer` says about itself, in `saved_files.json`.

    Attributes:
        files: Size in bytes of every file, by its path in the checkpoint.
        world_size: Processes of the run.
        scheduled: False for a checkpoint that exists only because the run was asked to stop.
        diverging: The training loss was far above its lowest when it was saved.
        finished: The training ended with it.
    """

    files: dict[str, int]
    world_size: int
    scheduled: bool
    diverging: bool
    finished: bool


def checkpoint_step(checkpoint: str | Path) -> int:
    """The optimizer step in the name of a checkpoint."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"A checkpoint is called checkpoint-STEP, but {checkpoint} is not.")
    return int(match[1])


def checkpoint_defect(checkpoint: str | Path, *, resumable: bool = False) -> str | None:
    """Why a checkpoint is not whole, or None if it is.

    Cheap, whatever the size of the weights: sizes are compared with those noted at the save. For a save without a note
    (a stock Trainer's) each safetensors file is compared with its header, and each file of `torch.save` must have its
    table of contents, which stands at the end.

    Args:
        checkpoint: A folder written by `Trainer` or `SparseqTrainer`.
        resumable: Ask for the state of optimizer, schedule and random numbers as well.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    defect = _differs_from_note(checkpoint) if (checkpoint / NOTE_FILE).is_file() else _looks_cut_short(checkpoint)
    return defect or (_lacks_training_state(checkpoint) if resumable else None)


def complete_checkpoints(folder: str | Path, *, scheduled: bool = False) -> list[Path]:
    """The checkpoints of a `Trainer` run that were saved whole, oldest first.

    Args:
        folder: The run's `output_dir`; it may be absent.
        scheduled: Leave out those that exist only because the run was interrupted.
    """
    whole = [path for path in _checkpoints(folder) if checkpoint_defect(path) is None]
    return [path for path in whole if not scheduled or _is_scheduled(path)]


def last_complete_checkpoint(folder: str | Path, *, warn: bool = True) -> Path | None:
    """The newest checkpoint that a run can go on from.

    Args:
        folder: The run's `output_dir`; it may be absent.
        warn: Log a warning for each newer checkpoint that is left aside, with the reason.
    """
    for path in reversed(_checkpoints(folder)):
        defect = checkpoint_defect(path, resumable=True)
        if defect is None:
            return path
        if warn:
            logger.warning(f"{path} is not used: {defect}.")
    return None


def read_note(checkpoint: str | Path) -> CheckpointNote | None:
    """What `SparseqTrainer` noted at the save; None for other saves."""
    try:
        return CheckpointNote(**json.loads((Path(checkpoint) / NOTE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def publish_checkpoint(
    written: str | Path,
    target: str | Path,
    *,
    world_size: int,
    scheduled: bool = True,
    diverging: bool = False,
    finished: bool = False,
) -> None:
    """Give a checkpoint that was written aside its name: from then on, and not before, it exists.

    Every process must have written its files. The data reach the disk before the name does, so this holds for a power
    failure too. A folder of that name, such as an incomplete save of another program, is replaced.

    Args:
        written: The folder that holds the files; on the file system of `target`.
        target: Where the checkpoint is to be.
        world_size, scheduled, diverging, finished: As in `CheckpointNote`.
    """
    written, target = Path(written), Path(target)
    sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in _files(written)}
    note = CheckpointNote(sizes, world_size, scheduled, diverging, finished)
    (written / NOTE_FILE).write_text(json.dumps(asdict(note), indent=2) + "\n", encoding="utf-8")
    _flush_tree(written)
    if target.exists():
        delete_checkpoint(target)
    written.rename(target)
    _flush(target.parent)
    _remove_if_empty(written.parent)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; killed half-way, it leaves nothing under its name."""
    aside = checkpoint.parent / INCOMPLETE / f"deleted-{checkpoint.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)
    _remove_if_empty(aside.parent)


def rotate_checkpoints(
    folder: str | Path, newest: Path, *, keep: int | None, protected: Collection[str | Path] = ()
) -> None:
    """Delete what a checkpoint just saved makes superfluous.

    Kept are the newest `keep` scheduled checkpoints, `newest` itself, the protected ones, and, if `newest` was saved
    while the loss diverged, the last one from before. A checkpoint that was saved because of an interruption is no
    longer needed once there is a later one. Checkpoints of later steps than `newest` are not of this run: they go
    first.

    Args:
        folder: The run's `output_dir`.
        newest: The checkpoint just saved.
        keep: Scheduled checkpoints to keep; None or 0 keeps them all.
        protected: Checkpoints that stay in any case, such as the best one.
    """
    step = checkpoint_step(newest)
    stay = {newest.resolve(), *(Path(path).resolve() for path in protected)}
    older = [path for path in _checkpoints(folder) if checkpoint_step(path) < step]
    whole = [path for path in older if checkpoint_defect(path) is None and _is_scheduled(path)]
    good = [path for path in whole if not _is_diverging(path)]
    if _is_diverging(newest) and good:
        stay.add(good[-1].resolve())
    if keep:
        room = keep - _is_scheduled(newest)
        stay |= {path.resolve() for path in whole[-room:]} if room > 0 else set()
        superfluous = _checkpoints(folder)
    else:
        superfluous = [path for path in older if not _is_scheduled(path)]
    for path in superfluous:
        if path.resolve() not in stay:
            delete_checkpoint(path)


def remove_leftovers(folder: str | Path) -> None:
    """Delete what a killed run was writing or deleting in `folder`."""
    leftovers = Path(folder) / INCOMPLETE
    if leftovers.exists():
        shutil.rmtree(leftovers)


def publish_files(written: str | Path, folder: str | Path, *, last: Sequence[str], replaced: str = "") -> None:
    """Move the files of one folder into another so that a kill leaves nothing in between that looks complete.

    First the files named in `last` are deleted from `folder`, backwards; then all other files are moved, each at once;
    then those in `last`, in order. So whoever finds the n-th of them finds all before it, and nothing of an earlier
    save among them.

    Args:
        written: The folder that holds the files, on the same file system; it is deleted.
        folder: Where they are to be; its other files stay.
        last: Names of files without which the rest does not look complete.
        replaced: Pattern of files in `folder` to delete if `written` has none of that name.
    """
    written, folder = Path(written), Path(folder)
    _flush_tree(written)
    for name in reversed(last):
        (folder / name).unlink(missing_ok=True)
    names = [path.relative_to(written).as_posix() for path in _files(written)]
    for stale in folder.glob(replaced) if replaced else ():
        if stale.name not in names:
            stale.unlink()
    # The deletions must be on the disk before what follows is.
    _flush(folder)
    for name in [*(name for name in names if name not in last), *(name for name in last if name in names)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in last:
            _flush(folder)
        (written / name).replace(folder / name)
    _flush(folder)
    shutil.rmtree(written)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` so that the file has its old content or all of the new one, at any moment."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def _checkpoints(folder: str | Path) -> list[Path]:
    """All folders that are called checkpoints, by step."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=checkpoint_step)


def _is_scheduled(checkpoint: Path) -> bool:
    note = read_note(checkpoint)
    return note is None or note.scheduled


def _is_diverging(checkpoint: Path) -> bool:
    note = read_note(checkpoint)
    return note is not None and note.diverging


def _differs_from_note(checkpoint: Path) -> str | None:
    note = read_note(checkpoint)
    if note is None:
        return f"{NOTE_FILE} cannot be read"
    for name, size in note.files.items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, saved were {size:,} (if you have changed it, delete {NOTE_FILE})"
    return None


def _looks_cut_short(checkpoint: Path) -> str | None:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is cut short"
    weights = [name for name in (*_WEIGHTS, *_INDICES) if (checkpoint / name).is_file()]
    if not weights and not _any_match(checkpoint, _SHARDED_WEIGHTS):
        return "it has no weights"
    for name in set(weights) & set(_INDICES):
        try:
            shards = set(json.loads((checkpoint / name).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{name} is cut short"
        if absent := sorted(shard for shard in shards if not (checkpoint / shard).is_file()):
            return f"{absent[0]} is missing"
    for path in _files(checkpoint):
        is_whole = {".safetensors": _is_whole_safetensors}.get(path.suffix, _is_whole_archive)
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin") and not is_whole(path):
            return f"{path.relative_to(checkpoint).as_posix()} is cut short"
    ranks = {int(path.stem.rpartition("_")[2]) for path in checkpoint.glob("rng_state_[0-9]*.pth")}
    if gaps := set(range(len(ranks))) - ranks:
        return f"rng_state_{min(gaps)}.pth is missing"
    return None


def _lacks_training_state(checkpoint: Path) -> str | None:
    if not _any_match(checkpoint, _OPTIMIZERS):
        return "it has no state of the optimizer, only weights"
    if not _any_match(checkpoint, ("rng_state*.pth",)):
        return "it has no state of the random numbers"
    return None


def _any_match(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says: 8 bytes with the header's length, the header, the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, IndexError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of `torch.save`, a zip archive, has its end. Other formats cannot be judged and pass."""
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) if start == b"PK" else bool(start)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush_tree(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    # Windows can neither open a folder nor flush what was opened for reading.
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
