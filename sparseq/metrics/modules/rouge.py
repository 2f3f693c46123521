"""ROUGE, computed by rouge-score, as a module for `evaluate.load`."""

from typing import Any

from sparseq.metrics.corpus import ROUGE_KINDS
from sparseq.metrics.corpus import Rouge as _Rouge
from sparseq.metrics.module import TextMetric
from sparseq.metrics.scoring import SEED


class Rouge(TextMetric):
    """Mean F1 of ROUGE-1, ROUGE-2, ROUGE-L and summary-level ROUGE-L, from 0 to 100."""

    metric = "rouge"
    description = "ROUGE: words, pairs of words and subsequences shared with references (mean F1, 0 to 100)."
    options = """    stemmer: strip English suffixes (default False)
    tokenize: "ascii" (default, the original's), or one of sacrebleu's tokenizers for other scripts: "intl", "zh", ...
Returns:
    rouge1, rouge2, rougeL, rougeLsum (sentences of a text on lines of their own), score (that is rougeL), signature;
    with bootstrap also each one's half interval, such as rouge1_ci
"""
    citation = """@inproceedings{lin-2004-rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}"""

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[Any],
        stemmer: bool = False,
        tokenize: str = "ascii",
        bootstrap: int = 0,
        seed: int = SEED,
    ) -> dict[str, Any]:
        metric = _Rouge(kinds=ROUGE_KINDS, stemmer=stemmer, tokenize=tokenize)
        return self._score(metric, predictions, references, main="rougeL", bootstrap=bootstrap, seed=seed)
