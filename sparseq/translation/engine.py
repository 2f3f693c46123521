"""What a search asks of the engine that computes next-token probabilities."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class StepOutput:
    """What one decoder step gives for R rows. It holds until the next step, and the caller may write into it.

    Attributes:
        logits: `(R, V)` float32 of the last token; None where candidates were asked for.
        candidate_ids: The C likeliest tokens of each row, likeliest first, `(R, C)` int64; else None.
        candidate_log_probs: Their log-probabilities (softmax over the whole vocabulary), `(R, C)` float32; else None.
        attention: Cross-attention of the last token, `(R, S)` float32, as `Hypothesis.attention` says; else None.
    """

    logits: np.ndarray | None = None
    candidate_ids: np.ndarray | None = None
    candidate_log_probs: np.ndarray | None = None
    attention: np.ndarray | None = None


class Engine(Protocol):
    """Encoder and decoder step with a cache.

    A batch of B sources is decoded with `beams` rows each, R = B * beams, rows of one source side by side. Cross
    keys and values are kept once a source, and never moved.

    Attributes:
        vocab_size: V.
        max_source_length: Most tokens of a source; None where there is no limit.
        max_target_length: Most tokens that a row can be fed, the start token among them; None where there is none.
    """

    vocab_size: int
    max_source_length: int | None
    max_target_length: int | None

    def start(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, beams: int = 1) -> Any:
        """Run the encoder on `(B, S)` and return a decoding state with an empty self-attention cache."""
        ...

    def step(
        self,
        state: Any,
        tokens: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        candidates: int = 0,
        attention: bool = False,
    ) -> StepOutput:
        """Append one token to each row and return what comes next.

        Args:
            state: Of `start`; changed in place.
            tokens: `(R,)` int64.
            rows: For each new row the row of the former step that it continues, `(R,)` int64 (beams that change
                places); None means that each continues itself. A row continues only rows of its own source.
            candidates: Return that many likeliest tokens a row in place of all logits.
            attention: Return cross-attention as well.
        """
        ...

    def select(self, state: Any, sources: np.ndarray) -> None:
        """Keep only these sources, `(B',)` int64 ascending, and their rows: finished sentences leave the batch."""
        ...
