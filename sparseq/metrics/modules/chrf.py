"""chrF and chrF++, computed by sacrebleu, as a module for `evaluate.load`."""

from typing import Any

from sparseq.metrics.corpus import Chrf as _Chrf
from sparseq.metrics.module import TextMetric
from sparseq.metrics.scoring import SEED


class Chrf(TextMetric):
    """Corpus chrF from 0 to 100, with sacrebleu's signature."""

    metric = "chrf"
    description = "chrF: F-score of the n-grams of characters (sacrebleu, corpus level, 0 to 100)."
    options = """    lowercase: ignore case (default False)
    word_order: longest n-gram of words that counts too (default 0; 2 is chrF++)
Returns:
    score, signature; with bootstrap also score_ci, half the width of the interval
"""
    citation = """@inproceedings{popovic-2015-chrf,
  title = {{chrF}: character n-gram {F}-score for automatic {MT} evaluation},
  author = {Popovi{\\'c}, Maja},
  booktitle = {Proceedings of WMT},
  year = {2015}
}"""

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[Any],
        lowercase: bool = False,
        word_order: int = 0,
        bootstrap: int = 0,
        seed: int = SEED,
    ) -> dict[str, Any]:
        return self._score(
            _Chrf(lowercase=lowercase, word_order=word_order), predictions, references, bootstrap=bootstrap, seed=seed
        )
