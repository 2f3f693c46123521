"""Tables of text: whatever `datasets` reads, as batches of columns, with memory that does not grow with the table."""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseq.data.lines import file_hash, file_hashes, near_file

# A recipe is checked where the extra that brings pyarrow is not installed.
if TYPE_CHECKING:
    import pyarrow as pa

# Ending of a file (before .gz) -> the builder of `datasets` that reads it.
_BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# What `datasets` itself takes for the same split when it names splits after files.
_SYNONYMS = ({"val", "valid", "validation", "dev"}, {"test", "testing", "eval", "evaluation"}, {"train", "training"})
_BATCH_ROWS = 1000


def is_table(path: Path) -> bool:
    """Whether the ending of the file's name, before .gz, is that of a table."""
    return _ending(path) in _BUILDERS


@dataclass(frozen=True)
class Table:
    """One split of a dataset.

    Attributes:
        name: What messages call it.
        files: What it was made of, name to SHA-256; for a dataset of the Hub its id and commit.
        rows: A dataset of the library, streamed or on disk.
        kind: How it is read, such as "CSV".
    """

    name: str
    files: dict[str, str]
    rows: Any = field(repr=False)
    kind: str = "a dataset"

    def batches(self, batch_rows: int = _BATCH_ROWS) -> "Iterator[pa.Table]":
        """Consecutive rows.

        Raises:
            ValueError: The file is damaged, or not what its ending says.
        """
        import datasets

        if self.rows is None:
            return
        with _quiet():
            try:
                yield from self.rows.with_format("arrow").iter(batch_size=batch_rows)
            except (ValueError, OSError, EOFError, TypeError, datasets.exceptions.DatasetsError) as error:
                raise ValueError(f"{self.name} cannot be read as {self.kind}: {_reason(error)}") from error

    def records(self) -> Iterator[dict[str, Any]]:
        """The rows as mappings."""
        for batch in self.batches():
            yield from batch.to_pylist()

    def columns(self, names: Sequence[str]) -> Iterator[list[list[Any]]]:
        """The values of some columns, batch by batch; `outer.inner` is the field `inner` of a column `outer`.

        Raises:
            ValueError: A column is missing; the message names the nearest.
        """
        for number, batch in enumerate(self.batches()):
            if number == 0:
                for name in names:
                    check_column(self.name, batch.schema, name)
            yield [_values(batch, name) for name in names]

    def schema(self) -> "pa.Schema":
        """Names and types of the columns; without any where there is no row."""
        import pyarrow as pa

        for batch in self.batches(1):
            return batch.schema
        return pa.schema([])


def open_table(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_columns: Sequence[str] = (),
    streaming: bool = False,
) -> Table:
    """Open one split of a table.

    Local files are read where they are, without a copy in the cache of `datasets`.

    Args:
        source: A file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, each also .gz), a folder that
            `save_to_disk` has written, a folder with such files, or the id of a dataset of the Hub.
        config: Configuration of the dataset, where it has several.
        split: Name of the split; "train[:1000]" and the like are cut by `datasets`. "val" also finds "validation".
        text_columns: Columns of a CSV file that are to stay text even if they look like numbers.
        streaming: Read a dataset of the Hub over the network instead of downloading all of it first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such dataset, configuration or split, or it cannot be read.
    """
    path = Path(source)
    if path.is_file():
        if split.partition("[")[0] not in ("train", ""):
            raise ValueError(
                f"{source} is one file, whose only split is train, so there is no split {split!r}. Name the file of "
                "each split (in a recipe: `data.train_files`, `data.validation_files`, `data.test_files`)."
            )
        return open_files([path], text_columns=text_columns, part=split)
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_saved(path, split)
    # A Hub id has one slash at most and no ending of a file.
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1 or is_table(path)):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    return _open_dataset(source, config, split, text_columns, streaming)


