"""Tokenised sentence pairs as a dataset, and their collation into padded batches."""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparseq.data.cleaning import Defect, Policy, count_defect, refuse_defects
from sparseq.data.parallel import ParallelReport, ParallelText
from sparseq.data.store import Store, build, content_key

LABEL_PADDING = -100

# Raised when the same input would give another table.
_FORMAT = 1
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
# Sentences tokenised at once: enough for the tokenizer's threads, little memory.
_BATCH_PAIRS = 5_000


class TokenizedPairs(Dataset[dict[str, list[int]]]):
    """Sentence pairs as token ids, with the lengths that batching needs. Only the lengths are held in memory where
    the ids lie on disk.

    Attributes:
        source_lengths: Length of each source in tokens, end of sentence included.
        target_lengths: Length of each target in tokens, end of sentence included.
    """

    def __init__(self, source_ids: Sequence[list[int]], target_ids: Sequence[list[int]]) -> None:
        """Make a dataset in memory.

        Args:
            source_ids: Ids of each source, end of sentence included.
            target_ids: Ids of each target, end of sentence included: the unshifted labels.
        """
        import datasets

        if len(source_ids) != len(target_ids):
            raise ValueError(f"There are {len(source_ids)} sources and {len(target_ids)} targets.")
        columns = [pa.array(list(ids), _SCHEMA.field(0).type) for ids in (source_ids, target_ids)]
        self._open(datasets.Dataset(pa.Table.from_arrays(columns, schema=_SCHEMA)))

    @classmethod
    def from_table(cls, table: Any) -> "TokenizedPairs":
        """A dataset of a `datasets.Dataset` with the columns "input_ids" and "labels"."""
        pairs = cls.__new__(cls)
        pairs._open(table)
        return pairs

    def _open(self, table: Any) -> None:
        self._rows = table.with_format("arrow")
        self.source_lengths, self.target_lengths = (
            np.concatenate([np.diff(chunk.offsets) for chunk in table.data.column(name).chunks] or [np.zeros(0)])
            for name in _SCHEMA.names
        )

    @property
    def source_ids(self) -> list[list[int]]:
        """All sources, in memory."""
        return self._rows[:].column("input_ids").to_pylist()

    @property
    def target_ids(self) -> list[list[int]]:
        """All targets, in memory."""
        return self._rows[:].column("labels").to_pylist()

    def __len__(self) -> int:
        return len(self.source_lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """Several pairs at once, which is how a `DataLoader` asks for a batch."""
        rows: list[dict[str, list[int]]] = self._rows[list(indices)].to_pylist()
        return rows


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    text: ParallelText,
    *,
    max_length: int,
    max_target_length: int | None = None,
    policy: Policy | None = None,
    source_prefix: str = "",
    store: Store | None = None,
    progress: bool = False,
) -> tuple[TokenizedPairs, ParallelReport]:
    """Tokenise parallel text, once: `store` has the result the next time.

    Args:
        tokenizer: Tokenizer that appends the end of sentence to sources and targets alike.
        text: The sentences.
        max_length: Longest side in tokens, end of sentence included; with `max_target_length` the longest source.
        max_target_length: Longest target in tokens, end of sentence included. None: `max_length`.
        policy: What happens to pairs with a longer side, and to pairs one side of which is more than
            `max_length_ratio` times as long as the other.
        source_prefix: Put before every source, such as the language tag "<2de> ".
        store: Keeps the ids on disk. None: in memory.
        progress: Show a progress bar.

    Returns:
        The dataset, and the report of `text` with these pairs counted.

    Raises:
        ValueError: No pair is short enough, or some are to be refused.
    """
    policy = policy or Policy()
    key, entry = "", None
    if store is not None:
        made_of = {"prefix": source_prefix, "max_length": max_length, "tokenizer": tokenizer_hash(tokenizer)}
        # Absent by default, so that what earlier versions have made keeps its name.
        made_of |= {} if max_target_length is None else {"max_target_length": max_target_length}
        key = f"tokens-{content_key(format=_FORMAT, text=text.key, policy=asdict(policy), **made_of)}"
        entry = store.get(key)
    if entry is None:
        limits = (max_length, max_length if max_target_length is None else max_target_length)
        entry = _tokenize(tokenizer, text, limits, policy, source_prefix, store, key, progress)
    table, note = entry
    defects = {kind: Defect(**{**values, "lines": tuple(values["lines"])}) for kind, values in note.items()}
    report = replace(text.report, defects={**text.report.defects, **defects}, kept=len(table))
    return TokenizedPairs.from_table(table), report


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text: ParallelText,
    limits: tuple[int, int],
    policy: Policy,
    prefix: str,
    store: Store | None,
    key: str,
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    defects: dict[str, Defect] = {}
    shortest: tuple[float, float] = (math.inf, math.inf)

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal shortest
        label = f"tokenizing {text.report.split}"
        # A fast tokenizer divides a batch among its own threads.
        with tqdm(total=len(text), desc=label, unit=" pairs", disable=None if progress else True, leave=False) as bar:
            for start in range(0, len(text), _BATCH_PAIRS):
                rows = slice(start, start + _BATCH_PAIRS)
                texts = [prefix + source for source in text.sources[rows]]
                sources = tokenizer(texts, verbose=False)["input_ids"]
                targets = tokenizer(text_target=list(text.targets[rows]), verbose=False)["input_ids"]
                kept: tuple[list[list[int]], list[list[int]]] = ([], [])
                for row, pair in enumerate(zip(sources, targets, strict=True), start=start):
                    lengths = (len(pair[0]), len(pair[1]))
                    shortest = min(shortest, lengths, key=max)
                    kinds = ["too_long"] if lengths[0] > limits[0] or lengths[1] > limits[1] else []
                    kinds += ["unbalanced"] if max(lengths) > policy.max_length_ratio * min(lengths) else []
                    for kind in kinds:
                        count_defect(defects, kind, text.line(row), policy.action(kind))
                    if not any(policy.action(kind) == "skip" for kind in kinds):
                        for column, ids, limit in zip(kept, pair, limits, strict=True):
                            # The last id is the end of sentence, which a truncated sentence keeps.
                            column.append(ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]])
                bar.update(len(sources))
                yield pa.record_batch([pa.array(ids, f.type) for ids, f in zip(kept, _SCHEMA, strict=True)], _SCHEMA)

    def finish(table: Any) -> tuple[np.ndarray, dict[str, Any]]:
        refuse_defects(defects, f"{text.report.split} in tokens", text.report.unit)
        if not len(table):
            raise ValueError(
                f"All {len(text):,} pairs of {text.report.split} have more than {limits[0]} tokens in the source or "
                f"more than {limits[1]} in the target (the shortest pair has {shortest[0]} and {shortest[1]}), or are "
                "left out as unbalanced. Raise `data.max_length` or `data.max_target_length`."
            )
        return np.ones(len(table), dtype=bool), {kind: asdict(defect) for kind, defect in sorted(defects.items())}

    return build(store, key, _SCHEMA, batches(), finish)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the files of a tokenizer and the versions of what runs it."""
    digest = hashlib.sha256(f"{metadata.version('tokenizers')} {metadata.version('transformers')}".encode())
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PairCollator:
    """Pads `input_ids` and `labels` on the right, each to the longest of the batch.

    Attributes:
        pad_token_id: Fills `input_ids`; `attention_mask` is 0 there.
        label_padding: Fills `labels`; the loss ignores it.
    """

    pad_token_id: int
    label_padding: int = LABEL_PADDING

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask` (batch, source), `labels` (batch, target), all int64."""
        input_ids, attention_mask = _pad([feature["input_ids"] for feature in features], self.pad_token_id)
        labels, _ = _pad([feature["labels"] for feature in features], self.label_padding)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _pad(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for position, row in enumerate(rows):
        padded[position, : len(row)] = torch.as_tensor(row)
        mask[position, : len(row)] = 1
    return padded, mask
