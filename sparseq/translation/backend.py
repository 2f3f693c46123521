"""What a `Translator` hands to the engine that decodes for it, and what it gets back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import GenerationConfig

OnToken = Callable[[int, int], None]
"""Called with the row of a sentence in its batch and a token that was decided for it; not with the end of it."""


@dataclass(frozen=True)
class Batch:
    """Sentences that are decoded together.

    Attributes:
        input_ids: Source tokens, `(B, S)` int64, padded on the right.
        attention_mask: 1 for tokens and 0 for padding, `(B, S)` int64.
        prefixes: For each sentence the target tokens that every hypothesis begins with, after the start token; often
            none. They may differ in length.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    prefixes: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Hypothesis:
    """One translation of one sentence.

    Attributes:
        token_ids: Target tokens with the prefix, without the start token and without the end-of-sentence token.
        score: Sum of `token_log_probs` divided by their number to the power of `length_penalty`; of a beam search it
            is `sequences_scores` of generate().
        token_log_probs: Log-probability of each token chosen, prefix left out, the end of the sentence included, as
            `compute_transition_scores` of generate() gives it: in beam search the softmax over the vocabulary comes
            before settings that forbid, force or penalise tokens; in greedy search and sampling it comes after them,
            so that it is the distribution that the token was taken from. A forced token has 0 in both.
        attention: Cross-attention `(T, S)` of the steps that chose `token_ids`, padding left out; of the last decoder
            layer but one (the only one of a single layer), averaged over its heads, which is where attention resembles
            an alignment most (arXiv 1909.02074). None unless asked for.
    """

    token_ids: list[int]
    score: float
    token_log_probs: list[float] = field(default_factory=list)
    attention: np.ndarray | None = None


class Backend(Protocol):
    """Decodes batches as `generate()` does."""

    name: str

    def decode(
        self, batch: Batch, settings: GenerationConfig, *, attention: bool = False, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """The `num_return_sequences` best hypotheses of each sentence, best first.

        Args:
            batch: The sentences.
            settings: The model's own generation configuration with the caller's changes: `num_beams`, `do_sample`,
                `max_new_tokens`, `length_penalty` and whatever else `generate()` takes from it.
            attention: Return cross-attention.
            on_token: Told of each token as soon as it is decided; with `num_beams=1` only.

        Raises:
            ValueError: A setting that this backend does not know, with the way out.
        """
        ...
