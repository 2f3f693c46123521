"""Beam search as `generate()` does it, over candidates."""

from typing import Any

import numpy as np

from .decoding_plan import Plan
from .proposals import Proposal
from .search import END, Continuation, length_norms

# In place of minus infinity, as in generate(): that of beams which do not count yet, and of those that have ended.
_FAR = np.float32(-1.0e9)


class BeamSearch:
    """Keeps the best `num_beams` hypotheses that go on, and the best `num_beams` that have ended, of each source.

    The arithmetic is that of `generate()`, in the same order and precision; hypotheses whose scores are equal may come
    in another order. The score of a hypothesis is the sum of its log-probabilities over its length to the power of
    `length_penalty`, where its length is the number of tokens behind its prompt, the end of the sentence among them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        settings: Any = plan.settings
        self._length_penalty: float = settings.length_penalty
        self._stops_when_full = settings.early_stopping is True
        self._waits_for_longest = settings.early_stopping == "never" and settings.length_penalty > 0
        # As many as generate() looks at, so that `num_beams` are left if all others end.
        self._kept = max(2, 1 + len(plan.ends)) * plan.beams
        sources = len(plan.targets.maximum)
        # All beams of a source begin alike, and only the first counts.
        self._scores = np.full((sources, plan.beams), _FAR)
        self._scores[:, 0] = 0
        self.ends = np.zeros((sources, plan.beams), dtype=END)
        self.ends["score"] = _FAR
        self._has_ended = np.zeros((sources, plan.beams), dtype=bool)
        self._number_sources()

    def _number_sources(self) -> None:
        self._first_rows = np.arange(len(self._scores))[:, None] * self._plan.beams
        self._by_source = np.arange(len(self._scores))[:, None]

    def advance(self, length: int, proposal: Proposal) -> Continuation:
        """As `Search.advance`."""
        targets, beams = self._plan.targets, self._plan.beams
        by_source = self._by_source
        width = proposal.tokens.shape[1]
        log_probs = proposal.log_probs.reshape(-1, beams, width)
        sums = (log_probs + self._scores[:, :, None]).reshape(-1, beams * width)
        best = np.argsort(-sums, axis=1, kind="stable")[:, : self._kept]
        candidates = np.empty(best.shape, dtype=END)
        candidates["score"] = sums[by_source, best]
        candidates["length"] = length
        candidates["parent"] = best // width + self._first_rows
        candidates["token"] = proposal.tokens.reshape(sums.shape)[by_source, best]
        candidates["log_prob"] = log_probs.reshape(sums.shape)[by_source, best]

        is_chosen = targets.prompt_lengths <= length
        is_end = (candidates["token"][:, :, None] == self._plan.ends).any(axis=-1) & is_chosen[:, None]
        is_end |= (targets.maximum <= length + 1)[:, None]
        chosen = self._continue(candidates, is_end)
        # Of tokens behind the prompt; none are scored while it is read.
        numbers = np.maximum(length + 1 - targets.prompt_lengths, 1)
        self._end(candidates[:, :beams], is_end[:, :beams], numbers)
        over = ~self._may_improve(numbers) | is_end.all(axis=1)
        if self._stops_when_full:
            over |= self._has_ended.all(axis=1)
        return Continuation(chosen["parent"].ravel(), chosen["token"].ravel(), chosen["log_prob"].ravel(), over)

    def _continue(self, candidates: np.ndarray, is_end: np.ndarray) -> np.ndarray:
        """The best candidates that go on, `(B, beams)`."""
        scores = candidates["score"] + is_end * _FAR
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._plan.beams]
        self._scores = scores[self._by_source, best]
        chosen: np.ndarray = candidates[self._by_source, best]
        return chosen

    def _end(self, candidates: np.ndarray, is_end: np.ndarray, numbers: np.ndarray) -> None:
        """Keep those of the best candidates, `(B, beams)`, that have ended and are better than what ended before."""
        if not is_end.any():
            return
        new = candidates.copy()
        new["score"] = np.where(is_end, new["score"] / self._norms(numbers), -np.inf)
        ends = np.concatenate([self.ends, new], axis=1)
        best = np.argsort(-ends["score"], axis=1, kind="stable")[:, : self._plan.beams]
        self.ends = ends[self._by_source, best]
        self._has_ended = np.concatenate([self._has_ended, is_end], axis=1)[self._by_source, best]

    def _may_improve(self, numbers: np.ndarray) -> np.ndarray:
        """For each source whether a hypothesis that goes on may still become better than one that has ended, `(B,)`.

        Sums only fall, so what the best one has now, divided by a length that it may reach, is taken for all it can
        have: the length that it has, or with `early_stopping="never"` the one that is best for it.
        """
        if self._waits_for_longest:
            numbers = self._plan.targets.maximum - self._plan.targets.prompt_lengths
        best = self._scores[:, :1] / self._norms(numbers)
        worst = np.where(self._has_ended, self.ends["score"].min(axis=1, keepdims=True), _FAR)
        may_improve: np.ndarray = (best > worst).any(axis=1)
        return may_improve

    def _norms(self, numbers: np.ndarray) -> np.ndarray:
        """What sums of the log-probabilities of so many tokens are divided by, `(B, 1)`."""
        return length_norms(numbers, self._length_penalty)[:, None]

    def select(self, sources: np.ndarray) -> None:
        """As `Search.select`."""
        self._plan = self._plan.select(sources)
        self._scores, self.ends, self._has_ended = self._scores[sources], self.ends[sources], self._has_ended[sources]
        self._number_sources()
