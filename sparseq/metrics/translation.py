"""Corpus BLEU and chrF, computed by sacrebleu."""

from collections.abc import Sequence
from typing import Any

from sparseq.metrics.corpus import make_metrics
from sparseq.metrics.scoring import SEED, score_predictions


def translation_scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    bootstrap: int = 0,
    seed: int = SEED,
) -> dict[str, Any]:
    """Corpus BLEU (Papineni et al. 2002) and chrF2 (Popović 2015) against one reference each.

    Args:
        hypotheses: Translations as plain text.
        references: One reference for each translation, as plain text.
        tokenize: sacrebleu's tokenizer for BLEU: "13a" for plain text, "none" for text that is tokenised already.
        lowercase: Ignore case in both metrics.
        bootstrap: Number of resamples for 95% confidence intervals (Koehn 2004); 0 leaves them out.
        seed: Seed of the resampling.

    Returns:
        `bleu` and `chrf` (0 to 100), `bleu_signature` and `chrf_signature`, `sentences`, `brevity_penalty`,
        `length_ratio`, and with `bootstrap` also `bleu_ci` and `chrf_ci`: half the width of the interval.

    Raises:
        ValueError: The lists differ in length, are empty, or `tokenize` is unknown.
    """
    metrics = make_metrics(["bleu", "chrf"], tokenize=tokenize, lowercase=lowercase)
    return score_predictions(hypotheses, references, metrics, bootstrap=bootstrap, seed=seed).report()
