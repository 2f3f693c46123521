"""Plain text, read from anywhere, as one long row of tokens that lies on disk."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparseq.data.collation import tokenizer_hash
from sparseq.data.lines import file_hashes, near_file, not_utf8, read_raw_lines
from sparseq.data.sources import check_text, find_in_folder
from sparseq.data.store import Store, build, content_key
from sparseq.data.tables import Table, is_table, open_files, open_table

# Raised when the same input would give other tokens.
_FORMAT = 2
_SCHEMA = pa.schema([("id", pa.int32())])
_BATCH_TEXTS = 1000
# Large, so that a long text has few chunks to look through.
_BATCH_TOKENS = 1_000_000


@dataclass(frozen=True)
class TextPlace:
    """Where the text of one language lies, as a recipe says it.

    Attributes:
        language: Its code; None for text without a tag.
        folder: Folder with `{split}.{language}`, plain or .gz.
        files: Instead of a folder: files with one text a line, or tables; patterns such as `shards/*.txt.gz` too.
        dataset, config: Instead of a folder: what `open_table` reads.
        column: Column of tables with the text.
        split: Name of the split.
        streaming: As for `open_table`.
    """

    language: str | None = None
    folder: str | None = None
    files: tuple[str, ...] = ()
    dataset: str | None = None
    config: str | None = None
    column: str = "text"
    split: str = "train"
    streaming: bool = False

    def open(self, *, if_not_utf8: Literal["skip", "refuse"] = "refuse") -> "PlainText":
        """Find the text.

        Raises:
            FileNotFoundError: A file is missing; the message names what is there.
            ValueError: A dataset, split or column is missing, or files of several kinds are mixed.
        """
        if self.dataset is not None:
            table = open_table(
                self.dataset,
                config=self.config,
                split=self.split,
                text_columns=[self.column],
                streaming=self.streaming,
            )
            return PlainText.of_table(table, self)
        if self.folder is not None:
            assert self.language is not None
            paths = [find_in_folder(Path(self.folder), self.split, self.language)]
        else:
            paths = [path for name in self.files for path in _matching(name)]
        if any(is_table(path) for path in paths):
            return PlainText.of_table(open_files(paths, text_columns=[self.column]), self)
        return PlainText.of_files(paths, self, skips=if_not_utf8 == "skip")


def _matching(name: str) -> list[Path]:
    """The file of that name, or the files that a pattern such as `shards/*.txt.gz` stands for, sorted."""
    if Path(name).exists() or not has_magic(name):
        return [Path(name)]
    found = sorted(Path(path) for path in glob(name, recursive=True))
    if not found:
        raise FileNotFoundError(f"No file matches {name}.")
    return found


@dataclass(frozen=True)
class PlainText:
    """The text of one language, before anything is checked.

    Attributes:
        name: What messages call it.
        language: Its code, or None.
        files: What it is made of, name to SHA-256.
        options: What else decides over the texts that it gives.
        batches: Gives the texts in order, each time anew. None is a missing value, bytes are a line that is not UTF-8
            and is to be skipped.
    """

    name: str
    language: str | None
    files: dict[str, str]
    options: dict[str, Any]
    batches: Callable[[], Iterator[Sequence[str | bytes | None]]]

    @classmethod
    def of_files(cls, paths: Sequence[Path], place: TextPlace, *, skips: bool) -> "PlainText":
        """Files with one text a line."""
        for path in paths:
            if not path.is_file():
                if path.is_dir():
                    raise FileNotFoundError(f"{path} is a folder; name files, or give it as text.folder.")
                raise FileNotFoundError(f"There is no file {path}.{near_file(path)}")

        def batches() -> Iterator[Sequence[str | bytes | None]]:
            batch: list[str | bytes | None] = []
            for path in paths:
                for number, line in enumerate(read_raw_lines(path), start=1):
                    if isinstance(line, bytes) and not skips:
                        raise ValueError(
                            not_utf8(path, number, line) + ' Or skip such lines: text.if_not_utf8="skip".'
                        )
                    batch.append(line)
                    if len(batch) == _BATCH_TEXTS:
                        yield batch
                        batch = []
            if batch:
                yield batch

        return cls(", ".join(map(str, paths)), place.language, file_hashes(paths), {}, batches)

    @classmethod
    def of_table(cls, table: Table, place: TextPlace) -> "PlainText":
        """A column of a table."""

        def batches() -> Iterator[Sequence[str | bytes | None]]:
            rows = 0
            for (values,) in table.columns([place.column]):
                check_text(table.name, place.column, values, rows)
                rows += len(values)
                yield values

        options = {"column": place.column, "split": place.split}
        return cls(table.name, place.language, table.files, options, batches)

    def texts(self, limit: int = 0, *, held_out: int = 0) -> Iterator[str]:
        """The texts that are not blank, the first `limit` of them (0: all), without the last `held_out` of those."""
        waiting: deque[str] = deque()
        found = (text for batch in self.batches() for text in batch if isinstance(text, str) and text.strip())
        for text in islice(found, limit or None):
            waiting.append(text)
            if len(waiting) > held_out:
                yield waiting.popleft()


class TokenRow(Sequence[int]):
    """Token ids `(n,)` that stay on disk; a slice is an array.

    Args:
        chunks: The ids, in pieces.
    """

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            if not -len(self) <= index < len(self):
                raise IndexError(index)
            index %= len(self)
            return int(self[index : index + 1][0])
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"Tokens are read one after another, not in steps of {step}.")
        parts = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            before = int(self._ends[number - 1]) if number else 0
            part = self._chunks[number][start - before : stop - before]
            parts.append(part)
            start, number = start + len(part), number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, dtype=np.int32)])


@dataclass(frozen=True)
class TextReport:
    """What was read of the text of one language.

    Attributes:
        name: Where it lay.
        language: Its code, or None.
        texts: Texts that are used.
        held_out: How many of them are held out.
        tokens: Tokens to train on, the ends of the texts included.
        blank: Texts left out because nothing is in them.
        not_utf8: Lines left out because they are not UTF-8.
        files: File name to SHA-256.
    """

    name: str
    language: str | None
    texts: int
    held_out: int
    tokens: int
    blank: int
    not_utf8: int
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, as the manifest of a run holds it."""
        values = {name: getattr(self, name) for name in ("texts", "held_out", "tokens", "blank", "not_utf8")}
        return {**values, "sha256": dict(self.files)}

    def __str__(self) -> str:
        head = f"{self.language}: " if self.language else ""
        line = f"{head}{self.texts:,} texts, {self.held_out:,} of them held out; {self.tokens:,} tokens to train on"
        left_out = [(self.blank, "blank"), (self.not_utf8, "not UTF-8")]
        return line + "".join(f"; {count:,} left out: {why}" for count, why in left_out if count)


