"""Under stock Seq2SeqTrainer an update is the same however its sentences are cut into micro-batches and padded: loss
and gradients of every parameter, with cross-entropy, router z-loss and sequence-scope balancing. Two processes are in
tests/distributed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modeling.test_losses import slow_cross_entropy
from tests.tiny import tiny_model
from tests.tolerances import assert_close
from tests.training.stock import STRONG_LOSSES, Collator, Update, examples, first_update, stock_trainer

CHECKPOINTING = {"activation_checkpointing": True}
CUTS: dict[str, dict[str, Any]] = {
    "accumulation": {"size": 4, "accumulation": 4},
    "padding": {"extra_padding": 3},
    "checkpointing": {"arguments": CHECKPOINTING},
    # Arguments that leave `use_reentrant` out get torch's default, which is the reentrant one.
    "checkpointing arguments": {
        "arguments": {**CHECKPOINTING, "activation_checkpointing_kwargs": {"determinism_check": "none"}}
    },
    "all": {"size": 4, "accumulation": 4, "extra_padding": 3, "arguments": CHECKPOINTING},
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "smoothed": {"label_smoothing": 0.1},
    "sigmoid": {"router_scoring": "sigmoid", "num_shared_experts": 1, "norm_position": "post"},
    "dense": {"num_experts": 0, "label_smoothing": 0.1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The update of all sixteen sentences at once, by the name of the model."""
    return cache(lambda name: first_update(tmp_path_factory.mktemp(name), **MODELS[name]))


def assert_same_update(actual: Update, expected: Update) -> None:
    assert_close(torch.tensor(actual.loss), torch.tensor(expected.loss), torch.float32, "loss")
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, torch.float32, name)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model", MODELS)
def test_an_update_does_not_depend_on_its_cut(model: str, cut: str, whole: Any, tmp_path: Path) -> None:
    update = first_update(tmp_path, **CUTS[cut], **MODELS[model])
    if "size" in CUTS[cut]:
        assert len(set(update.label_tokens)) > 1, "equal micro-batches would hide a mean of means"
    assert_same_update(update, whole(model))


@pytest.mark.parametrize("coefficient", STRONG_LOSSES)
@pytest.mark.parametrize("model", ["sparse", "smoothed", "sigmoid"])
def test_each_router_loss_weighs_enough_to_be_missed(model: str, coefficient: str, whole: Any, tmp_path: Path) -> None:
    without = first_update(tmp_path, **MODELS[model], **{coefficient: 0.0})
    assert abs(without.loss - whole(model).loss) > 0.01
    for name, gradient in whole(model).gradients.items():
        if name.endswith("router.weight"):
            assert (without.gradients[name] - gradient).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass `use_reentrant=False`, which is exact"):
        first_update(tmp_path, arguments=arguments)


def test_batch_scope_does_not_grow_with_accumulation(tmp_path: Path) -> None:
    batch = examples()[:4]
    in_order = {"train_sampling_strategy": "sequential"}
    once = first_update(tmp_path, size=4, data=batch, arguments=in_order, router_balancing_scope="batch")
    copies = first_update(
        tmp_path, size=4, accumulation=4, data=batch * 4, arguments=in_order, router_balancing_scope="batch"
    )
    assert_same_update(copies, once)
    sequence = first_update(tmp_path, size=4, data=batch, arguments=in_order)
    assert abs(sequence.loss - once.loss) > 0.01, "the scopes do not differ here: nothing was shown"


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_evaluation_is_plain_cross_entropy(scope: str, tmp_path: Path) -> None:
    model = tiny_model(label_smoothing=0.2, router_balancing_scope=scope, **STRONG_LOSSES)
    metrics = stock_trainer(tmp_path, model, per_device_eval_batch_size=16).evaluate()
    batch = Collator()(examples())
    expected = slow_cross_entropy(model(**batch).logits, batch["labels"])
    assert_close(torch.tensor(metrics["eval_loss"]), expected, torch.float32)
