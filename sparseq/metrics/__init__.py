"""Translation metrics: BLEU and chrF through sacrebleu, with signatures and optional confidence intervals."""

from sparseq.metrics.translation import translation_scores

__all__ = ["translation_scores"]
