"""Writing a model's folder: complete or not there at all, and with its tokenizer."""

import contextlib
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "target_vocab.json", "merges.txt", "*.model", "*.spm", "*.tokenizer", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*processor_config.json"),
)

GRAPH_FOLDER = ".sparseq"
"""Folder beside a model in which a translator keeps the graphs that it made of it. It may be removed at any time."""

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    What a process that was killed meanwhile has left is reported in the log, and stays.

    Args:
        output: The folder to be; `check_new_folder` says what may be there already.
        force: Replace a folder that is there.

    Raises:
        FileExistsError: As `check_new_folder`.
    """
    output = Path(output).absolute()
    check_new_folder(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    for sentence in _remains(output):
        _logger.warning(sentence)
    partial = _beside(output, "partial")
    try:
        partial.mkdir()
        yield partial
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(output: str | Path, *, force: bool = False, keep: Sequence[str | Path] = ()) -> None:
    """Check that `output` may be written, before work is done that would be lost.

    Args:
        output: The folder to be. It may exist if it is empty; with `force`, also if it holds files but no folders, as
            a model's does, of which `GRAPH_FOLDER` is no part.
        force: Replace a folder that is there.
        keep: What must not be replaced, such as the folders that are read.

    Raises:
        FileExistsError: It must not be written.
    """
    output = Path(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file; name a folder to write the model into.")
    if inside := [path for path in keep if Path(path).resolve().is_relative_to(output.resolve())]:
        raise FileExistsError(f"{output} holds {inside[0]}, which is read and must stay: name another folder.")
    if not force:
        raise FileExistsError(f"{output} is there already: name another folder, or replace it with --force.")
    if nested := sorted(path.name for path in output.iterdir() if path.is_dir() and path.name != GRAPH_FOLDER):
        raise FileExistsError(
            f"--force replaces a model's folder, but {output} holds other folders ({', '.join(nested[:5])}), as a "
            "run's does: remove it yourself, or name another."
        )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a model's tokenizer as they are; none where there is no tokenizer."""
    copy_files(source, folder, TOKENIZER_FILES)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a folder, not of folders in it, whose names fit one of the patterns."""
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)


def _put_in_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = _beside(output, "old")
    output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remains(output: Path) -> Iterator[str]:
    """What earlier writers of `output` have left beside it, in sentences: they may be at work still."""
    hidden = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    for path in sorted(output.parent.iterdir()):
        match = hidden.fullmatch(path.name)
        if match and match[1] == "partial":
            yield f"{path} is unfinished: remove it, unless the process that writes {output} is still running."
        elif match:
            yield f"{path} is an earlier {output.name} that was being replaced: remove it, or move it back."


def _beside(output: Path, purpose: str) -> Path:
    """A hidden name that nobody else has, on the same file system."""
    return output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.{purpose}"
