"""Metrics of generated text with signatures, confidence intervals and paired tests; also as `evaluate` modules.

`sparseq.metrics.load("bleu")` is `evaluate.load` for the metrics of this package: "bleu", "chrf", "exact_match" and
"rouge".
"""

from sparseq.metrics.loading import load, module_path
from sparseq.metrics.seq2seq import Seq2SeqMetrics
from sparseq.metrics.translation import translation_scores

__all__ = ["Seq2SeqMetrics", "load", "module_path", "translation_scores"]
