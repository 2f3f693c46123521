"""The ecosystem's own tools, as a user's script has them: Seq2SeqTrainer, Accelerate; nothing of ours but the model.

PEFT is in test_lora.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import EvalPrediction

from tests.tiny import tiny_model
from tests.tolerances import assert_close
from tests.training.stock import Collator, examples, stock_trainer


def test_evaluation_reports_cross_entropy_and_hands_over_logits_only(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"ok": 1.0}

    model = tiny_model(output_router_logits=True, label_smoothing=0.2)
    result = stock_trainer(tmp_path, model, compute_metrics=metrics, per_device_eval_batch_size=16).evaluate()
    (predictions,) = seen
    assert isinstance(predictions, np.ndarray), "router logits and losses are no predictions"
    assert predictions.shape[0] == 16
    assert predictions.shape[2] == model.config.vocab_size
    whole = Collator()(examples())
    assert result["eval_loss"] == pytest.approx(model.eval()(**whole).loss.item(), rel=1e-5)


def test_predict_with_generate(tmp_path: Path) -> None:
    model = tiny_model()
    output = stock_trainer(tmp_path, model, predict_with_generate=True).predict(examples(), max_length=6)
    batch = Collator()(examples()[:4])
    expected = model.generate(batch["input_ids"], max_length=6)
    assert output.predictions[:4, : expected.shape[1]].tolist() == expected.tolist()


def test_a_plain_accelerate_loop_gets_the_mean() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny_model(initializer_range=None).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batch = Collator()(examples())
    first = prepared(**batch).loss
    accelerator.backward(first)
    optimizer.step()
    assert prepared(**batch).loss < first
    alone = tiny_model(initializer_range=None).train()(**batch).loss
    assert_close(first, alone, torch.float32)
