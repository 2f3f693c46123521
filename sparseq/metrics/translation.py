"""Corpus BLEU and chrF, computed by sacrebleu."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


def translation_scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    bootstrap: int = 0,
    seed: int = 12345,
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
    if len(hypotheses) != len(references):
        raise ValueError(f"There are {len(hypotheses)} hypotheses but {len(references)} references.")
    if not hypotheses:
        raise ValueError("There is nothing to score: the list of hypotheses is empty.")
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"`tokenize` must be one of {', '.join(sorted(BLEU.TOKENIZERS))}, but is {tokenize!r}.")
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"`bootstrap` must be 0 (no interval) or at least 2 resamples, but is {bootstrap}.")
    # `force` only silences sacrebleu's warning about text that looks tokenised.
    metrics: dict[str, BLEU | CHRF] = {
        "bleu": BLEU(tokenize=tokenize, lowercase=lowercase, force=True),
        "chrf": CHRF(lowercase=lowercase),
    }
    scores: dict[str, Any] = {"sentences": len(hypotheses)}
    for name, metric in metrics.items():
        score = metric.corpus_score(list(hypotheses), [list(references)])
        scores[name] = float(score.score)
        if bootstrap:
            scores[f"{name}_ci"] = _half_interval(metric, hypotheses, references, bootstrap, seed)
        if name == "bleu":
            scores["brevity_penalty"] = float(score.bp)
            scores["length_ratio"] = float(score.ratio)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def _half_interval(
    metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str], resamples: int, seed: int
) -> float:
    """Half the width of the central 95% of the scores of resampled test sets.

    As `corpus_score(n_bootstrap=...)` of sacrebleu 2.6, which takes its seed from the environment alone and fails with
    a TypeError where one resample scores 0.
    """
    statistics = np.asarray(metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=np.float64)
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(resamples):
        rows = generator.integers(len(statistics), size=len(statistics))
        scores.append(float(metric._compute_score_from_stats(statistics[rows].sum(axis=0)).score))
    low, high = np.percentile(scores, [2.5, 97.5])
    # The signature reads these two.
    metric.n_bootstrap, metric.seed = resamples, str(seed)
    return float(high - low) / 2
