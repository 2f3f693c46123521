"""Exact match as a module for `evaluate.load`."""

from typing import Any

from sparseq.metrics.corpus import ExactMatch as _ExactMatch
from sparseq.metrics.module import TextMetric
from sparseq.metrics.scoring import SEED


class ExactMatch(TextMetric):
    """Percentage of predictions that equal a reference."""

    metric = "exact_match"
    description = "Percentage of predictions that equal a reference, white space around them aside."
    options = """    lowercase: ignore case (default False)
Returns:
    score, signature; with bootstrap also score_ci, half the width of the interval
"""

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[Any],
        lowercase: bool = False,
        bootstrap: int = 0,
        seed: int = SEED,
    ) -> dict[str, Any]:
        return self._score(_ExactMatch(lowercase=lowercase), predictions, references, bootstrap=bootstrap, seed=seed)
