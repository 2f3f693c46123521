"""Tokenised sentence pairs as a dataset, and their collation into padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sparseq.data.parallel import ParallelReport, ParallelText

LABEL_PADDING = -100


class TokenizedPairs(Dataset[dict[str, list[int]]]):
    """Sentence pairs as token ids, with the lengths that batching needs.

    Attributes:
        source_ids: Ids of each source, end of sentence included.
        target_ids: Ids of each target, end of sentence included: the unshifted labels.
        source_lengths: Length of each source in tokens.
        target_lengths: Length of each target in tokens.
    """

    def __init__(self, source_ids: Sequence[list[int]], target_ids: Sequence[list[int]]) -> None:
        if len(source_ids) != len(target_ids):
            raise ValueError(f"There are {len(source_ids)} sources and {len(target_ids)} targets.")
        self.source_ids = list(source_ids)
        self.target_ids = list(target_ids)
        self.source_lengths = [len(ids) for ids in self.source_ids]
        self.target_lengths = [len(ids) for ids in self.target_ids]

    def __len__(self) -> int:
        return len(self.source_ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.source_ids[index], "labels": self.target_ids[index]}


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    text: ParallelText,
    *,
    max_length: int,
    drop_long: bool,
    source_prefix: str = "",
) -> tuple[TokenizedPairs, ParallelReport]:
    """Tokenise parallel text.

    Args:
        tokenizer: Tokenizer that appends the end of sentence to sources and targets alike.
        text: The sentences.
        max_length: Longest side in tokens, end of sentence included.
        drop_long: True leaves out pairs with a longer side (training); False truncates them (evaluation of the loss).
        source_prefix: Put before every source, such as the language tag "<2de> ".

    Returns:
        The dataset, and the report of `text` with the over-long pairs counted.

    Raises:
        ValueError: No pair is short enough.
    """
    source_ids = tokenizer([source_prefix + source for source in text.sources], verbose=False)["input_ids"]
    target_ids = tokenizer(text_target=text.targets, verbose=False)["input_ids"]
    lengths = [max(len(s), len(t)) for s, t in zip(source_ids, target_ids, strict=True)]
    too_long = sum(length > max_length for length in lengths)
    if drop_long and too_long:
        if too_long == len(lengths):
            raise ValueError(
                f"All {too_long:,} pairs of {text.report.split} have a side of more than {max_length} tokens (the "
                f"shortest pair has {min(lengths)}). Raise `data.max_length`."
            )
        keep = [length <= max_length for length in lengths]
        source_ids = [ids for ids, kept in zip(source_ids, keep, strict=True) if kept]
        target_ids = [ids for ids, kept in zip(target_ids, keep, strict=True) if kept]
    elif too_long:
        # The last id is the end of sentence, which a truncated sentence keeps.
        source_ids = [ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]] for ids in source_ids]
        target_ids = [ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]] for ids in target_ids]
    pairs = TokenizedPairs(source_ids, target_ids)
    return pairs, replace(text.report, too_long=too_long, kept=len(pairs))


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
