"""Loss-free balancing under stock Seq2SeqTrainer with the callback: exact counts, exact resume, float32, rest in
evaluation. Two processes are in tests/distributed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sparseq import SparseqForConditionalGeneration
from sparseq.training.callback import SparseqCallback
from tests.tiny import tiny_model
from tests.training.stock import BiasRecorder, selection_biases, stock_trainer

UPDATES = 5


def loss_free_model(**overrides: Any) -> SparseqForConditionalGeneration:
    return tiny_model(router_balancing="loss_free", router_scoring="sigmoid", **overrides).train()


def biases_after_each_update(
    folder: Path, *, size: int = 16, accumulation: int = 1, model: PreTrainedModel | None = None, **arguments: Any
) -> list[dict[str, torch.Tensor]]:
    recorder = BiasRecorder()
    trainer = stock_trainer(
        folder,
        loss_free_model() if model is None else model,
        callbacks=[SparseqCallback(), recorder],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=UPDATES,
        **{"learning_rate": 0.01, **arguments},
    )
    trainer.train()
    return recorder.biases


def assert_equal_biases(actual: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    """Exactly equal, since they come from integer counts."""
    assert len(actual) == len(expected) == UPDATES
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert len(ours) == 4
        for name, bias in theirs.items():
            assert torch.equal(ours[name], bias), f"{name} after update {step + 1}"


def test_counts_are_summed_over_accumulation(tmp_path: Path) -> None:
    whole = biases_after_each_update(tmp_path / "whole")
    model = loss_free_model()
    assert_equal_biases(biases_after_each_update(tmp_path / "cut", size=4, accumulation=4, model=model), whole)
    assert all(router.expert_counts is None for stack in ("encoder", "decoder") for router in model.routers(stack))
    assert any(bias.abs().max() > 0.001 for bias in whole[-1].values()), "no expert was ahead twice: little was shown"
    # Updates of four sentences each are not the same: the counts did decide.
    four = biases_after_each_update(tmp_path / "four", size=4)
    assert any(not torch.equal(four[-1][name], bias) for name, bias in whole[-1].items())


def test_evaluation_neither_moves_nor_counts(tmp_path: Path) -> None:
    alone = biases_after_each_update(tmp_path / "alone")
    evaluated = biases_after_each_update(tmp_path / "evaluated", eval_strategy="steps", eval_steps=1)
    assert_equal_biases(evaluated, alone)


@pytest.mark.parametrize("autocast", [False, True])
def test_biases_stay_float32_in_a_bfloat16_model(autocast: bool, tmp_path: Path) -> None:
    loss_free_model().save_pretrained(tmp_path / "model")
    dtype = torch.float32 if autocast else torch.bfloat16
    model = SparseqForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=dtype)
    biases = biases_after_each_update(tmp_path, model=model, bf16=autocast)
    for name, bias in biases[-1].items():
        assert bias.dtype == torch.float32, name
        steps = sum(torch.sign(b[name] - a[name]) for a, b in zip([{name: 0 * bias}, *biases], biases, strict=False))
        torch.testing.assert_close(bias, steps * 0.001, atol=1e-7, rtol=0)


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "max_steps": 5}
    recorder = BiasRecorder()
    whole = stock_trainer(tmp_path / "run", loss_free_model(), callbacks=[SparseqCallback(), recorder], **options)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    for name, bias in recorder.biases[1].items():
        assert bias.any(), name
        assert torch.equal(saved[name], bias), name
    # Other weights and biases to begin with: what goes on comes from the checkpoint.
    other = tiny_model(seed=7, router_balancing="loss_free", router_scoring="sigmoid").train()
    resumed = stock_trainer(tmp_path / "resumed", other, callbacks=[SparseqCallback()], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 5
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert [entry["loss"] for entry in resumed.state.log_history[2:5]] == [
        entry["loss"] for entry in whole.state.log_history[2:5]
    ]


def test_without_the_callback_no_bias_moves(tmp_path: Path) -> None:
    model = loss_free_model()
    stock_trainer(tmp_path, model, max_steps=2).train()
    assert not any(bias.any() for bias in selection_biases(model).values())
