"""Stock Seq2SeqTrainer on sixteen sentence pairs of unequal lengths, and what one of its updates comes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tests.tiny import PAD, label_batch, source_batch, tiny_model

_SOURCE_LENGTHS = (3, 11, 5, 2, 9, 7, 12, 4, 6, 10, 1, 8, 3, 12, 2, 9)
_TARGET_LENGTHS = (8, 2, 12, 5, 1, 10, 3, 9, 11, 4, 7, 6, 12, 1, 9, 3)

# Large enough that a wrong weight of the router losses shows in the loss and in every router's gradient.
STRONG_LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}


def examples() -> list[dict[str, list[int]]]:
    """Sixteen unpadded sentence pairs."""
    return [
        {"input_ids": source[source != PAD].tolist(), "labels": target[target != -100].tolist()}
        for source, target in zip(source_batch(_SOURCE_LENGTHS), label_batch(_TARGET_LENGTHS), strict=True)
    ]


class Collator:
    """Pads a batch to its longest sentences, and by `extra` more columns: the source on both sides, the target behind.

    Attributes:
        batches: The pairs of every batch so far.
    """

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra
        self.batches: list[list[dict[str, list[int]]]] = []

    def __call__(self, batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def pad(key: str, value: int, columns: tuple[int, int]) -> torch.Tensor:
            rows = [torch.tensor(row[key]) for row in batch]
            return F.pad(pad_sequence(rows, batch_first=True, padding_value=value), columns, value=value)

        self.batches.append(list(batch))
        return {
            "input_ids": pad("input_ids", PAD, (self.extra, self.extra)),
            "labels": pad("labels", -100, (0, self.extra)),
        }


def stock_trainer(
    folder: Path,
    model: PreTrainedModel,
    *,
    data: list[dict[str, list[int]]] | None = None,
    collator: Collator | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    compute_metrics: Any = None,
    trainer_class: type[Seq2SeqTrainer] = Seq2SeqTrainer,
    **arguments: Any,
) -> Seq2SeqTrainer:
    """A trainer of the library's that makes one update of plain SGD on all sixteen pairs, unless told otherwise."""
    defaults = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "generation_max_length": 6,
    }
    data = examples() if data is None else data
    return trainer_class(
        model,
        Seq2SeqTrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator or Collator(),
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use: summed over micro-batches, averaged over ranks."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy them, since they are zeroed after the step."""
        for name, parameter in kwargs["model"].named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            self.gradients[name] = parameter.grad.clone()


@dataclass(frozen=True)
class Update:
    """One update.

    Attributes:
        loss: The loss that Trainer logged.
        gradients: Of every parameter.
        label_tokens: Of each micro-batch of this process.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    label_tokens: list[int]


def first_update(
    folder: Path,
    *,
    size: int = 16,
    accumulation: int = 1,
    extra_padding: int = 0,
    data: list[dict[str, list[int]]] | None = None,
    arguments: dict[str, Any] | None = None,
    **overrides: Any,
) -> Update:
    """Make the first update of a tiny model.

    Args:
        size: Sentences of a micro-batch on each process.
        accumulation: Micro-batches of an update on each process.
        extra_padding: Columns of padding that nobody needs.
        data: The pairs; the sixteen by default.
        arguments: Further training arguments.
        overrides: Fields of the model's configuration besides `STRONG_LOSSES`.
    """
    model = tiny_model(**{**STRONG_LOSSES, **overrides}).train()
    recorder, collator = GradientRecorder(), Collator(extra_padding)
    trainer = stock_trainer(
        folder,
        model,
        data=data,
        collator=collator,
        callbacks=[recorder],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **(arguments or {}),
    )
    trainer.train()
    label_tokens = [sum(len(row["labels"]) for row in batch) for batch in collator.batches]
    return Update(trainer.state.log_history[0]["loss"], recorder.gradients, label_tokens)


class BiasRecorder(TrainerCallback):
    """Keeps every selection bias as it is after each update."""

    def __init__(self) -> None:
        self.biases: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        self.biases.append(selection_biases(kwargs["model"]))


def selection_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the selection biases of `router_balancing="loss_free"`, by name."""
    return {name: bias.clone() for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")}
