"""What each process of a distributed test does; the tests run the same with one process and compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer

from sparseq.data.collation import PairCollator, TokenizedPairs
from sparseq.training.callback import SparseqCallback
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments
from tests.distributed import plans
from tests.tiny import tiny_model
from tests.training.stock import BiasRecorder, examples, first_update, selection_biases, stock_trainer

# What each process found, by the name of the scenario.
Results = Callable[[str], list[dict[str, Any]]]

# Each process takes 2 micro-batches of 4 sentences: two processes make the 16 of an update.
CUT = {"size": 4, "accumulation": 2}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "smoothed": {"label_smoothing": 0.1},
    "sigmoid": {"router_scoring": "sigmoid", "num_shared_experts": 1},
}
LOSS_FREE: dict[str, Any] = {"router_balancing": "loss_free", "router_scoring": "sigmoid"}


def update(folder: Path, **options: Any) -> dict[str, Any]:
    """Loss, gradients and label tokens of one update."""
    return vars(first_update(folder, **options))


def batch_scope(folder: Path, *, copies: int, **options: Any) -> dict[str, Any]:
    """One update on `copies` micro-batches that are all the same."""
    arguments = {"train_sampling_strategy": "sequential"}
    data = examples()[:4] * copies
    return update(folder, data=data, arguments=arguments, router_balancing_scope="batch", **options)


def loss_free(folder: Path, *, size: int, accumulation: int) -> dict[str, Any]:
    """Selection biases after each of five updates, and after going on from the second's checkpoint."""
    options = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 5,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    recorder = BiasRecorder()
    model = tiny_model(**LOSS_FREE).train()
    stock_trainer(folder, model, callbacks=[SparseqCallback(), recorder], **options).train()
    other = tiny_model(seed=7, **LOSS_FREE).train()
    resumed = stock_trainer(folder / "resumed", other, callbacks=[SparseqCallback()], **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"biases": recorder.biases, "resumed": selection_biases(resumed.model)}


def seen(trainer: Seq2SeqTrainer) -> dict[str, Any]:
    """What a trainer with `SparseqCallback` logs in four updates, and its evaluation and prediction."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    return {"logs": logs, "evaluation": metrics, "prediction": trainer.predict(trainer.eval_dataset).metrics}


def stock_logs(folder: Path, *, size: int, accumulation: int) -> dict[str, Any]:
    """The callback in a stock trainer, whose evaluation also generates."""
    trainer = stock_trainer(
        folder,
        tiny_model(label_smoothing=0.1).train(),
        callbacks=[SparseqCallback()],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.01,
        predict_with_generate=True,
    )
    return seen(trainer)


def sparseq_logs(folder: Path) -> dict[str, Any]:
    """The callback in `SparseqTrainer`. Its batches depend on the number of processes, so it does not learn."""
    data = TokenizedPairs([row["input_ids"] for row in examples()], [row["labels"] for row in examples()])
    trainer = SparseqTrainer(
        model=tiny_model(label_smoothing=0.1).train(),
        args=SparseqTrainingArguments(
            output_dir=str(folder),
            tokens_per_batch=16,
            num_train_epochs=1,
            learning_rate=0.0,
            logging_steps=1000,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=PairCollator(pad_token_id=0),
    )
    return seen(trainer)


# By name, what each of two processes does in a folder that both share.
SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{
        f"update {name}": lambda folder, fields=fields: update(folder, **CUT, **fields)
        for name, fields in MODELS.items()
    },
    "update padded and checkpointed": lambda folder: update(
        folder, **CUT, extra_padding=3, label_smoothing=0.1, arguments={"activation_checkpointing": True}
    ),
    "batch scope": lambda folder: batch_scope(folder, copies=4, **CUT),
    "loss_free": lambda folder: loss_free(folder, **CUT),
    "stock logs": lambda folder: stock_logs(folder, **CUT),
    "sparseq logs": sparseq_logs,
    **plans.SCENARIOS,
}


def run_all(folder: Path, rank: int) -> None:
    """Run every scenario; `{name}.{rank}.pt` in `folder` holds what this process found."""
    torch.set_num_threads(1)
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(folder / name), folder / f"{name}.{rank}.pt")
