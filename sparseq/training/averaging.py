"""Averaging the weights of several checkpoints (Vaswani et al. 2017, section 6.1)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a `Trainer` run that were saved whole, oldest first.

    `Trainer` writes `trainer_state.json` last, so a save that was cut short lacks it or holds half of it. A folder
    without weights is not whole either.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps) if _is_complete(steps[step])]


def average_checkpoints(checkpoints: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Mean of the weights of several checkpoints.

    Tensors are read one at a time and summed in float32, so memory holds one model and one tensor. Tensors of integers
    are taken from the last checkpoint.

    Args:
        checkpoints: Folders with `model.safetensors`, or its shards and their index; all of one architecture.

    Returns:
        Name to tensor, in the data type that the last checkpoint stores. Tied weights are stored once: load with
        `strict=False`.

    Raises:
        ValueError: There are no checkpoints, or their tensors differ in name or shape.
        FileNotFoundError: A folder has no safetensors weights.
    """
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    if not folders:
        raise ValueError("There is no checkpoint to average.")
    files = [_tensor_files(folder) for folder in folders]
    for folder, tensors in zip(folders, files, strict=True):
        if tensors.keys() != files[-1].keys():
            odd = sorted(tensors.keys() ^ files[-1].keys())[:5]
            raise ValueError(f"{folder} and {folders[-1]} hold different tensors, for instance {', '.join(odd)}.")
    averaged = {}
    for name in files[-1]:
        last = _read(files[-1][name], name)
        if not last.is_floating_point():
            averaged[name] = last
            continue
        total = torch.zeros_like(last, dtype=torch.float32)
        for folder, tensors in zip(folders, files, strict=True):
            tensor = _read(tensors[name], name)
            if tensor.shape != last.shape:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} in {folder} but {tuple(last.shape)} in {folders[-1]}: only "
                    "checkpoints of one model can be averaged."
                )
            total += tensor
        averaged[name] = (total / len(folders)).to(last.dtype)
    return averaged


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / _SINGLE).is_file() or (checkpoint / _INDEX).is_file()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor to the file that holds it."""
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / _SINGLE).is_file():
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")
    with safe_open(folder / _SINGLE, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), folder / _SINGLE)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(name)
