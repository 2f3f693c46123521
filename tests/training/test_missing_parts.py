"""What is left out by mistake is said: biases that nobody moves, labels that the model never sees, frozen routers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparseq import SparseqForConditionalGeneration
from sparseq.training.callback import SparseqCallback
from tests.tiny import label_batch, source_batch, tiny_model
from tests.training.stock import examples, stock_trainer

OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"]
LORA = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["experts"]}


def loss_free_model() -> SparseqForConditionalGeneration:
    return tiny_model(router_balancing="loss_free", router_scoring="sigmoid").train()


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Any:
    """What was warned of, as one text; each warning may come once more."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # added by transformers
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trainer_without_the_callback_is_told(optimizer: str, kind: str, messages: Any, tmp_path: Path) -> None:
    model: Any = loss_free_model()
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(**LORA))
    stock_trainer(tmp_path, model, max_steps=4, optim=optimizer, gradient_accumulation_steps=2).train()
    assert messages().count("selection biases do not move") == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trainer_with_the_callback_is_not(optimizer: str, messages: Any, tmp_path: Path) -> None:
    arguments = {"max_steps": 4, "optim": optimizer, "gradient_accumulation_steps": 2}
    stock_trainer(tmp_path, loss_free_model(), callbacks=[SparseqCallback()], **arguments).train()
    assert "biases" not in messages()


def test_moving_biases_without_a_counted_batch_is_told(messages: Any) -> None:
    model = loss_free_model()
    model(input_ids=source_batch(), decoder_input_ids=label_batch().clamp(min=0)).logits.sum().backward()
    model.update_router_bias()
    assert "nothing to balance by" in messages()
    assert "`labels`" in messages()


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def test_a_loss_function_that_takes_the_labels_away_is_told_or_refused(messages: Any, tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, loss_free_model(), callbacks=[SparseqCallback()], max_steps=2)
    trainer.compute_loss_func = own_loss
    # Trainer makes decoder inputs only together with labels.
    batch = {"input_ids": source_batch(), "decoder_input_ids": label_batch().clamp(min=0)}
    trainer.model(**batch)
    assert "without being given `labels`" in messages()
    assert "override `compute_loss`" in messages()
    with pytest.raises(ValueError, match="compute_loss_func"):
        SparseqCallback().install(trainer)
    dense = stock_trainer(tmp_path, tiny_model(num_experts=0))
    dense.compute_loss_func = own_loss
    SparseqCallback().install(dense)


def test_frozen_routers_keep_their_biases(tmp_path: Path) -> None:
    model = get_peft_model(loss_free_model(), LoraConfig(**LORA))
    stock_trainer(tmp_path, model, callbacks=[SparseqCallback()], max_steps=3).train()
    assert not any(router.e_score_correction_bias.any() for router in model.base_model.model.routers("encoder"))


def test_routers_trained_beside_an_adapter_count_balance_and_travel_with_it(tmp_path: Path) -> None:
    model = get_peft_model(loss_free_model(), LoraConfig(**LORA, modules_to_save=["router"]))
    inner = model.base_model.model
    assert len(inner.routers("encoder")) == 2
    reference = loss_free_model()
    batch = {"input_ids": source_batch(), "labels": label_batch()}
    model(**batch), reference(**batch)
    for stack in ("encoder", "decoder"):
        for router, expected in zip(inner.routers(stack), reference.routers(stack), strict=True):
            assert torch.equal(router.expert_counts, expected.expert_counts)
    stock_trainer(tmp_path, model, callbacks=[SparseqCallback()], max_steps=3).train()
    biases = [router.e_score_correction_bias for router in inner.routers("encoder")]
    assert all(bias.any() for bias in biases)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(loss_free_model(), tmp_path / "adapter")
    for router, bias in zip(loaded.base_model.model.routers("encoder"), biases, strict=True):
        assert torch.equal(router.e_score_correction_bias, bias)
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("given", [{}, {"use_reentrant": None}, {"use_reentrant": False}])
def test_checkpointing_is_never_reentrant(given: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(router_z_loss_coef=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(given))
        model(input_ids=source_batch(), labels=label_batch()).loss.backward()
        gradients.append(model.routers("encoder")[0].weight.grad)
    assert torch.equal(*gradients)


def test_ignored_keys_of_the_caller_leave_predictions_as_they_are(tmp_path: Path) -> None:
    shapes = []
    for callbacks in ([], [SparseqCallback()]):
        ignored = ["past_key_values", "encoder_last_hidden_state"]
        trainer = stock_trainer(tmp_path, tiny_model(), callbacks=callbacks)
        trainer.args.predict_with_generate = False
        shapes.append(trainer.predict(examples(), ignore_keys=ignored).predictions.shape)
    assert shapes[0] == shapes[1]
