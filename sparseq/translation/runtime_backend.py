"""Decoding over an engine that is not PyTorch, with the results of `generate()`."""

import numpy as np
from transformers import GenerationConfig

from .backend import Batch, Hypothesis, OnToken
from .beam_search import BeamSearch
from .decoding_plan import Plan, make_plan
from .engine import Engine
from .proposals import make_proposer
from .search import History, RowSearch, Search, run_search


class RuntimeBackend:
    """`Backend` over an engine: greedy search, sampling and beam search, as `generate()` does them.

    The tokens are those of `generate()`, and the scores up to rounding, where no two hypotheses have the same score;
    sampling draws from the same distribution, with random numbers of its own. What settings ask for beyond that is
    refused by name.

    Args:
        engine: Computes probabilities of tokens.
        name: Of the runtime, for people to read.
    """

    def __init__(self, engine: Engine, name: str = "ONNX Runtime") -> None:
        self.name = name
        self._engine = engine

    def decode(
        self, batch: Batch, settings: GenerationConfig, *, attention: bool = False, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """As `Backend.decode`. Samples come best first, too.

        Raises:
            ValueError: A setting is not supported, or a sentence is longer than the engine can decode; before anything
                is decoded.
        """
        if not len(batch.prefixes):
            return []
        plan = make_plan(batch, settings, self._engine)
        if on_token is not None and plan.rows > 1:
            raise ValueError("Tokens are streamed with `num_beams=1` and `num_return_sequences=1` only.")
        state = self._engine.start(batch.input_ids, batch.attention_mask, beams=plan.rows)
        proposer = make_proposer(self._engine, batch.input_ids, state, plan, attention=attention)
        search: Search = BeamSearch(plan) if plan.beams > 1 else RowSearch(plan, on_token)
        ends, history = run_search(proposer, search, plan)
        return _hypotheses(batch, plan, ends, history)


def _hypotheses(batch: Batch, plan: Plan, ends: np.ndarray, history: History) -> list[list[Hypothesis]]:
    """The best of each source."""
    number = int(plan.settings.num_return_sequences)
    best = np.argsort(-ends["score"], axis=1, kind="stable")[:, :number]
    ends = np.take_along_axis(ends, best, axis=1).ravel()
    traces = history.trace(ends)
    has_end = (ends["token"][:, None] == plan.ends).any(axis=1)
    source_lengths = batch.attention_mask.sum(axis=1)
    hypotheses = []
    for index, end in enumerate(ends):
        source = index // number
        prompt, length = int(plan.targets.prompt_lengths[source]), int(end["length"])
        tokens = traces.tokens[index, 1 : length + 1 - has_end[index]]
        weights = None
        if traces.attention is not None:
            weights = traces.attention[index, : len(tokens), : source_lengths[source]].copy()
        log_probs = traces.log_probs[index, prompt : length + 1]
        hypotheses.append(Hypothesis(tokens.tolist(), float(end["score"]), log_probs.tolist(), weights))
    return [hypotheses[first : first + number] for first in range(0, len(hypotheses), number)]
