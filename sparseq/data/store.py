"""Tables on disk: written once under a key that says what they were made of, then mapped into memory."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

_DATA_FILE = "data.arrow"
_NOTE_FILE = "note.json"
_BATCH_ROWS = 1000

Finish = Callable[[Any], tuple[np.ndarray | None, dict[str, Any]]]


def content_key(**parts: Any) -> str:
    """A name for what is made of `parts`, which must be plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """A folder of tables. An entry appears complete or not at all, so a killed process leaves nothing that is used.

    Args:
        folder: Where the entries go; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()

    def get(self, key: str) -> tuple[Any, dict[str, Any]] | None:
        """The table and the note of an entry; None where there is no sound one."""
        entry = self.folder / key
        try:
            note = json.loads((entry / _NOTE_FILE).read_text("utf-8"))
            table = _map(entry / _DATA_FILE)
        except (OSError, ValueError, pa.ArrowException):
            return None
        # A power failure can leave a file shorter than it was.
        if len(table) != note["rows"]:
            return None
        self._used.add(key)
        return table, note["note"]

    def put(self, key: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], finish: Finish) -> None:
        """Write an entry.

        Args:
            key: Its name.
            schema: Columns of the table.
            batches: Its rows.
            finish: Called with the table when all rows are written; returns which rows stay, as a mask or None for
                all, and the note.

        Raises:
            What `batches` and `finish` raise; nothing is left behind then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=self.folder))
        try:
            data = scratch / _DATA_FILE
            rows = _write(data, schema, batches)
            table = _map(data)
            stays, note = finish(table)
            if stays is not None and not stays.all():
                refined = scratch / "refined"
                rows = _write(refined, schema, _staying(table, schema, stays))
                os.replace(refined, data)
            (scratch / _NOTE_FILE).write_text(json.dumps({"rows": rows, "note": note}), encoding="utf-8")
            entry = self.folder / key
            # An unsound one, or that of a process that wrote the same at the same time.
            shutil.rmtree(entry, ignore_errors=True)
            os.replace(scratch, entry)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def prune(self) -> None:
        """Delete every entry that this object has not returned, and what killed processes have left."""
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            if entry.is_dir() and entry.name not in self._used:
                shutil.rmtree(entry, ignore_errors=True)


def in_memory(schema: pa.Schema, batches: Iterable[pa.RecordBatch], finish: Finish) -> tuple[Any, dict[str, Any]]:
    """The table and the note of an entry that is not kept."""
    import datasets

    table = datasets.Dataset(pa.Table.from_batches(list(batches), schema))
    stays, note = finish(table)
    if stays is not None and not stays.all():
        table = datasets.Dataset(pa.Table.from_batches(list(_staying(table, schema, stays)), schema))
    return table, note


def build(
    store: Store | None, key: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], finish: Finish
) -> tuple[Any, dict[str, Any]]:
    """Make an entry, in `store` or, without one, in memory; returns its table and note."""
    if store is None:
        return in_memory(schema, batches, finish)
    store.put(key, schema, batches, finish)
    entry = store.get(key)
    assert entry is not None, "it was written a moment ago"
    return entry


def numbers(table: Any, column: str) -> np.ndarray:
    """A column of integers."""
    values: np.ndarray = table.data.column(column).to_numpy()
    return values


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def _staying(table: Any, schema: pa.Schema, stays: np.ndarray) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in table.data.to_batches():
        kept = batch.filter(pa.array(stays[start : start + batch.num_rows]))
        start += batch.num_rows
        yield pa.RecordBatch.from_arrays(kept.columns, schema=schema)


def _map(path: Path) -> Any:
    import datasets

    if not path.is_file():
        raise FileNotFoundError(path)
    return datasets.Dataset.from_file(str(path))


class Texts(Sequence[str]):
    """A column of text that stays on disk; a slice is a list.

    Args:
        table: A `datasets.Dataset`.
        column: Name of the column.
    """

    def __init__(self, table: Any, column: str) -> None:
        self._table = table.select_columns([column]).with_format("arrow")
        self._column = column

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(index)
        values = self._table[index].column(self._column).to_pylist()
        return values if isinstance(index, slice) else values[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BATCH_ROWS):
            yield from self[start : start + _BATCH_ROWS]
