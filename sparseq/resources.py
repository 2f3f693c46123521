"""Where the files that are not code live: `recipes/*.yaml` and `model_card.md`.

A wheel carries them inside the package; a clone (or an editable install of one) has them beside it.
"""

from pathlib import Path, PurePosixPath

_PACKAGE = Path(__file__).resolve().parent


def resource_path(name: str) -> Path:
    """Finds a file or folder that travels with Sparseq.

    Args:
        name: Path with forward slashes, relative to the root of the repository, for example `"recipes"`,
            `"recipes/tiny.yaml"` or `"model_card.md"`.

    Returns:
        The absolute path of an existing file or folder.

    Raises:
        ValueError: `name` is empty, absolute, or climbs out with `..`.
        FileNotFoundError: Neither the installed package nor the clone holds it; the message lists its neighbours.
    """
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"a resource is named by a relative path without '..', such as 'model_card.md', not {name!r}")
    roots = _roots()
    for root in roots:
        path = root / relative
        if path.exists():
            return path
    folders = [root / relative.parent for root in roots]
    neighbours = sorted({entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()})
    if len(relative.parts) > 1 and neighbours:
        raise FileNotFoundError(f"{name!r} does not travel with sparseq; {relative.parent} holds {neighbours}")
    searched = " and ".join(str(root) for root in roots)
    raise FileNotFoundError(
        f"{name!r} was found neither with the installed package nor in a clone (searched {searched}); "
        "if it should be there, reinstall sparseq"
    )


def _roots() -> list[Path]:
    clone = _PACKAGE.parent
    # In site-packages the parent folder belongs to every installed package: only a clone's counts.
    return [_PACKAGE, clone] if (clone / "pyproject.toml").is_file() else [_PACKAGE]
