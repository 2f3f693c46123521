"""Parallel text, read from anywhere, its defects counted, and held in memory or on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from sparseq.data.cleaning import Defect, Inspector, Policy, add_up, describe_defects
from sparseq.data.sources import FilePair, PairSource, find_in_folder
from sparseq.data.store import Store, Texts, build, content_key, numbers

# Raised when the same input would give another table.
_FORMAT = 1
_SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string()), ("line", pa.int64())])


@dataclass(frozen=True)
class ParallelReport:
    """What was read, and what was left out of it.

    Attributes:
        split: Name of the split, such as "train".
        pairs: Aligned lines or rows found.
        kept: Pairs that remain.
        defects: Kind of defect (see `sparseq.data.cleaning.DEFECTS`) to its count, first lines and what was done.
        files: File name to the SHA-256 of the bytes on disk.
        unit: "line" or "row", what the numbers in `defects` count.
        language_pair: Such as "en-de", where a run has several; its reports are then `parts` of another.
        parts: The reports that this one adds up.
    """

    split: str
    pairs: int
    kept: int = 0
    defects: Mapping[str, Defect] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    unit: str = "line"
    language_pair: str | None = None
    parts: "tuple[ParallelReport, ...]" = ()

    def count(self, kind: str) -> int:
        """Pairs with a kind of defect."""
        return self.defects[kind].count if kind in self.defects else 0

    @property
    def name(self) -> str:
        """The split, with the language pair where there are several."""
        return f"{self.split} {self.language_pair}" if self.language_pair else self.split

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kept:,} of {self.pairs:,} sentence pairs"]
        if self.parts:
            lines += [f"  {line}" for part in self.parts for line in str(part).splitlines()]
        else:
            lines += [f"  {line}" for line in describe_defects(self.defects, self.unit)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, as the manifest of a run holds it."""
        values = {
            "pairs": self.pairs,
            "kept": self.kept,
            "defects": {kind: asdict(defect) for kind, defect in self.defects.items()},
            "sha256": dict(self.files),
        }
        if self.parts:
            values["language_pairs"] = {part.language_pair: part.to_dict() for part in self.parts}
        return values


@dataclass(frozen=True)
class ParallelText:
    """Aligned sentences: `sources[i]` is translated by `targets[i]`.

    Attributes:
        sources, targets: The text, as lists or, where it lies on disk, as sequences that read it there.
        report: What was read.
        lines: Line or row of each pair in what was read; None if all were kept.
        language: Target language, whose tag is put before the sources; None for no tag.
        key: Names the content, for what is made of it.
        parts: The text of each language pair, where there are several; this one has all of them, in that order.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    report: ParallelReport
    lines: Sequence[int] | np.ndarray | None = None
    language: str | None = None
    key: str = ""
    parts: "tuple[ParallelText, ...]" = ()

    def __len__(self) -> int:
        return len(self.sources)

    def line(self, index: int) -> int:
        """Line or row, from 1, that a pair was read from."""
        return index + 1 if self.lines is None else int(self.lines[index])


def read_parallel(
    folder: str | Path, split: str, source: str, target: str, *, drop_empty: bool | None = None
) -> ParallelText:
    """Read `{split}.{source}` and `{split}.{target}` (or `.gz`) from `folder` into memory.

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
    paths = [find_in_folder(Path(folder), split, side, (source, target)) for side in (source, target)]
    policy = Policy() if (split == "train" if drop_empty is None else drop_empty) else Policy().for_evaluation()
    text = read_pairs(FilePair(*paths), split, policy, language=target)
    return ParallelText(list(text.sources), list(text.targets), text.report, text.lines, target)


def read_pairs(
    source: PairSource,
    split: str,
    policy: Policy,
    *,
    language: str | None = None,
    language_pair: str | None = None,
    max_pairs: int = 0,
    store: Store | None = None,
    progress: bool = False,
) -> ParallelText:
    """Read one language pair of a split, and count its defects.

    Args:
        source: Where it is.
        split: Name of the split, for the report.
        policy: What to do with defects.
        language: Target language, for the tag.
        language_pair: Name of the pair, where the run has several.
        max_pairs: The first so many pairs are read; 0 reads all.
        store: Keeps the text on disk, and reads it from there if it is there already. None: in memory.
        progress: Show how many pairs were read.

    Raises:
        ValueError: The text does not align, holds no usable pair, or has defects that are refused.
    """
    # Defects of tokens are none of the text's business.
    textual = {**asdict(policy), "too_long": None, "unbalanced": None, "max_length_ratio": None}
    made_of = {"files": list(source.files.values()), "options": source.options, "policy": textual}
    key = f"text-{content_key(format=_FORMAT, max_pairs=max_pairs, **made_of)}"
    entry = store.get(key) if store is not None else None
    if entry is None:
        entry = _read(source, policy, max_pairs, key, store, f"reading {split}" if progress else None)
    table, note = entry
    defects = {kind: Defect(**{**values, "lines": tuple(values["lines"])}) for kind, values in note["defects"].items()}
    report = ParallelReport(split, note["pairs"], len(table), defects, source.files, source.unit, language_pair)
    if not len(table):
        reasons = "; ".join(describe_defects(defects, source.unit))
        raise ValueError(f"No pair of {source.name} is left, so there is nothing to train on: {reasons}.")
    lines = None if len(table) == note["pairs"] else numbers(table, "line")
    return ParallelText(Texts(table, "source"), Texts(table, "target"), report, lines, language, key)


def join(split: str, parts: Sequence[ParallelText]) -> ParallelText:
    """The texts of several language pairs as one; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    return ParallelText(
        Chain([part.sources for part in parts]),
        Chain([part.targets for part in parts]),
        join_reports(split, [part.report for part in parts]),
        key=content_key(parts=[part.key for part in parts]),
        parts=tuple(parts),
    )


def join_reports(split: str, reports: Sequence[ParallelReport]) -> ParallelReport:
    """The reports of several language pairs as one; a single one as it is."""
    if len(reports) == 1:
        return reports[0]
    return ParallelReport(
        split,
        pairs=sum(report.pairs for report in reports),
        kept=sum(report.kept for report in reports),
        defects=add_up(report.defects for report in reports),
        files={f"{report.language_pair}: {name}": sha for report in reports for name, sha in report.files.items()},
        parts=tuple(reports),
    )


class Chain(Sequence[Any]):
    """Several sequences one after another; a slice is a list."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number][index - (int(self._ends[number - 1]) if number else 0)]

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part


def _read(
    source: PairSource, policy: Policy, max_pairs: int, key: str, store: Store | None, label: str | None
) -> tuple[Any, dict[str, Any]]:
    inspector = Inspector(policy, source.name, source.unit)

    def batches() -> Iterator[pa.RecordBatch]:
        with tqdm(desc=label, unit=" pairs", unit_scale=True, disable=None if label else True, leave=False) as bar:
            for sources, targets in source.batches():
                room = max_pairs - inspector.pairs if max_pairs else len(sources)
                kept = inspector.inspect(sources[:room], targets[:room])
                bar.update(min(room, len(sources)))
                yield pa.record_batch([pa.array(c, f.type) for c, f in zip(kept, _SCHEMA, strict=True)], _SCHEMA)
                if max_pairs and inspector.pairs == max_pairs:
                    break

    def finish(table: Any) -> tuple[np.ndarray, dict[str, Any]]:
        stays = inspector.finish(numbers(table, "line"))
        defects = {kind: asdict(defect) for kind, defect in inspector.defects.items()}
        return stays, {"pairs": inspector.pairs, "defects": defects}

    return build(store, key, _SCHEMA, batches(), finish)
