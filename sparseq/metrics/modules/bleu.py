"""BLEU, computed by sacrebleu, as a module for `evaluate.load`."""

from typing import Any

from sparseq.metrics.corpus import Bleu as _Bleu
from sparseq.metrics.module import TextMetric
from sparseq.metrics.scoring import SEED


class Bleu(TextMetric):
    """Corpus BLEU from 0 to 100, with sacrebleu's signature."""

    metric = "bleu"
    description = "BLEU: n-grams of words that predictions share with references (sacrebleu, corpus level, 0 to 100)."
    options = """    tokenize: sacrebleu's tokenizer (default "13a"; "none" for text that is tokenised already)
    lowercase: ignore case (default False)
Returns:
    score, signature, brevity_penalty, length_ratio; with bootstrap also score_ci, half the width of the interval
"""
    citation = """@inproceedings{papineni-2002-bleu,
  title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {Proceedings of ACL},
  year = {2002}
}"""

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[Any],
        tokenize: str = "13a",
        lowercase: bool = False,
        bootstrap: int = 0,
        seed: int = SEED,
    ) -> dict[str, Any]:
        return self._score(
            _Bleu(tokenize=tokenize, lowercase=lowercase), predictions, references, bootstrap=bootstrap, seed=seed
        )
