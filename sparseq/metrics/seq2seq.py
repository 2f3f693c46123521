"""Metrics of generated text for `Seq2SeqTrainer`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from sparseq.metrics.corpus import METRICS, CorpusMetric, check_metric
from sparseq.metrics.scoring import score_predictions


class Seq2SeqMetrics:
    """`compute_metrics` of a `Seq2SeqTrainer` that runs with `predict_with_generate=True`.

    ```python
    trainer = Seq2SeqTrainer(..., compute_metrics=Seq2SeqMetrics(tokenizer, ["bleu", "chrf"]))
    ```

    Args:
        tokenizer: Decodes the generated ids and the labels; special tokens are left out.
        metrics: Names ("bleu", "chrf", "exact_match", "rouge"), or metrics with options, such as
            `sparseq.metrics.corpus.Bleu(tokenize="none")`.
        postprocess: Applied to every decoded text, for instance to put the sentences of a summary on lines of their
            own for rougeLsum.

    Attributes:
        signatures: What the figures depend on, by metric, once the object has been called; empty before.

    Raises:
        ValueError: A name is unknown, or there is no metric.
        ModuleNotFoundError: rouge-score is asked for and not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Sequence[str | CorpusMetric] = ("bleu", "chrf"),
        *,
        postprocess: Callable[[str], str] | None = None,
    ) -> None:
        if isinstance(metrics, str) or not metrics:
            raise ValueError(f"`metrics` must be a list of at least one metric, but is {metrics!r}.")
        for metric in metrics:
            if isinstance(metric, str):
                check_metric(metric)
        self.signatures: dict[str, str] = {}
        self._metrics = [METRICS[metric]() if isinstance(metric, str) else metric for metric in metrics]
        self._tokenizer = tokenizer
        self._postprocess = postprocess

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score generated ids, (B, T), against labels, (B, T'), both padded with -100 or the pad token.

        Returns:
            Each metric's figures, from 0 to 100, and `generated_tokens`: the mean length of what was generated without
            special tokens.

        Raises:
            ValueError: The predictions are logits.
        """
        generated = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        generated, labels = np.asarray(generated), np.asarray(prediction.label_ids)
        if generated.ndim != 2 or not np.issubdtype(generated.dtype, np.integer):
            raise ValueError(
                f"The predictions are {generated.dtype} of shape {generated.shape}, not generated token ids of shape "
                "(batch, length): set `predict_with_generate=True` in Seq2SeqTrainingArguments."
            )
        scored = score_predictions(self._decode(generated), self._decode(labels), self._metrics)
        self.signatures = dict(scored.signatures)
        special = [-100, *self._tokenizer.all_special_ids]
        return {**scored.scores, "generated_tokens": float((~np.isin(generated, special)).sum(axis=1).mean())}

    def _decode(self, ids: np.ndarray[Any, Any]) -> list[str]:
        ids = np.where(ids < 0, self._tokenizer.pad_token_id, ids)
        texts = [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [self._postprocess(text) for text in texts] if self._postprocess else texts
