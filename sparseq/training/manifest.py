"""The manifest of a run: what is needed to repeat it."""

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sparseq
from sparseq.hub.card import describe_hardware
from sparseq.training.recipes import Recipe

_VERSIONED = ("torch", "transformers", "accelerate", "tokenizers", "sacrebleu")


def manifest(
    recipe: Recipe,
    data: Mapping[str, Mapping[str, Any]],
    *,
    vocab_size: int,
    start_sha256: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Versions, commit, seed, recipe, and hashes of the data and of the checkpoint.

    Args:
        recipe: What was run.
        data: Name of each split to its report as plain values, the hashes of its files among them.
        vocab_size: Tokens of the tokenizer.
        start_sha256: Hashes of the files of the checkpoint that the run began with.
    """
    versioned = (*_VERSIONED, "peft") if recipe.lora is not None else _VERSIONED
    return {
        "recipe": {"name": recipe.name, **recipe.to_dict()},
        "seed": recipe.seed,
        "vocab_size": vocab_size,
        "data": {split: dict(report) for split, report in data.items()},
        **({"start": _start(recipe, start_sha256)} if start_sha256 else {}),
        "versions": {
            "sparseq": sparseq.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in versioned},
        },
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "hardware": describe_hardware(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def _start(recipe: Recipe, sha256: Mapping[str, str]) -> dict[str, Any]:
    """The checkpoint that the run began with. Later nobody could tell an id of the Hub from the path of a folder."""
    name = recipe.start.checkpoint if recipe.start is not None else None
    return {"sha256": dict(sha256), **({"hub_id": name} if name and not Path(name).is_dir() else {})}


def _commit() -> str | None:
    """Commit of the clone that this package runs from, with "-dirty" for local changes; None outside a clone."""
    root = Path(sparseq.__file__).resolve().parent.parent
    # In site-packages a repository found further up would be someone else's.
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
