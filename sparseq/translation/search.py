"""The search for the translations of one batch: what all searches have in common, and greedy search and sampling."""

from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from .backend import OnToken
from .decoding_plan import Plan
from .proposals import Proposal, Proposer

# Rows that go on for nothing cost a part of each step; leaving costs a copy of what the engine keeps of the others.
_LEAVING_SHARE = 1 / 8

END = np.dtype(
    [("score", np.float32), ("length", np.int64), ("parent", np.int64), ("token", np.int64), ("log_prob", np.float32)]
)
"""The end of a hypothesis: its score, its length before the last token, the row that had it then, the last token."""


@dataclass(frozen=True)
class Continuation:
    """What a search has chosen for the R rows of the next step.

    Attributes:
        parents: The row of this step that each continues, `(R,)`; one of the same source.
        tokens, log_probs: What each is continued with, `(R,)`.
        over: For each source whether its search is over, `(B,)`; its rows do not matter then.
    """

    parents: np.ndarray
    tokens: np.ndarray
    log_probs: np.ndarray
    over: np.ndarray


class Search(Protocol):
    """Chooses among proposals.

    Attributes:
        ends: Hypotheses that have ended, `(B, rows)` of `END`.
    """

    ends: np.ndarray

    def advance(self, length: int, proposal: Proposal) -> Continuation:
        """Choose the tokens behind `length` others, the start token included."""
        ...

    def select(self, sources: np.ndarray) -> None:
        """Keep only these sources."""
        ...


