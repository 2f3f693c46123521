"""Corpus BLEU and chrF, computed by sacrebleu."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    metrics = {"bleu": BLEU(tokenize=tokenize, lowercase=lowercase, force=True), "chrf": CHRF(lowercase=lowercase)}
    scores: dict[str, Any] = {"sentences": len(hypotheses)}
    for name, metric in metrics.items():
        with _sacrebleu_seed(seed):
            score = metric.corpus_score(list(hypotheses), [list(references)], n_bootstrap=bootstrap or 1)
        scores[name] = float(score.score)
        if bootstrap:
            # sacrebleu's `_ci` is half the width of the interval around the mean of the resamples.
            scores[f"{name}_ci"] = float(score._ci)
        if name == "bleu":
            scores["brevity_penalty"] = float(score.bp)
            scores["length_ratio"] = float(score.ratio)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """Set the seed of sacrebleu's resampling, which it reads from the environment only."""
    previous = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = previous
