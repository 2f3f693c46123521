"""Settings whose effect depends on the length of a hypothesis alone: tokens that are forbidden or forced there."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .decoding_plan import Plan, token_list


@dataclass(frozen=True)
class _Rule:
    """Holds for the next token of hypotheses with `first <= length < stop` tokens, the start token included.

    Attributes:
        tokens: `(n,)` int64.
        first, stop: For each source, `(B,)`.
    """

    tokens: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def holds(self, length: int, rows: int) -> np.ndarray:
        """For each of the `(B * rows,)` rows."""
        return ((self.first <= length) & (length < self.stop)).repeat(rows)

    def select(self, sources: np.ndarray) -> "_Rule":
        return replace(self, first=self.first[sources], stop=self.stop[sources])


class LengthRules:
    """Applies minimum lengths, suppressed and single bad tokens, forced first and last tokens."""

    def __init__(self, plan: Plan, vocab_size: int) -> None:
        self._rows = plan.rows
        targets, settings = plan.targets, plan.settings
        zeros, everywhere = np.zeros_like(targets.maximum), targets.maximum
        begin = _begin_index(plan)

        def rule(tokens: Iterable[int], first: np.ndarray, stop: np.ndarray) -> list[_Rule]:
            known = sorted({token for token in tokens if 0 <= token < vocab_size})
            return [_Rule(np.array(known, dtype=np.int64), first, stop)] if known else []

        has_minimum = bool((targets.minimum > targets.prompt_lengths).any())
        self._forbidden = [
            *rule([*(settings.suppress_tokens or ()), *_single_bad_words(plan)], zeros, everywhere),
            *rule(settings.begin_suppress_tokens or (), begin, begin + 1),
            *rule(plan.ends.tolist() if has_minimum else (), zeros, targets.minimum),
        ]
        # Where both hold, generate() forces the last.
        self._forced = [
            *rule(token_list(settings.forced_bos_token_id), zeros + 1, zeros + 2),
            *rule(token_list(settings.forced_eos_token_id), targets.maximum - 1, targets.maximum),
        ]

    @property
    def forbidden(self) -> int:
        """How many tokens may be forbidden at once."""
        return sum(len(rule.tokens) for rule in self._forbidden)

    @property
    def forced(self) -> int:
        """How many tokens may be forced at once."""
        return max((len(rule.tokens) for rule in self._forced), default=0)

    def on_candidates(self, length: int, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of candidates `(R, C)` for the token behind `length` others: forbidden ones get minus infinity,
        forced ones take the place of the first and have the score 0."""
        for rule in self._forbidden:
            holds = rule.holds(length, self._rows)
            if holds.any():
                forbidden = (ids[:, :, None] == rule.tokens).any(axis=-1) & holds[:, None]
                scores = np.where(forbidden, np.float32(-np.inf), scores)
        for rule in self._forced:
            holds = rule.holds(length, self._rows)
            if holds.any():
                ids, scores = force(holds, rule.tokens, ids, scores)
        return ids, scores

    def on_vocabulary(self, length: int, scores: np.ndarray) -> np.ndarray:
        """The same for scores `(R, V)` of all tokens, which are changed in place."""
        for rule in self._forbidden:
            holds = np.flatnonzero(rule.holds(length, self._rows))
            scores[holds[:, None], rule.tokens] = -np.inf
        for rule in self._forced:
            holds = np.flatnonzero(rule.holds(length, self._rows))
            scores[holds] = -np.inf
            scores[holds[:, None], rule.tokens] = 0
        return scores

    def select(self, sources: np.ndarray) -> None:
        """Keep only these sources."""
        self._forbidden = [rule.select(sources) for rule in self._forbidden]
        self._forced = [rule.select(sources) for rule in self._forced]


def force(rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates `(R, C)` of which some rows, `(R,)` bool, may only choose among `tokens`, `(n,)` or a row each."""
    ids, scores = ids.copy(), np.where(rows[:, None], np.float32(-np.inf), scores)
    ids[rows, : tokens.shape[-1]] = tokens
    scores[rows, : tokens.shape[-1]] = 0
    return ids, scores


def _begin_index(plan: Plan) -> np.ndarray:
    """The length at which `begin_suppress_tokens` holds for each source: behind a forced first token."""
    lengths = plan.targets.prompt_lengths
    is_forced = (lengths == 1) & (plan.settings.forced_bos_token_id is not None)
    return lengths + is_forced


def _single_bad_words(plan: Plan) -> list[int]:
    """Bad words of one token; `generate()` lets the end of a sentence pass."""
    words = plan.settings.bad_words_ids or ()
    return [word[0] for word in words if len(word) == 1 and word[0] not in plan.ends]


def needs_history(plan: Plan) -> bool:
    """Whether a setting asks for more than rules on lengths can give: processors that look back, or their order."""
    settings: Any = plan.settings
    suppressed = {*(settings.suppress_tokens or ()), *(settings.begin_suppress_tokens or ())}
    forced = {*token_list(settings.forced_bos_token_id), *token_list(settings.forced_eos_token_id)}
    return bool(
        settings.repetition_penalty != 1
        or settings.no_repeat_ngram_size
        or settings.encoder_no_repeat_ngram_size
        or any(len(word) > 1 for word in settings.bad_words_ids or ())
        or settings.sequence_bias
        or settings.exponential_decay_length_penalty
        or settings.renormalize_logits
        or settings.remove_invalid_values
        or suppressed & forced
    )
