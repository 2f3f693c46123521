"""Translating many sentences with generate(): batched by length, in the order they were given."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseq.translation.batches import fill_batches


def translate_batchwise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    prefix: str = "",
    batch_tokens: int = 2048,
    max_source_length: int | None = None,
    progress: bool = False,
    **generation_options: Any,
) -> list[str]:
    """Translate `sources`; element `i` of the result belongs to `sources[i]`.

    Args:
        model: A sequence-to-sequence model; it is put into evaluation mode and left in the mode it had.
        tokenizer: Its tokenizer.
        sources: Plain text. A blank source gives an empty translation without running the model.
        prefix: Put before each source, such as the language tag "<2de> ".
        batch_tokens: Source tokens of a batch, padding included, beams not counted.
        max_source_length: Longer sources are truncated to that many tokens.
        progress: Show a progress bar on standard error.
        generation_options: Passed to generate(), such as `num_beams=5`; the rest is the model's generation_config.

    Raises:
        ValueError: `batch_tokens` is not positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"`batch_tokens` must be at least 1, but is {batch_tokens}.")
    present = [index for index, source in enumerate(sources) if source.strip()]
    translations = [""] * len(sources)
    if not present:
        return translations
    truncation = {"truncation": True, "max_length": max_source_length} if max_source_length else {}
    encoded = tokenizer([prefix + sources[index] for index in present], verbose=False, **truncation)["input_ids"]
    bar = tqdm(total=len(present), desc="translating", unit="sentence", disable=None if progress else True)
    with evaluating(model), bar:
        for rows in fill_batches([len(ids) for ids in encoded], batch_tokens):
            batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt", verbose=False)
            with torch.inference_mode():
                generate: Any = model.generate
                outputs = generate(**batch.to(model.device), **generation_options)
            for row, text in zip(rows, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
                translations[present[row]] = text.strip()
            bar.update(len(rows))
    return translations


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and at the end the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