def open_files(paths: Sequence[Path], *, text_columns: Sequence[str] = (), part: str = "train") -> Table:
    """Open files of one kind as one table, one after another.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An ending is unknown, or the kinds differ.
    """
    import datasets

    name = ", ".join(map(str, paths))
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.{near_file(path)}")
        if not is_table(path):
            raise ValueError(f"{path}: a data file must end in {', '.join(_BUILDERS)}, or one of them and .gz.")
    kinds = {_ending(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{name} are of several kinds ({', '.join(sorted(kinds))}); give files of one.")
    ending = kinds.pop()
    builder = _BUILDERS[ending]
    files = file_hashes(paths)
    filled = [str(path) for path in paths if path.stat().st_size]
    if not filled:
        return Table(name, files, None, builder.upper())
    options = _csv_options(text_columns) | ({"sep": "\t"} if ending == ".tsv" else {}) if builder == "csv" else {}
    # Only `datasets`' own copy can be cut.
    is_whole = part in ("train", "")
    with _quiet(), _readable(name, builder.upper()):
        rows = datasets.load_dataset(
            builder, data_files=filled, split=part if not is_whole else "train", streaming=is_whole, **options
        )
    return Table(name, files, rows, builder.upper())


def check_column(table: str, schema: "pa.Schema", name: str, option: str = "") -> None:
    """Refuse a column that is not there, or whose field is not.

    Raises:
        ValueError: The message names the table, its columns and the nearest of them.
    """
    known = column_names(schema)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{option}{table} has no column {name!r}{hint}. Its columns: {', '.join(known) or 'none'}.")


def column_names(schema: "pa.Schema") -> list[str]:
    """Columns, and `outer.inner` for the fields of columns that hold mappings."""
    import pyarrow as pa

    names = []
    for column in schema:
        names.append(column.name)
        if pa.types.is_struct(column.type):
            names += [f"{column.name}.{inner.name}" for inner in column.type]
    return names


def _values(batch: "pa.Table", name: str) -> list[Any]:
    if name in batch.column_names:
        return batch.column(name).to_pylist()
    outer, _, inner = name.partition(".")
    # JSON may bring a column first in a later part of the file, and leave it out there again.
    if outer not in batch.column_names:
        return [None] * len(batch)
    return [row.get(inner) if isinstance(row, dict) else None for row in batch.column(outer).to_pylist()]


def _open_saved(path: Path, split: str) -> Table:
    import datasets

    with _readable(str(path), "a saved dataset"):
        rows = datasets.load_from_disk(str(path))
    splits = rows if isinstance(rows, datasets.DatasetDict) else {str(rows.split or "train"): rows}
    rows = splits[_find_split(str(path), split, list(splits))]
    return Table(str(path), _folder_hashes(path), rows)


def _open_dataset(source: str, config: str | None, split: str, text_columns: Sequence[str], streaming: bool) -> Table:
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    path = Path(source)
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(source, config)
            options = _csv_options(text_columns) if isinstance(builder.config, CsvConfig) else {}
            if "[" in split:
                rows = datasets.load_dataset(source, config, split=split, **options)
            else:
                splits = datasets.load_dataset(source, config, streaming=streaming or path.is_dir(), **options)
                rows = splits[_find_split(source, split, list(splits))]
    except _SplitMissing:
        raise
    # A dataset that would run a script is a RuntimeError.
    except (ValueError, OSError, EOFError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if path.is_dir():
            raise ValueError(f"{source} cannot be read as a dataset: {_reason(error)}") from error
        raise ValueError(
            f"There is no file or folder {source}, and as a dataset of the Hub it cannot be read: {_reason(error)}"
        ) from error
    label = source if config is None else f"{source}, {config}"
    return Table(source, _folder_hashes(path) if path.is_dir() else {label: str(builder.hash)}, rows)


class _SplitMissing(ValueError):
    pass


def _find_split(source: str, split: str, known: Sequence[str]) -> str:
    if split in known:
        return split
    for synonyms in _SYNONYMS:
        found = [name for name in known if name in synonyms]
        if split in synonyms and len(found) == 1:
            return found[0]
    raise _SplitMissing(f"{source} has no split {split!r}. Its splits: {', '.join(map(str, known)) or 'none'}.")


def _csv_options(text_columns: Sequence[str]) -> dict[str, Any]:
    # A sentence such as "None" or "NA" is no missing value, and "007" no number.
    return {"keep_default_na": False, "converters": dict.fromkeys(text_columns, str) or None}


@contextlib.contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (ValueError, OSError, EOFError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name} cannot be read as {kind}: {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of `datasets`: what goes wrong is told once, by the error."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    """The cause of the library's wrapping errors, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _folder_hashes(folder: Path) -> dict[str, str]:
    # `datasets` leaves its own cache files beside the data that `save_to_disk` wrote.
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "cache-"))]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(files)}


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
