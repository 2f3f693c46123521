"""Lines of text files, one after another: alignment survives odd characters, and memory stays flat."""

import difflib
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOREIGN = (".bz2", ".xz", ".zst", ".zip", ".7z", ".lz4", ".Z")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed if its name ends with .gz, without a byte order mark.

    Lines end at "\\n" alone (a preceding "\\r" is dropped), so that a form feed or U+2028 inside a sentence cannot
    shift an alignment.

    Raises:
        ValueError: The file cannot be decompressed, or is not UTF-8; the message names the line.
    """
    return _as_text(read_raw_lines(path), path)


def read_stream(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of an open stream, such as standard input, as `read_lines` has them, each as soon as it is there.

    Args:
        stream: Lines with their ends.
        name: Of the stream, for messages.

    Raises:
        ValueError: A line is not UTF-8.
    """
    return _as_text(_raw_lines(stream), name)


def read_raw_lines(path: Path) -> Iterator[str | bytes]:
    """As `read_lines`, but a line that is not UTF-8 comes as its bytes.

    Raises:
        ValueError: The file cannot be decompressed.
    """
    try:
        with _open(path) as stream:
            yield from _raw_lines(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}). Is the download complete?") from error


def not_utf8(path: Path | str, number: int, line: bytes) -> str:
    """The message for a line that is not UTF-8."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        position = error.start
    return (
        f"{path}, line {number}: not UTF-8 (byte 0x{line[position]:02x}). Convert the file first, for instance with "
        "`iconv -f LATIN1 -t UTF-8`."
    )


def file_hash(path: Path) -> str:
    """SHA-256 of the bytes on disk."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_names(folder: Path) -> list[str]:
    """The files of a folder, sorted; none where there is no folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def near_name(name: str, names: Sequence[str]) -> str:
    """A question, after a blank, whether the nearest of `names` was meant; empty where none is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def near_file(path: Path) -> str:
    """`near_name` for a file that is missing, and those beside it."""
    return near_name(path.name, file_names(path.parent))


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Name of each file to the SHA-256 of its bytes on disk; a name that comes again gets its number."""
    hashes: dict[str, str] = {}
    for number, path in enumerate(paths, start=1):
        hashes[path.name if path.name not in hashes else f"{path.name} ({number})"] = file_hash(path)
    return hashes


def _raw_lines(stream: Iterable[bytes]) -> Iterator[str | bytes]:
    for number, line in enumerate(stream):
        if number == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            yield line


def _as_text(lines: Iterable[str | bytes], name: Path | str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if isinstance(line, bytes):
            raise ValueError(not_utf8(name, number, line))
        yield line


def _open(path: Path) -> IO[bytes]:
    if path.suffix in _FOREIGN:
        raise ValueError(f"{path} is compressed in a way that is not read: decompress it, or compress it with gzip.")
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))
