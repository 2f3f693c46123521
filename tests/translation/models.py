"""Tiny models with tokenizers of ours for the translator, and a backend that needs no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from sparseq import SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.training.tokenizer import train_tokenizer
from sparseq.translation.backend import Batch, Hypothesis, OnToken
from tests.conversion.tokenizer_folders import SENTENCES
from tests.tiny import tiny_config

SOURCES = [SENTENCES[0], "A dog.", "", "Two men read, and a woman walks.", "   ", "Red ball", SENTENCES[2]]


def tiny_tokenizer(languages: Sequence[str] = ("de",)) -> SparseqTokenizer:
    return train_tokenizer(SENTENCES * 3, vocab_size=330, language_tags=languages, show_progress=False)


def write_model(folder: Path, languages: Sequence[str] = ("de",), **overrides: Any) -> Path:
    """A random model whose translations vary and end, with its tokenizer."""
    tokenizer = tiny_tokenizer(languages)
    torch.manual_seed(3)
    fields: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.3, **overrides}
    config = tiny_config(vocab_size=len(tokenizer), final_logits_bias=True, **fields)
    model: Any = SparseqForConditionalGeneration(config)
    # Bytes of characters that are none would all read alike, and a random model seldom ends.
    is_byte = [token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    model.final_logits_bias[0, torch.tensor(is_byte)] = -50
    model.final_logits_bias[0, tokenizer.eos_token_id] = 1.5
    model.generation_config.max_length = 14
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class EchoBackend:
    """Translates each sentence to itself, and keeps account of what it was given."""

    name = "echo"

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.settings: list[GenerationConfig] = []
        self.keep = True

    def decode(
        self, batch: Batch, settings: GenerationConfig, *, attention: bool = False, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        if self.keep:
            self.batches.append(batch)
            self.settings.append(settings)
        results = []
        for row, (ids, mask, prefix) in enumerate(
            zip(batch.input_ids, batch.attention_mask, batch.prefixes, strict=True)
        ):
            # Without the end of the sentence.
            tokens = [*prefix, *ids[: int(mask.sum()) - 1].tolist()]
            for token in tokens[len(prefix) :] if on_token else ():
                assert on_token is not None
                on_token(row, token)
            log_probs = [-1.0] * (len(tokens) - len(prefix) + 1)
            weights = np.full((len(tokens), len(ids)), 1 / mask.sum()) if attention else None
            one = Hypothesis(tokens, -1.0, log_probs, weights)
            results.append([one] * (settings.num_return_sequences or 1))
        return results
