"""`Seq2SeqTrainer` with token-budget batches, memory-saving losses, and progress in target tokens per second."""

import inspect
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparseq.data.batching import TokenBatchSampler
from sparseq.training.callback import SparseqCallback, refuse_label_smoothing


@dataclass
class SparseqTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with a token budget in place of `per_device_train_batch_size`."""

    tokens_per_batch: int = field(
        default=4096, metadata={"help": "Tokens of a training batch on each device, padding included."}
    )
    budget_counts: str = field(
        default="target", metadata={"help": 'What the budget counts: "target" or "source+target" tokens.'}
    )
    length_jitter: float = field(
        default=1.0, metadata={"help": "How far a pair may move among pairs of equal target length, in tokens."}
    )


class SparseqTrainer(Seq2SeqTrainer):
    """Trains a sequence-to-sequence model on batches filled to a budget of tokens.

    - Training batches come from `TokenBatchSampler`. The dataset's `source_lengths` and `target_lengths` give the
      lengths where it has them; otherwise its `input_ids` and `labels` are measured.
    - Where the model takes `skip_logits`, training computes logits at label positions only.
    - `evaluate` averages the loss over label tokens, on length-sorted batches, keeping two numbers between batches.
      With `predict_with_generate` or `compute_metrics` it is the library's.
    - Logs carry `target_tokens_per_second`; the progress bar shows it with the loss and the time left.
    - It has a `SparseqCallback`, or keeps the one it is given: router metrics in the logs, loss-free balancing.

    Raises:
        ValueError: `label_smoothing_factor` is set, which would bypass the model's own loss.
    """

    args: SparseqTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Also without experts: Trainer's smoother needs the logits that training here does not compute.
        refuse_label_smoothing(self.args)
        self._target_tokens: torch.Tensor | int = 0
        self._logged_at = time.perf_counter()
        accepted = inspect.signature(self.accelerator.unwrap_model(self.model).forward).parameters
        self._can_skip_logits = "skip_logits" in accepted and self.compute_loss_func is None
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgress())
        given = [c for c in self.callback_handler.callbacks if isinstance(c, SparseqCallback)]
        (given[0] if given else SparseqCallback()).install(self)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> TokenBatchSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return self._token_batches(dataset, shuffle=True)

    def _token_batches(self, dataset: Any, *, shuffle: bool) -> TokenBatchSampler:
        sources, targets = _lengths(dataset)
        budget = self.args.tokens_per_batch
        if not shuffle:
            # Evaluation leaves no sentence out, so a single long one may exceed the budget.
            budget = max(budget, max(s + t for s, t in zip(sources, targets, strict=True)))
        return TokenBatchSampler(
            sources,
            targets,
            budget=budget,
            counts=self.args.budget_counts,  # type: ignore[arg-type]  # the sampler checks it
            jitter=self.args.length_jitter,
            shuffle=shuffle,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss; without logits where nobody asks for the outputs."""
        if self._can_skip_logits and not return_outputs and "labels" in inputs:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The batches of one update and their label tokens, which are counted for the log."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is not None:
            self._target_tokens = self._target_tokens + num_items
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with target tokens per second since the last log of the training loss."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["target_tokens_per_second"] = round(float(self._target_tokens) / (now - self._logged_at), 1)
            self._target_tokens, self._logged_at = 0, now
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Cross-entropy per label token and perplexity, or the library's evaluation where it generates or has metrics.

        Returns:
            `{prefix}_loss`, `{prefix}_perplexity`, `{prefix}_runtime` in seconds, and what `SparseqCallback` adds.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.predict_with_generate or self.compute_metrics is not None or isinstance(dataset, (dict, str)):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        if dataset is None:
            raise ValueError("There is no evaluation dataset: pass `eval_dataset` here or to the trainer.")
        start = time.perf_counter()
        loss, tokens = self._total_loss(dataset)
        mean = loss / tokens
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700.0)),
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - start, 2),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # What evaluation took is not training time.
        self._logged_at += time.perf_counter() - start
        return metrics

    def _total_loss(self, dataset: Any) -> tuple[float, int]:
        """Sum of the cross-entropy over the label tokens of all processes, and their number."""
        dataloader = self._get_dataloader(
            dataset=dataset,
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=lambda data: self._token_batches(data, shuffle=False),
        )
        model = self._wrap_model(self.accelerator.unwrap_model(self.model_wrapped), training=False)
        was_training = model.training
        model.eval()
        # float64: tens of millions of tokens would lose digits. Not every device has it, so the sums stay on the CPU.
        totals = torch.zeros(2, dtype=torch.float64)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            tokens = int(inputs["labels"].ne(-100).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=None)
            totals += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None].float().to(self.args.device)).double().sum(dim=0)
        return float(totals[0]), int(totals[1])


_SHOWN = (
    ("loss", "loss", ".3f"),
    ("eval_loss", "val", ".3f"),
    ("router/max_vio", "MaxVio", ".2f"),
    ("target_tokens_per_second", "tgt tok/s", ",.0f"),
)


class TrainingProgress(TrainerCallback):
    """One progress bar: updates, loss, target tokens per second and time left."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, on the first process only."""
        if state.is_world_process_zero:
            # A log file gets a line now and then instead of one every tenth of a second.
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=interval
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance to the current update."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest loss, speed and validation loss beside the bar."""
        if self.bar is None or logs is None:
            return
        for key, label, form in _SHOWN:
            if key in logs:
                self.shown[label] = format(logs[key], form)
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _lengths(dataset: Any) -> tuple[list[int], list[int]]:
    """Lengths in tokens of sources and targets."""
    if hasattr(dataset, "source_lengths"):
        return dataset.source_lengths, dataset.target_lengths
    pairs = [(len(item["input_ids"]), len(item["labels"])) for item in dataset]
    return [source for source, _ in pairs], [target for _, target in pairs]