class History:
    """Tokens of all rows at all steps, each with the row of the step before that it continues.

    So nothing is copied when beams change places or sentences leave the batch: rows of a step are numbered as they
    were then, and hypotheses are put together at the end by going back from their last token.
    """

    def __init__(self, longest: int, rows: int) -> None:
        # Of each length, what the rows that had it were continued with.
        self._tokens = np.zeros((longest, rows), dtype=np.int64)
        self._parents = np.zeros((longest, rows), dtype=np.int64)
        self._log_probs = np.zeros((longest, rows), dtype=np.float32)
        self._attention: list[np.ndarray] = []

    def append(self, length: int, parents: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Keep what rows are continued with that had `length` tokens."""
        rows = len(tokens)
        self._parents[length, :rows] = parents
        self._tokens[length, :rows] = tokens
        self._log_probs[length, :rows] = log_probs

    def append_attention(self, attention: np.ndarray) -> None:
        """Keep attention `(R, S)` of a step."""
        self._attention.append(attention.copy())

    def trace(self, ends: np.ndarray) -> "Traces":
        """The hypotheses that ended so, `(H,)` of `END`."""
        lengths, rows = ends["length"], ends["parent"].copy()
        longest = int(lengths.max())
        tokens = np.zeros((len(ends), longest + 1), dtype=np.int64)
        log_probs = np.zeros(tokens.shape, dtype=np.float32)
        attention = None
        if self._attention:
            attention = np.zeros((len(ends), longest, self._attention[0].shape[1]), dtype=np.float32)
        every = np.arange(len(ends))
        tokens[every, lengths], log_probs[every, lengths] = ends["token"], ends["log_prob"]
        for length in range(longest, 0, -1):
            inner = np.flatnonzero(lengths > length)
            tokens[inner, length] = self._tokens[length, rows[inner]]
            log_probs[inner, length] = self._log_probs[length, rows[inner]]
            rows[inner] = self._parents[length, rows[inner]]
            if attention is not None:
                reached = np.flatnonzero(lengths >= length)
                attention[reached, length - 1] = self._attention[length - 1][rows[reached]]
        return Traces(tokens, log_probs, attention)


@dataclass(frozen=True)
class Traces:
    """H hypotheses put together; what is behind the end of one means nothing.

    Attributes:
        tokens: `(H, L)` int64, of which the first stands for the start token.
        log_probs: Of each token, `(H, L)` float32.
        attention: `(H, L - 1, S)` of the steps that chose all tokens but the start token, if it was kept.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    attention: np.ndarray | None


def run_search(proposer: Proposer, search: Search, plan: Plan) -> tuple[np.ndarray, History]:
    """Decode until the search of each source is over.

    Sources whose search is over leave the batch, not one by one but when they are `_LEAVING_SHARE` of it.

    Args:
        proposer, search: At their beginning; they are changed.
        plan: Of the sources that both begin with.

    Returns:
        How the hypotheses of each source have ended, `(B, rows)` of `END`, and where they came from.
    """
    targets = plan.targets
    sources = np.arange(len(targets.maximum))
    is_done = np.zeros(len(sources), dtype=bool)
    ends = np.zeros((len(sources), plan.rows), dtype=END)
    history = History(int(targets.maximum.max()), len(sources) * plan.rows)
    tokens, rows = targets.prompts[:, 0].repeat(plan.rows), None
    for length in count(1):
        proposal = proposer.step(length, tokens, rows)
        if proposal.attention is not None:
            history.append_attention(proposal.attention)
        chosen = search.advance(length, proposal)
        ending = np.flatnonzero(chosen.over & ~is_done)
        if len(ending):
            ends[sources[ending]] = search.ends[ending]
            is_done[ending] = True
            if is_done.all():
                break
        parents, tokens, log_probs = chosen.parents, chosen.tokens, chosen.log_probs
        own = np.arange(len(parents))
        rows = parents
        if is_done.sum() >= _LEAVING_SHARE * len(is_done):
            staying = np.flatnonzero(~is_done)
            proposer.select(staying)
            search.select(staying)
            sources, is_done = sources[staying], is_done[staying]
            kept = rows_of(staying, plan.rows)
            parents, tokens, log_probs = parents[kept], tokens[kept], log_probs[kept]
            own = np.arange(len(kept))
            rows = own - own % plan.rows + parents % plan.rows
        history.append(length, parents, tokens, log_probs)
        rows = None if np.array_equal(rows, own) else rows
    return ends, history


class RowSearch:
    """Greedy search and sampling: each row goes its own way until it ends.

    Each proposal is one token, which the proposer has found or drawn.
    """

    def __init__(self, plan: Plan, on_token: OnToken | None = None) -> None:
        self._plan = plan
        self._on_token = on_token
        sources = len(plan.targets.maximum)
        self.ends = np.zeros((sources, plan.rows), dtype=END)
        # Of each row.
        self._sources = np.arange(sources).repeat(plan.rows)
        self._prompt_lengths = plan.targets.prompt_lengths.repeat(plan.rows)
        self._maximum = plan.targets.maximum.repeat(plan.rows)
        self._is_open = np.ones(sources * plan.rows, dtype=bool)
        self._sums = np.zeros(sources * plan.rows, dtype=np.float32)

    def advance(self, length: int, proposal: Proposal) -> Continuation:
        """As `Search.advance`."""
        tokens, log_probs = proposal.tokens[:, 0], proposal.log_probs[:, 0]
        is_chosen = self._prompt_lengths <= length
        is_end = (tokens[:, None] == self._plan.ends).any(axis=1) & is_chosen
        self._sums += log_probs
        if self._on_token is not None:
            self._tell(tokens, self._is_open & is_chosen & ~is_end)
        ending = np.flatnonzero(self._is_open & (is_end | (self._maximum <= length + 1)))
        if len(ending):
            ends = self.ends.reshape(-1)
            numbers = length + 1 - self._prompt_lengths[ending]
            norms = length_norms(numbers, self._plan.settings.length_penalty)
            ends["score"][ending] = self._sums[ending] / norms
            ends["length"][ending] = length
            ends["parent"][ending] = ending
            ends["token"][ending] = tokens[ending]
            ends["log_prob"][ending] = log_probs[ending]
            self._is_open[ending] = False
        over = np.logical_not(self._is_open.reshape(-1, self._plan.rows).any(axis=1))
        return Continuation(np.arange(len(tokens)), tokens, log_probs, over)

    def _tell(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        assert self._on_token is not None
        for row in np.flatnonzero(rows):
            self._on_token(int(self._sources[row]), int(tokens[row]))

    def select(self, sources: np.ndarray) -> None:
        """As `Search.select`."""
        rows = rows_of(sources, self._plan.rows)
        self._sources, self._is_open, self._sums = self._sources[rows], self._is_open[rows], self._sums[rows]
        self._prompt_lengths, self._maximum = self._prompt_lengths[rows], self._maximum[rows]
        self.ends = self.ends[sources]


def length_norms(numbers: np.ndarray, length_penalty: float) -> np.ndarray:
    """What sums of the log-probabilities of so many tokens are divided by, float32."""
    # Whole numbers have no negative powers in NumPy.
    norms: np.ndarray = (numbers.astype(np.float64) ** length_penalty).astype(np.float32)
    return norms


def rows_of(sources: np.ndarray, rows: int) -> np.ndarray:
    """The rows of sources that have `rows` each, `(B * rows,)`."""
    found: np.ndarray = (sources[:, None] * rows + np.arange(rows)).ravel()
    return found
