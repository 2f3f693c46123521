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
        targets, beams, by_source = self._plan.targets, self._plan.beams, self._by_source
        width = proposal.tokens.shape[1]
        sums = (proposal.log_probs.reshape(-1, beams, width) + self._scores[:, :, None]).reshape(-1, beams * width)
        best = np.argsort(-sums, axis=1, kind="stable")[:, : self._kept]
        places = best + by_source * (beams * width)
        scores, tokens, log_probs = (np.take(array, places) for array in (sums, proposal.tokens, proposal.log_probs))
        parents = best // width + self._first_rows

        is_end = np.zeros(tokens.shape, dtype=bool)
        for end in self._plan.ends.tolist():
            is_end |= tokens == end
        is_end &= (targets.prompt_lengths <= length)[:, None]
        is_end |= (targets.maximum <= length + 1)[:, None]
        # Of tokens behind the prompt; none are scored while it is read.
        numbers = np.maximum(length + 1 - targets.prompt_lengths, 1)
        if is_end.any():
            new = np.empty(scores.shape, dtype=END)
            new["score"], new["length"], new["parent"] = scores, length, parents
            new["token"], new["log_prob"] = tokens, log_probs
            self._end(new[:, :beams], is_end[:, :beams], numbers)
            # The best that go on.
            scores = scores + is_end * _FAR
            order = np.argsort(-scores, axis=1, kind="stable")
            scores, parents, tokens, log_probs = (
                array[by_source, order] for array in (scores, parents, tokens, log_probs)
            )
        self._scores = scores[:, :beams]
        over = ~self._may_improve(numbers) | is_end.all(axis=1)
        if self._stops_when_full:
            over |= self._has_ended.all(axis=1)
        parents, tokens, log_probs = (array[:, :beams].ravel() for array in (parents, tokens, log_probs))
        return Continuation(parents, tokens, log_probs, over)

    def _end(self, new: np.ndarray, is_end: np.ndarray, numbers: np.ndarray) -> None:
        """Keep those of the best candidates, `(B, beams)`, that have ended and are better than what ended before."""
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
