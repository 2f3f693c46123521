"""The license of a checkpoint, which what is made of it comes under as well."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sparseq.conversion.sources import LEGAL_FILES
from sparseq.hub.facts import facts_of_card, hub_id
from sparseq.hub.folder import CARD, write_files
from sparseq.model_folder import copy_files


def origin_facts(name: str, folder: Path) -> dict[str, Any]:
    """What has to be said of a checkpoint wherever a model that was made of it goes.

    Args:
        name: The folder or repository that the user named.
        folder: Its files.

    Returns:
        `license`, by its identifier on the Hub, and `base_model`, the id of its repository there or of the one that
        its card names; without what is not known.
    """
    path = folder / CARD
    card = facts_of_card(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    # Of a folder nobody else could tell what it was, but its card may say what it comes from.
    facts = {"license": card.license, "base_model": hub_id(name) or card.base_model}
    return {key: value for key, value in facts.items() if value}


def license_note(facts: dict[str, Any], folder: Path) -> str:
    """What a user should know of the license, in a sentence."""
    files = sorted(path.name for pattern in LEGAL_FILES for path in folder.glob(pattern))
    if "license" in facts:
        return f"The source has the license {facts['license']}, which a model that is made of it keeps."
    if files:
        return f"README.md of the source names no license; {', '.join(files)} is copied."
    return "No license was found in the source: find out under which one it is before you pass the model on."


def carry_license(facts: dict[str, Any], source: Path, folder: Path, *, text: str = "") -> None:
    """Copy the files of a license, and write the facts as the metadata of a README.md, where `sparseq card` finds them
    and a push takes them along, with `text` below."""
    copy_files(source, folder, LEGAL_FILES)
    metadata = f"---\n{ModelCardData(**facts).to_yaml()}\n---\n" if facts else ""
    if metadata or text:
        write_files({CARD: metadata + text}, folder)
