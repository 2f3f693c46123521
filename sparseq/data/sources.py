"""Where parallel text comes from: a folder of aligned files, named files, or a table with two columns of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sparseq.data.lines import file_hash, file_names, near_file, near_name, read_lines, read_raw_lines
from sparseq.data.tables import Table, column_names, is_table, open_files, open_table

_BATCH_LINES = 1000

Side = Sequence[str | bytes | None]


class PairSource(Protocol):
    """One split of one language pair, before anything is checked.

    Attributes:
        name: What messages call it.
        unit: "line" or "row".
        files: What it is made of, name to SHA-256 (for a dataset of the Hub, its id and commit).
        options: What else decides over the pairs that it gives.
    """

    name: str
    unit: str
    files: dict[str, str]
    options: dict[str, Any]

    def batches(self) -> Iterator[tuple[Side, Side]]:
        """Sources and their targets, in order. None is a missing value, bytes are a line that is not UTF-8.

        Raises:
            ValueError: The two sides do not align, or the text cannot be read.
        """
        ...


class FilePair:
    """Two text files: line i of one is translated by line i of the other.

    Args:
        source: File with the sources, plain or .gz.
        target: File with the targets.
        refuse_bytes: Whether a line that is not UTF-8 is an error; otherwise it comes as bytes.

    Raises:
        FileNotFoundError: A file is missing; the message names what is there.
    """

    unit = "line"

    def __init__(self, source: Path, target: Path, *, refuse_bytes: bool = True) -> None:
        for path in (source, target):
            if not path.is_file():
                raise FileNotFoundError(f"There is no file {path}.{near_file(path)}")
        self.paths = (source, target)
        self.name = f"{source} and {target}"
        self.refuse_bytes = refuse_bytes
        self.options: dict[str, Any] = {}
        same_name = source.name == target.name
        self.files = {str(path) if same_name else path.name: file_hash(path) for path in self.paths}

    def batches(self) -> Iterator[tuple[Side, Side]]:
        """Lines of both files, as long as both have some."""
        read = read_lines if self.refuse_bytes else read_raw_lines
        source_lines, target_lines = (read(path) for path in self.paths)
        pairs = 0
        while True:
            sources, targets = list(islice(source_lines, _BATCH_LINES)), list(islice(target_lines, _BATCH_LINES))
            if len(sources) != len(targets):
                self._refuse(
                    pairs + len(sources) + sum(1 for _ in source_lines),
                    pairs + len(targets) + sum(1 for _ in target_lines),
                )
            if not sources:
                break
            pairs += len(sources)
            yield sources, targets
        if not pairs:
            raise ValueError(f"{self.paths[0]} and {self.paths[1]} are empty: no sentence pair to read.")

    def _refuse(self, source_lines: int, target_lines: int) -> None:
        source, target = self.paths
        raise ValueError(
            f"{source} has {source_lines:,} lines and {target} has {target_lines:,}: line i of one must translate "
            "line i of the other. Check that both files come from the same release of the corpus."
        )


class TablePair:
    """Two columns of a table.

    Args:
        table: The table.
        source_column, target_column: Columns with text; `outer.inner` is a field of a column of mappings.
    """

    unit = "row"

    def __init__(self, table: Table, source_column: str, target_column: str, **options: Any) -> None:
        self.table = table
        self.columns = (source_column, target_column)
        self.name = table.name
        self.files = table.files
        self.options = {"columns": list(self.columns), **options}

    def batches(self) -> Iterator[tuple[Side, Side]]:
        """Values of both columns.

        Raises:
            ValueError: A column is missing or holds something other than text.
        """
        rows = 0
        for sources, targets in self.table.columns(self.columns):
            for name, values in zip(self.columns, (sources, targets), strict=True):
                check_text(self.table.name, name, values, rows)
            rows += len(sources)
            yield sources, targets
        if not rows:
            raise ValueError(f"{self.name} is empty: no sentence pair to read.")


@dataclass(frozen=True)
class PairPlace:
    """Where one language pair lies, as a recipe says it.

    Attributes:
        source, target: Languages; None where a table without languages gives no tag.
        folder: Folder with `{split}.{language}` or `{split}.{source}-{target}.{language}`, plain or .gz.
        dataset, dataset_config: What `open_table` reads, instead of a folder.
        source_column, target_column: Columns of tables. Default: the one named after the language, or
            `translation.{language}`, or "source" and "target".
        files: Split to its files: two aligned text files, or tables. They come before folder and dataset.
        streaming: As for `open_table`.
    """

    source: str | None = None
    target: str | None = None
    folder: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    streaming: bool = False

    @property
    def name(self) -> str:
        """Such as "en-de"."""
        return f"{self.source or self.source_column or 'source'}-{self.target or self.target_column or 'target'}"

    def open(self, split: str, *, refuse_bytes: bool = True) -> PairSource:
        """Find one split.

        Raises:
            FileNotFoundError: A file is missing; the message names what is there.
            ValueError: A dataset, split or column is missing, or a table cannot be read.
        """
        named = dict(self.files).get(split)
        if named is not None:
            paths = [Path(name) for name in named]
            if not all(is_table(path) for path in paths):
                return self._text_files(paths, split, refuse_bytes)
            return self._columns(open_files(paths, text_columns=self._wanted()), split)
        if self.dataset is not None:
            options: dict[str, Any] = {
                "config": self.dataset_config,
                "streaming": self.streaming,
                "text_columns": self._wanted(),
            }
            return self._columns(open_table(self.dataset, split=split, **options), split)
        if self.folder is None:
            raise ValueError(f"There is no text for the split {split!r}: name its files, a folder or a dataset.")
        folder = Path(self.folder)
        if self.source is None or self.target is None:
            raise ValueError(f"The folder {folder} holds a file for each language: name them, source and target.")
        sides = [
            find_in_folder(folder, split, side, (self.source, self.target)) for side in (self.source, self.target)
        ]
        return FilePair(*sides, refuse_bytes=refuse_bytes)

    def _text_files(self, paths: Sequence[Path], split: str, refuse_bytes: bool) -> FilePair:
        if len(paths) != 2:
            raise ValueError(
                f"The split {split!r} of {self.name} has the files {', '.join(map(str, paths))}: give two aligned "
                "text files, source first, or tables that end in .jsonl, .csv, .parquet and the like."
            )
        return FilePair(paths[0], paths[1], refuse_bytes=refuse_bytes)

    def _wanted(self) -> list[str]:
        """Columns that may hold the text."""
        sides = ((self.source_column, self.source, "source"), (self.target_column, self.target, "target"))
        return [name for side in sides for name in side if name is not None]

    def _columns(self, table: Table, split: str) -> TablePair:
        known = column_names(table.schema())
        chosen = []
        for side, given, language in (
            ("source", self.source_column, self.source),
            ("target", self.target_column, self.target),
        ):
            likely = [f"{language}", f"translation.{language}"] if language else []
            found = [given] if given else [name for name in [*likely, side] if name in known]
            if not found and known:
                wanted = " or ".join(map(repr, [*likely, side]))
                raise ValueError(
                    f"{table.name} has no column {wanted} for the {side}. Its columns: {', '.join(known)}. Name the "
                    f"one you mean with data.{side}_column=NAME."
                )
            chosen.append(found[0] if found else side)
        return TablePair(table, *chosen, split=split)


def find_in_folder(folder: Path, split: str, language: str, pair: Sequence[str] = ()) -> Path:
    """The file of one side of a split: `{split}.{source}-{target}.{language}` (in either order of the pair), else
    `{split}.{language}`, each plain or .gz.

    Raises:
        FileNotFoundError: There is none; the message lists what the folder holds.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Expected files named {{split}}.{{language}}[.gz] in it.")
    stems = [f"{split}.{'-'.join(order)}" for order in (pair, pair[::-1]) if len(pair) == 2]
    for stem in (*stems, split):
        for name in (f"{stem}.{language}", f"{stem}.{language}.gz"):
            if (folder / name).is_file():
                return folder / name
    names = file_names(folder)
    listing = ", ".join(names[:30]) + (f", ... ({len(names)} files)" if len(names) > 30 else "")
    raise FileNotFoundError(
        f"{folder} has no {split}.{language} or {split}.{language}.gz. It has: {listing or 'nothing'}."
        f"{near_name(f'{split}.{language}', names)}"
    )


def check_text(table: str, column: str, values: Sequence[Any], rows_before: int = 0) -> None:
    """Refuse values that are not text; None, a missing value, passes.

    Raises:
        ValueError: The message names the table, the row (from 1) and the value.
    """
    for row, value in enumerate(values, start=rows_before + 1):
        if isinstance(value, str) or value is None:
            continue
        way_out = (
            f"; name one of its fields, such as {column}.{next(iter(value), 'NAME')}"
            if isinstance(value, dict)
            else ""
        )
        raise ValueError(
            f"{table}, row {row}: the column {column!r} must hold text, but holds {value!r:.80} "
            f"({type(value).__name__}){way_out}."
        )


def parse_pair(pair: str) -> tuple[str, str]:
    """Source and target of "en-de", or of "en>pt-BR" where a code has a hyphen.

    Raises:
        ValueError: It is neither.
    """
    parts = pair.split(">") if ">" in pair else pair.split("-")
    if len(parts) != 2 or not all(parts):
        raise ValueError(
            f"A language pair must look like en-de, or like en>pt-BR where a code has a hyphen, but is {pair!r}."
        )
    return parts[0], parts[1]