def tokenize_text(
    tokenizer: PreTrainedTokenizerBase,
    text: PlainText,
    *,
    held_out: int = 0,
    max_texts: int = 0,
    store: Store | None = None,
    progress: bool = False,
) -> tuple[TokenRow, TokenRow, TextReport]:
    """Tokenise plain text, once: `store` has the result the next time.

    Args:
        tokenizer: Tokenizer that appends the end of sentence, which then divides the texts.
        text: The text.
        held_out: So many texts, the last ones, are kept apart.
        max_texts: The first so many texts are used; 0 uses all.
        store: Keeps the ids on disk. None: in memory.
        progress: Show a progress bar.

    Returns:
        The ids to train on, those held out, and what was read.

    Raises:
        ValueError: There is no text, or none but what is held out.
    """
    made_of = {"files": list(text.files.values()), "options": text.options, "tokenizer": tokenizer_hash(tokenizer)}
    key = f"row-{content_key(format=_FORMAT, held_out=held_out, max_texts=max_texts, **made_of)}"
    entry = store.get(key) if store is not None else None
    if entry is None:
        entry = _tokenize(tokenizer, text, held_out, max_texts, store, key, progress)
    table, note = entry
    row = [chunk.to_numpy() for chunk in table.data.column("id").chunks]
    cut = note["tokens"]
    report = TextReport(text.name, text.language, files=text.files, held_out=held_out, **note)
    return _part(row, 0, cut), _part(row, cut, len(table)), report


def _part(chunks: Sequence[np.ndarray], start: int, stop: int) -> TokenRow:
    """The ids from `start` to `stop`, still on disk."""
    parts, before = [], 0
    for chunk in chunks:
        parts.append(chunk[max(0, start - before) : max(0, stop - before)])
        before += len(chunk)
    return TokenRow(parts)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text: PlainText,
    held_out: int,
    max_texts: int,
    store: Store | None,
    key: str,
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    counts = {"texts": 0, "tokens": 0, "blank": 0, "not_utf8": 0}
    # Ids of the last texts, which will be those held out.
    last: deque[list[int]] = deque()

    def usable(batch: Sequence[str | bytes | None]) -> Iterator[str]:
        for one in batch:
            if max_texts and counts["texts"] == max_texts:
                return
            if isinstance(one, bytes):
                counts["not_utf8"] += 1
            elif one is None or not one.strip():
                counts["blank"] += 1
            else:
                counts["texts"] += 1
                yield one

    def rows() -> Iterator[list[int]]:
        name = f"tokenizing {text.language or 'text'}"
        with tqdm(desc=name, unit=" texts", unit_scale=True, disable=None if progress else True, leave=False) as bar:
            for batch in text.batches():
                if kept := list(usable(batch)):
                    # `<s>` or `<mask>` in a text, of a web page for instance, is no token of ours.
                    yield from tokenizer(kept, verbose=False, split_special_tokens=True)["input_ids"]
                bar.update(len(batch))
                if max_texts and counts["texts"] == max_texts:
                    return

    def batches() -> Iterator[pa.RecordBatch]:
        buffer: list[int] = []
        for ids in rows():
            last.append(ids)
            if len(last) > held_out:
                ready = last.popleft()
                counts["tokens"] += len(ready)
                buffer += ready
            if len(buffer) >= _BATCH_TOKENS:
                yield _record(buffer)
                buffer = []
        yield _record(buffer)
        yield _record([index for ids in last for index in ids])

    def finish(table: Any) -> tuple[None, dict[str, Any]]:
        if not counts["texts"]:
            raise ValueError(f"{text.name} has no text: every line is blank.")
        if not counts["tokens"]:
            raise ValueError(
                f"{text.name} has {counts['texts']:,} texts, and {held_out:,} are to be held out (`text.held_out`): "
                "nothing is left to train on."
            )
        return None, counts

    return build(store, key, _SCHEMA, batches(), finish)


def _record(ids: Sequence[int]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(ids, pa.int32())], _SCHEMA)
