"""Reading aligned parallel text: one sentence a line, one file per language, optionally gzip-compressed."""

import gzip
import hashlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ParallelReport:
    """What was read, and what was left out of it.

    Attributes:
        split: Name of the split, such as "train".
        pairs: Aligned lines found in the two files.
        empty_source: Pairs whose source side is empty or blank.
        empty_target: Pairs whose target side is empty or blank (pairs with two empty sides count in both).
        too_long: Pairs with a side longer than the limit in tokens, counted when the text is tokenised.
        kept: Pairs that remain. Only training drops pairs: evaluation keeps every line, so scores compare.
        files: File name to the SHA-256 of the bytes on disk.
    """

    split: str
    pairs: int
    empty_source: int = 0
    empty_target: int = 0
    too_long: int = 0
    kept: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (self.empty_source, "with an empty source"),
                (self.empty_target, "with an empty target"),
                (self.too_long, "too long"),
            )
            if count
        ]
        details = f" ({', '.join(left_out)})" if left_out else ""
        return f"{self.split}: {self.kept:,} of {self.pairs:,} sentence pairs{details}"


@dataclass(frozen=True)
class ParallelText:
    """Aligned sentences: `sources[i]` is translated by `targets[i]`."""

    sources: list[str]
    targets: list[str]
    report: ParallelReport

    def __len__(self) -> int:
        return len(self.sources)


def read_parallel(
    folder: str | Path, split: str, source: str, target: str, *, drop_empty: bool | None = None
) -> ParallelText:
    """Read `{split}.{source}` and `{split}.{target}` (or `.gz`) from `folder`.

    Lines end at "\\n" alone (a preceding "\\r" is dropped), so that a form feed or U+2028 inside a sentence cannot
    shift the alignment. A leading byte order mark is ignored. The plain file is preferred to its `.gz`.

    Args:
        folder: Folder with one file per split and language.
        split: Name of the split, such as "train" or "test_2016_flickr".
        source: Suffix of the source file, such as "en".
        target: Suffix of the target file, such as "de".
        drop_empty: Whether pairs with an empty side are left out. Default: only when `split` is "train".

    Raises:
        FileNotFoundError: A file is missing; the message lists what the folder holds.
        ValueError: The files do not have the same number of lines, hold nothing, or are not UTF-8.
    """
    folder = Path(folder)
    source_path, target_path = _find(folder, split, source), _find(folder, split, target)
    source_data, target_data = source_path.read_bytes(), target_path.read_bytes()
    sources, targets = split_lines(source_path, source_data), split_lines(target_path, target_data)
    if len(sources) != len(targets):
        raise ValueError(
            f"{source_path} has {len(sources):,} lines and {target_path} has {len(targets):,}: line i of one must "
            "translate line i of the other. Check that both files come from the same release of the corpus."
        )
    if not sources:
        raise ValueError(f"{source_path} and {target_path} are empty: no sentence pair to read.")

    blank_source = [not line.strip() for line in sources]
    blank_target = [not line.strip() for line in targets]
    pairs = len(sources)
    if split == "train" if drop_empty is None else drop_empty:
        keep = [not (a or b) for a, b in zip(blank_source, blank_target, strict=True)]
        if not any(keep):
            raise ValueError(f"Every pair of {source_path} and {target_path} has an empty side: nothing to train on.")
        sources = [line for line, kept in zip(sources, keep, strict=True) if kept]
        targets = [line for line, kept in zip(targets, keep, strict=True) if kept]
    report = ParallelReport(
        split=split,
        pairs=pairs,
        empty_source=sum(blank_source),
        empty_target=sum(blank_target),
        kept=len(sources),
        files={
            path.name: hashlib.sha256(data).hexdigest()
            for path, data in ((source_path, source_data), (target_path, target_data))
        },
    )
    return ParallelText(sources, targets, report)


def _find(folder: Path, split: str, language: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Expected files named {{split}}.{{language}}[.gz] in it.")
    for name in (f"{split}.{language}", f"{split}.{language}.gz"):
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    listing = ", ".join(names[:30]) + (f", ... ({len(names)} files)" if len(names) > 30 else "")
    raise FileNotFoundError(
        f"{folder} has no {split}.{language} or {split}.{language}.gz. It has: {listing or 'nothing'}."
    )


def split_lines(path: Path, data: bytes) -> list[str]:
    """Lines of a UTF-8 file's bytes, decompressed if its name ends with .gz, without a byte order mark.

    Raises:
        ValueError: The data cannot be decompressed, or is not UTF-8.
    """
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed ({error}). Is the download complete?") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). Convert the file first, for instance "
            "with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    # str.splitlines would also split at form feeds, U+0085 and U+2028, which occur inside crawled sentences.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
