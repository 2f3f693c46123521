"""The output folder of a run: whose it is, and whether the run in it can go on."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.hub.facts import facts_of_card, facts_of_run, is_draft, merge_facts
from sparseq.hub.folder import CARD, write_card
from sparseq.training.checkpoints import (
    INCOMPLETE,
    complete_checkpoints,
    publish_files,
    remove_leftovers,
    write_json,
)
from sparseq.training.recipes import Recipe
from sparseq.training.sections import DataRecipe, ScoringRecipe, TextRecipe, TrainingRecipe
from sparseq.training.start import Checkpoint
from sparseq.training.text import GENERATED_DATA

RESULTS_FILE = "results.json"
MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
CACHE = "cache"
MERGED = "merged"
_RECIPE_FILE = "recipe.json"
_TEXT_FILE = "text.json"
_START_FILE = "start.json"
# Where the text lies may change between a run and its continuation: its files are hashed.
_PLACES = ("folder", "dataset", "files", "train_files", "validation_files", "test_files", "streaming")


def prepare_output(recipe: Recipe, output_dir: Path, *, resume: bool) -> None:
    """Check or clear what an earlier run left, and note the recipe."""
    note = output_dir / _RECIPE_FILE
    wanted = recipe.to_dict()
    if resume and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        different = _differences(_decisive(found), _decisive(wanted))
        if different and complete_checkpoints(output_dir / CHECKPOINTS):
            raise ValueError(
                f"{output_dir} holds a run of another recipe: {', '.join(different)}. Give another output folder, or "
                "start over with --no-resume, which deletes that run's checkpoints."
            )
        if different:
            # Killed before its first checkpoint; its tokenizer and corpus are not this recipe's.
            _delete_run(output_dir)
    elif note.is_file():
        _delete_run(output_dir)
    elif output_dir.is_dir() and any((output_dir / name).exists() for name in (CHECKPOINTS, TOKENIZER)):
        raise ValueError(
            f"{output_dir} holds checkpoints or a tokenizer of another program. Give another output folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    write_json(note, wanted)


def _delete_run(output_dir: Path) -> None:
    for name in (CHECKPOINTS, TOKENIZER, GENERATED_DATA):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    # Results must not stand beside the checkpoints of another run.
    for name in (RESULTS_FILE, MANIFEST_FILE, _TEXT_FILE, _START_FILE):
        (output_dir / name).unlink(missing_ok=True)


def check_same_text(output_dir: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to continue on other text than the tokenizer and the checkpoints were made from; else note its hashes.

    Args:
        output_dir: The run's folder.
        files: Name of each split that training reads, to the hashes of its files.
    """
    note = output_dir / _TEXT_FILE
    wanted = {split: dict(hashes) for split, hashes in files.items()}
    has_work = (output_dir / TOKENIZER).is_dir() or bool(complete_checkpoints(output_dir / CHECKPOINTS))
    if has_work and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        # By hash alone: the same text may lie elsewhere now. In order: another order is another text.
        changed = [split for split in wanted if list(found.get(split, {}).values()) != list(wanted[split].values())]
        if changed:
            raise ValueError(
                f"{output_dir} holds a run on other text: the files of {', '.join(changed)} have changed or are "
                "others. Give another output folder, or start over with --no-resume."
            )
    write_json(note, wanted)


def check_same_checkpoint(output_dir: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Refuse to go on from another checkpoint than the run began with; returns the hashes of its files."""
    note = output_dir / _START_FILE
    wanted = checkpoint.sha256()
    if complete_checkpoints(output_dir / CHECKPOINTS) and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != wanted:
            changed = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise ValueError(
                f"{output_dir} holds a run that began with another checkpoint: {', '.join(changed)} of "
                f"{checkpoint.name} have changed or are others. Give another output folder, or start over with "
                "--no-resume."
            )
    write_json(note, wanted)
    return wanted


def publish_run(
    output_dir: Path,
    write: Callable[[Path], None],
    *,
    config: SparseqConfig,
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Fill the folder of a finished run, so that it is ready to be pushed.

    Args:
        output_dir: The run's folder.
        write: Writes model, tokenizer and whatever else belongs to the run into the folder that it is given.
        config: Configuration of the model, for its card.
        results, manifest: For `results.json` and `manifest.json`.
    """
    # Written aside and moved at the end, the results last: a folder that has them has everything.
    folder = output_dir / INCOMPLETE
    write(folder)
    write_json(folder / RESULTS_FILE, results)
    write_json(folder / MANIFEST_FILE, manifest)
    _write_cards(folder, config, earlier=output_dir)
    publish_files(
        folder,
        output_dir,
        last=(f"{MERGED}/config.json", "config.json", "adapter_config.json", MANIFEST_FILE, RESULTS_FILE),
        replaced="*.safetensors*",
    )


def _write_cards(folder: Path, config: SparseqConfig, *, earlier: Path) -> None:
    """Cards for the model or adapter in `folder` and for a merged model below it. What its owner has added to the
    metadata of an `earlier` card, such as a license, stays, and so does a card whose text is not a program's."""
    facts = facts_of_run(folder)
    for place in [folder, *([folder / MERGED] if (folder / MERGED).is_dir() else [])]:
        own = facts if place == folder else replace(facts, adapter=None)
        card = earlier / place.relative_to(folder) / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        write_card(place, config, merge_facts(own, facts_of_card(text)))
        if not is_draft(text):
            (place / CARD).write_text(text, encoding="utf-8")


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """What must not change between a run and its continuation, flat."""
    free = {
        "logging_steps",
        "save_steps",
        "eval_steps",
        "max_steps",
        "average_checkpoints",
        "save_merged",
        "final_weights",
        "report_to",
    }
    # The checkpoint may have moved: its files are hashed.
    free |= {"checkpoint", "revision"}
    if recipe["training"]["lr_scheduler"] in ("linear", "cosine"):
        free.remove("max_steps")
    flat = {"seed": recipe["seed"]}
    for section in ("model", "tokenizer", "data", "training", "start", "lora", "text", "denoising"):
        flat |= {f"{section}.{key}": value for key, value in recipe.get(section, {}).items() if key not in free}
    figure = recipe["training"].get("metric", "loss")
    if figure != "loss":
        # One run's evaluations must compare: they choose its weights and its end.
        options = ScoringRecipe(**recipe.get("scoring", {})).options_of(figure)
        flat |= {f"scoring.{name}": value for name, value in options.items()}
    flat |= {section: "used" if section in recipe else "not used" for section in ("start", "lora", "text")}
    # What a recipe of an earlier version does not say had the value that is now the default.
    now = {"data": asdict(DataRecipe()), "training": asdict(TrainingRecipe())}
    defaults = {f"{section}.{key}": now[section][key] for section in now for key in now[section] if key not in free}
    flat = defaults | flat
    flat["data.pairs"] = [place.name for place in DataRecipe(pairs=recipe["data"].get("pairs")).places()]
    if "text" in recipe:
        flat["text.languages"] = [place.language for place in TextRecipe(**recipe["text"]).places()]
    places = {f"{section}.{name}" for section in ("data", "text") for name in _PLACES}
    return {key: value for key, value in flat.items() if key not in {"data.test", *places}}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    keys = sorted(found.keys() | wanted.keys())
    return [f"{key} was {found.get(key)}, is {wanted.get(key)}" for key in keys if found.get(key) != wanted.get(key)]
