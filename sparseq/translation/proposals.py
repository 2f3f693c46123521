"""One decoder step of an engine, and what a search may choose from it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decoding_plan import NO_TOKEN, Plan
from .engine import Engine, StepOutput
from .length_rules import LengthRules, force, needs_history

# Where more tokens than this may be forbidden, a search looks at the scores of all tokens instead of at as many more
# candidates.
_MOST_EXTRA_CANDIDATES = 64


@dataclass(frozen=True)
class Proposal:
    """Tokens that each of R rows may continue with; one where the choice is made, as in greedy search.

    Attributes:
        tokens: `(R, C)` int64.
        log_probs: `(R, C)` float32, minus infinity for what may not be chosen.
        attention: `(R, S)`, if asked for.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    attention: np.ndarray | None


class Proposer(ABC):
    """Feeds an engine, and proposes what may follow; prompts are proposed like any token that is forced."""

    # How many candidates to ask the engine for; 0 for the logits of all tokens.
    _candidates = 0

    def __init__(self, engine: Engine, state: Any, plan: Plan, attention: bool) -> None:
        self._engine, self._state, self._plan, self._attention = engine, state, plan, attention

    def step(self, length: int, tokens: np.ndarray, rows: np.ndarray | None) -> Proposal:
        """Append a token to each row, and propose what follows.

        Args:
            length: Tokens that each row has by then, the start token included.
            tokens: `(R,)` int64.
            rows: For each row the one of the former step that it continues, `(R,)`; None for itself.
        """
        output = self._engine.step(
            self._state, tokens, rows=rows, candidates=self._candidates, attention=self._attention
        )
        ids, log_probs = self._propose(length, tokens, rows, output)
        if length < self._plan.targets.longest_prompt:
            given = self._plan.targets.prompts[:, length].repeat(self._plan.rows)
            is_given = given != NO_TOKEN
            ids, log_probs = force(is_given, given[is_given, None], ids, log_probs)
        return Proposal(ids, log_probs, output.attention)

    @abstractmethod
    def _propose(
        self, length: int, tokens: np.ndarray, rows: np.ndarray | None, output: StepOutput
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities, `(R, C)`, from what a step gave, prompts aside."""

    def select(self, sources: np.ndarray) -> None:
        """Keep only these sources."""
        self._engine.select(self._state, sources)
        self._plan = self._plan.select(sources)


class _Candidates(Proposer):
    """The likeliest tokens, by their log-probabilities over the whole vocabulary."""

    def __init__(self, *shared: Any, rules: LengthRules, number: int) -> None:
        super().__init__(*shared)
        self._rules = rules
        # So many more that enough are left when some are forbidden.
        self._candidates = min(max(number + rules.forbidden, rules.forced), self._engine.vocab_size)

    def _propose(
        self, length: int, tokens: np.ndarray, rows: np.ndarray | None, output: StepOutput
    ) -> tuple[np.ndarray, np.ndarray]:
        assert output.candidate_ids is not None
        assert output.candidate_log_probs is not None
        return self._rules.on_candidates(length, output.candidate_ids, output.candidate_log_probs)

    def select(self, sources: np.ndarray) -> None:
        super().select(sources)
        self._rules.select(sources)


class _SampledCandidates(_Candidates):
    """One of the `top_k` likeliest tokens, drawn."""

    def __init__(self, *shared: Any, rules: LengthRules, number: int, draw: "_Draw") -> None:
        super().__init__(*shared, rules=rules, number=number)
        self._warpers: Any = self._plan.warpers()
        self._draw = draw

    def _propose(
        self, length: int, tokens: np.ndarray, rows: np.ndarray | None, output: StepOutput
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, scores = super()._propose(length, tokens, rows, output)
        # What they do to a token depends on the scores of the others, not on which they are.
        scores = self._warpers(torch.from_numpy(ids), torch.from_numpy(scores)).numpy()
        columns, log_probs = self._draw(scores)
        return np.take_along_axis(ids, columns, axis=1), log_probs

    def select(self, sources: np.ndarray) -> None:
        super().select(sources)
        self._draw.select(sources)


class _LikeliestAllowed(Proposer):
    """The likeliest token where some are forbidden: log-probabilities need the logits of all that are left."""

    def __init__(self, *shared: Any, rules: LengthRules) -> None:
        super().__init__(*shared)
        self._rules = rules

    def _propose(
        self, length: int, tokens: np.ndarray, rows: np.ndarray | None, output: StepOutput
    ) -> tuple[np.ndarray, np.ndarray]:
        assert output.logits is not None
        return _likeliest(self._rules.on_vocabulary(length, output.logits))

    def select(self, sources: np.ndarray) -> None:
        super().select(sources)
        self._rules.select(sources)


class _Processed(Proposer):
    """Whatever a search wants, from the logits of all tokens after `generate()`'s own processors."""

    def __init__(self, *shared: Any, input_ids: np.ndarray, number: int, draw: "_Draw | None") -> None:
        super().__init__(*shared)
        self._number = number
        self._draw = draw
        self._input_ids = torch.from_numpy(input_ids)
        # What each row has been fed, start token included.
        rows, longest = len(input_ids) * self._plan.rows, int(self._plan.targets.maximum.max())
        self._history = torch.zeros(rows, longest, dtype=torch.int64)
        self._groups = self._make_groups()

    def _propose(
        self, length: int, tokens: np.ndarray, rows: np.ndarray | None, output: StepOutput
    ) -> tuple[np.ndarray, np.ndarray]:
        if rows is not None:
            self._history = self._history[torch.from_numpy(rows)]
        self._history[:, length - 1] = torch.from_numpy(tokens)
        scores = torch.from_numpy(output.logits)
        # generate() processes log-probabilities in beam search, and logits else.
        is_beam_search = self._plan.beams > 1
        scores = self._process(length, scores.log_softmax(dim=-1) if is_beam_search else scores)
        if is_beam_search:
            top = scores.topk(min(self._number, scores.shape[1]))
            return top.indices.numpy(), top.values.numpy()
        return _likeliest(scores.numpy()) if self._draw is None else self._draw(scores.numpy())

    def _process(self, length: int, scores: torch.Tensor) -> torch.Tensor:
        histories = self._history[:, :length]
        if len(self._groups) == 1:
            processed: torch.Tensor = self._groups[0][1](histories, scores)
            return processed
        processed = torch.empty_like(scores)
        for rows, processors in self._groups:
            processed[rows] = processors(histories[rows], scores[rows])
        return processed

    def _make_groups(self) -> list[tuple[torch.Tensor, Any]]:
        """Rows whose prompts have one length, and their processors, which count from it."""
        lengths = self._plan.targets.prompt_lengths
        groups = []
        for length in np.unique(lengths).tolist():
            sources = torch.from_numpy(np.flatnonzero(lengths == length))
            rows = (sources[:, None] * self._plan.rows + torch.arange(self._plan.rows)).flatten()
            groups.append((rows, self._plan.processors(length, self._input_ids[sources])))
        return groups

    def select(self, sources: np.ndarray) -> None:
        kept = torch.from_numpy(sources)
        self._history = self._history.unflatten(0, (-1, self._plan.rows))[kept].flatten(0, 1)
        self._input_ids = self._input_ids[kept]
        super().select(sources)
        self._groups = self._make_groups()
        if self._draw is not None:
            self._draw.select(sources)


class _Draw:
    """Draws a token of each row.

    Each row has its own random number at each step, whatever other rows have ended by then.
    """

    def __init__(self, plan: Plan) -> None:
        seed = getattr(plan.settings, "seed", None)
        # Without one, `torch.manual_seed` decides, as it does for generate().
        self._generator = np.random.default_rng(int(torch.randint(2**62, ())) if seed is None else seed)
        self._rows_per_source = plan.rows
        self._rows = np.arange(len(plan.targets.maximum) * plan.rows)
        self._drawn = len(self._rows)

    def __call__(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns `(R, 1)` drawn by the softmax of `scores` `(R, C)`, and their log-probabilities."""
        log_probs = _log_softmax(scores)
        cumulative = np.exp(log_probs.astype(np.float64)).cumsum(axis=1)
        total = cumulative[:, -1:]
        numbers = self._generator.random(self._drawn)[self._rows, None] * total
        # The first column that exceeds the number has a probability above 0; rounding must not leave none.
        columns = (cumulative > np.minimum(numbers, np.nextafter(total, 0))).argmax(axis=1, keepdims=True)
        return columns, np.take_along_axis(log_probs, columns, axis=1)

    def select(self, sources: np.ndarray) -> None:
        self._rows = self._rows.reshape(-1, self._rows_per_source)[sources].ravel()


def make_proposer(engine: Engine, input_ids: np.ndarray, state: Any, plan: Plan, *, attention: bool) -> Proposer:
    """The cheapest proposer that gives what `generate()` would choose from.

    Args:
        input_ids: Sources, `(B, S)`.
        state: Of `engine.start` for these sources.
        plan: Of them.
        attention: Propose with attention.
    """
    rules = LengthRules(plan, engine.vocab_size)
    shared = (engine, state, plan, attention)
    settings: Any = plan.settings
    if settings.do_sample:
        draw = _Draw(plan)
        if needs_history(plan) or not settings.top_k or settings.top_h is not None:
            return _Processed(*shared, input_ids=input_ids, number=1, draw=draw)
        return _SampledCandidates(*shared, rules=rules, number=settings.top_k, draw=draw)
    # As generate(): enough that a row for each beam is left if all others end.
    number = 1 if plan.beams == 1 else max(2, 1 + len(plan.ends)) * plan.beams
    if needs_history(plan) or (plan.beams > 1 and rules.forbidden > _MOST_EXTRA_CANDIDATES):
        return _Processed(*shared, input_ids=input_ids, number=number, draw=None)
    if plan.beams == 1 and rules.forbidden:
        return _LikeliestAllowed(*shared, rules=rules)
    return _Candidates(*shared, rules=rules, number=number)


def _likeliest(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token of each row of `(R, V)` scores and its log-probability, `(R, 1)` each."""
    ids = scores.argmax(axis=1, keepdims=True)
    highest = np.take_along_axis(scores, ids, axis=1)
    return ids, -np.log(np.exp(scores - highest).sum(axis=1, keepdims=True))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs
