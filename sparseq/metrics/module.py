"""What the `evaluate` modules of this package have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from sparseq.metrics.corpus import METRICS, CorpusMetric
from sparseq.metrics.scoring import SEED, score_predictions

_INPUTS = """
Args:
    predictions: list of texts
    references: one text for each prediction, or a list of texts for each
    bootstrap: number of resampled test sets for a 95% confidence interval (default 0: none)
    seed: seed of the resampling
"""


class TextMetric(evaluate.Metric, ABC):
    """A metric of texts. It is abstract, since `evaluate` takes the first concrete metric class of a module's file.

    Attributes:
        metric: Name of the metric in `sparseq.metrics.corpus.METRICS`.
        description: What it measures.
        options: The arguments of `compute` that only this metric has, a line for each.
        citation: The paper, as BibTeX.
    """

    metric: ClassVar[str]
    description: ClassVar[str]
    options: ClassVar[str] = ""
    citation: ClassVar[str] = ""

    @abstractmethod
    def _compute(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Score all texts that were added; called with `predictions`, `references` and the options of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        several = {"predictions": text, "references": datasets.Sequence(text)}
        single = {"predictions": text, "references": text}
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_INPUTS + self.options,
            features=[datasets.Features(several), datasets.Features(single)],
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        # Nothing is downloaded; a missing package is noticed now and not after hours of generation.
        METRICS[self.metric]()

    def add_batch(
        self, *, predictions: Sequence[str] | None = None, references: Sequence[Any] | None = None, **others: Any
    ) -> None:
        """Add texts to what `compute` will score."""
        if predictions is not None and len(predictions) == 0:
            raise ValueError("There is nothing to score: the list of predictions is empty.")
        super().add_batch(predictions=predictions, references=references, **others)

    def _score(
        self,
        metric: CorpusMetric,
        predictions: Sequence[str],
        references: Sequence[Any],
        *,
        bootstrap: int = 0,
        seed: int = SEED,
        main: str | None = None,
    ) -> dict[str, Any]:
        """`score`, `score_ci` (half the interval's width) with `bootstrap`, `signature`, and what else there is."""
        scored = score_predictions(predictions, references, [metric], bootstrap=bootstrap, seed=seed)
        main = main or metric.figures[0]
        result: dict[str, Any] = {"score": scored.scores[main]}
        half = scored.half_intervals()
        if half:
            result["score_ci"] = half[main]
        result["signature"] = scored.signatures[metric.name]
        if len(metric.figures) > 1:
            result |= scored.scores | {f"{figure}_ci": value for figure, value in half.items()}
        return result | scored.details[metric.name]
