"""The ecosystem's own tools, as a user's script has them: Seq2SeqTrainer, Accelerate, PEFT; nothing of ours but the
model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from sparseq import SparseqForConditionalGeneration
from sparseq.training.trainer import RouterBiasCallback
from tests.tiny import PAD, label_batch, source_batch, tiny_model
from tests.tolerances import assert_close


def examples(count: int = 16) -> list[dict[str, list[int]]]:
    lengths = tuple(3 + row % 6 for row in range(count))
    sources, labels = source_batch(lengths), label_batch(lengths[::-1])
    return [
        {"input_ids": source[source != PAD].tolist(), "labels": target[target != -100].tolist()}
        for source, target in zip(sources, labels, strict=True)
    ]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def pad(key: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(row[key]) for row in batch]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids", PAD), "labels": pad("labels", -100)}


def trainer(folder: Path, model: SparseqForConditionalGeneration, **options: Any) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "generation_max_length": 6,
            **options.pop("arguments", {}),
        },
    )
    data = examples()
    return Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate, **options)


@pytest.mark.parametrize("overrides", [{"num_experts": 0}, {"label_smoothing": 0.1}, {"router_scoring": "sigmoid"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_changes_no_weight(overrides: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((16, 1), (4, 4)):
        model = tiny_model(**overrides).train()
        arguments = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "activation_checkpointing": checkpointing and size == 4,
        }
        trainer(tmp_path, model, arguments=arguments).train()
        weights.append(dict(model.named_parameters()))
    start = dict(tiny_model(**overrides).named_parameters())
    assert any(not torch.equal(weights[0][name], start[name]) for name in start), "nothing was learned"
    for name, expected in weights[0].items():
        assert_close(weights[1][name], expected, torch.float32, name)


def test_evaluation_reports_cross_entropy_and_hands_over_logits_only(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"ok": 1.0}

    model = tiny_model(output_router_logits=True, label_smoothing=0.2)
    result = trainer(tmp_path, model, compute_metrics=metrics).evaluate()
    (predictions,) = seen
    assert isinstance(predictions, np.ndarray), "router logits and losses are no predictions"
    assert predictions.shape[0] == 16
    assert predictions.shape[2] == model.config.vocab_size
    whole = collate(examples())
    assert result["eval_loss"] == pytest.approx(model.eval()(**whole).loss.item(), rel=0.05)


def test_predict_with_generate(tmp_path: Path) -> None:
    model = tiny_model()
    output = trainer(tmp_path, model, arguments={"predict_with_generate": True}).predict(examples(), max_length=6)
    batch = collate(examples()[:4])
    expected = model.generate(batch["input_ids"], max_length=6)
    assert output.predictions[:4, : expected.shape[1]].tolist() == expected.tolist()


def test_the_callback_moves_the_bias_once_an_update(tmp_path: Path) -> None:
    model = tiny_model(router_balancing="loss_free").train()
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer(tmp_path, model, arguments=arguments, callbacks=[RouterBiasCallback()]).train()
    for router in [*model.routers("encoder"), *model.routers("decoder")]:
        steps = router.e_score_correction_bias / model.config.router_bias_update_rate
        assert steps.any()
        assert_close(steps, steps.round(), torch.float32)
        assert steps.abs().max() <= 3
        assert router.expert_counts is None


def test_a_plain_accelerate_loop_gets_the_mean() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny_model(initializer_range=None).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batch = collate(examples())
    first = prepared(**batch).loss
    accelerator.backward(first)
    optimizer.step()
    assert prepared(**batch).loss < first
    alone = tiny_model(initializer_range=None).train()(**batch).loss
    assert_close(first, alone, torch.float32)


@pytest.mark.parametrize("experts", ["sparseq", "eager", "grouped_mm", "batched_mm"])
def test_lora_reaches_attention_and_stacked_experts(experts: str, tmp_path: Path) -> None:
    def base() -> SparseqForConditionalGeneration:
        model = tiny_model(tie_word_embeddings=False)
        model.set_experts_implementation(experts)
        return model

    adapters = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(base(), adapters).train()
    batch = collate(examples())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert any("experts" in name for name in trained)
    assert any("q_proj" in name for name in trained)
    model.eval()
    expected = model(**batch).logits
    assert not torch.allclose(expected, base()(**batch).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert_close(loaded(**batch).logits, expected, torch.float32)
    merged = model.merge_and_unload()
    assert_close(merged(**batch).logits, expected, torch.float32)
