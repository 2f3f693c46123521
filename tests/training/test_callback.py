"""SparseqCallback: what it logs against slow recomputation on the same batches, in every kind of trainer and wrapper;
what it warns of and refuses."""

import copy
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState

from sparseq import SparseqForConditionalGeneration
from sparseq.data.collation import TokenizedPairs
from sparseq.inspection.experts import expert_load
from sparseq.training.callback import SparseqCallback, find_sparse_model
from sparseq.training.lora import lora_config
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments
from tests.modeling.test_losses import slow_cross_entropy, slow_router_losses
from tests.tiny import tiny_model
from tests.tolerances import assert_close
from tests.training.stock import Collator, examples, stock_trainer

SMOOTHING = 0.1
AVERAGES = {"router/max_vio", "router/dead_experts", "router/entropy", "router/top1_probability"}
LOSSES = {"cross_entropy", "encoder_aux_loss", "decoder_aux_loss", "encoder_z_loss", "decoder_z_loss"}


def model_to_train(**overrides: Any) -> SparseqForConditionalGeneration:
    return tiny_model(**{"label_smoothing": SMOOTHING, "router_z_loss_coef": 0.1, **overrides}).train()


def sparseq_trainer(folder: Path, model: PreTrainedModel, collator: Any, **options: Any) -> SparseqTrainer:
    defaults = {
        "tokens_per_batch": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }
    callbacks = options.pop("callbacks", None)
    data = TokenizedPairs([row["input_ids"] for row in examples()], [row["labels"] for row in examples()])
    arguments = SparseqTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return SparseqTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator, callbacks=callbacks
    )


def make_trainer(kind: str, folder: Path, model: Any, collator: Collator, **options: Any) -> Seq2SeqTrainer:
    """A trainer of small batches that has the callback in one of the ways to have it."""
    if kind == "SparseqTrainer":
        return sparseq_trainer(folder, model, collator, **options)
    options = {"per_device_train_batch_size": 2, **options}
    if kind == "given":
        return stock_trainer(folder, model, collator=collator, callbacks=[SparseqCallback()], **options)
    trainer = stock_trainer(folder, model, collator=collator, **options)
    SparseqCallback().install(trainer)
    return trainer


def slow_losses(
    model: SparseqForConditionalGeneration,
    pairs: list[dict[str, list[int]]],
    smoothing: float,
    stacks: Sequence[str] = ("encoder", "decoder"),
) -> dict[str, float]:
    """Means over label tokens of all pairs, sentence by sentence and token by token."""
    batch = Collator()(pairs)
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(**batch, output_router_logits=True, output_router_indices=True)
    label_tokens = batch["labels"].ne(-100).sum(dim=1)
    weights = label_tokens / label_tokens.sum()
    masks = {"encoder": batch["input_ids"].ne(0), "decoder": batch["labels"].ne(-100)}
    expected = {"cross_entropy": float(slow_cross_entropy(output.logits, batch["labels"], smoothing))}
    for stack in stacks:
        mask = masks[stack]
        logits, indices = getattr(output, f"{stack}_router_logits"), getattr(output, f"{stack}_router_indices")
        balance, z_loss = slow_router_losses(logits, indices, mask, weights)
        expected |= {f"{stack}_aux_loss": float(balance), f"{stack}_z_loss": float(z_loss)}
    return expected


def slow_routing(
    model: SparseqForConditionalGeneration, pairs: list[dict[str, list[int]]], prefix: str = "router/"
) -> dict[str, float]:
    """The layers' metrics and their averages, from `expert_load`, which has a slow reference of its own."""
    loads = expert_load(copy.deepcopy(model), [Collator()([pair]) for pair in pairs])
    expected: dict[str, float] = {
        f"{prefix}max_vio": sum(load.max_violation for load in loads) / len(loads),
        f"{prefix}dead_experts": sum(len(load.dead_experts) for load in loads),
        f"{prefix}entropy": sum(load.router_entropy for load in loads) / len(loads),
        f"{prefix}top1_probability": sum(load.mean_top1_probability for load in loads) / len(loads),
    }
    for load in loads:
        name = f"{prefix}{load.stack}_{load.layer}"
        expected |= {f"{name}/load_{expert}": share for expert, share in enumerate(load.load)}
        expected[f"{name}/max_vio"] = load.max_violation
        expected[f"{name}/dead_experts"] = len(load.dead_experts)
        expected[f"{name}/entropy"] = load.router_entropy
        expected[f"{name}/top1_probability"] = load.mean_top1_probability
    return expected


def assert_holds(entry: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert_close(torch.tensor(entry[name]), torch.tensor(value), torch.float32, name)


def routing_keys(entry: dict[str, float]) -> set[str]:
    return {name for name in entry if name.startswith("router/")}


@pytest.mark.parametrize("overrides", [{}, {"router_scoring": "sigmoid", "router_balancing": "loss_free"}])
@pytest.mark.parametrize("kind", ["given", "installed", "SparseqTrainer"])
def test_logs_are_those_of_the_batches_since_the_last_log(
    kind: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    # Nothing is learned, so that all windows can be recomputed with one model.
    model, collator = model_to_train(**overrides, router_bias_update_rate=0.0), Collator()
    trainer = make_trainer(
        kind,
        tmp_path,
        model,
        collator,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for window, entry in enumerate(logs):
        # Two updates of two batches.
        pairs = list(chain.from_iterable(collator.batches[4 * window : 4 * window + 4]))
        expected = slow_routing(model, pairs)
        assert len(expected) == 4 + 4 * 8
        assert routing_keys(entry) == expected.keys()
        assert_holds(entry, expected)
        if not overrides:
            assert_holds(entry, slow_losses(model, pairs, SMOOTHING))
    assert logs[0]["router/encoder_0/load_0"] != logs[1]["router/encoder_0/load_0"], "windows must differ to be told"


@pytest.mark.parametrize("kind", ["given", "installed", "SparseqTrainer"])
def test_evaluation_and_prediction_report_each_loss_apart(kind: str, tmp_path: Path) -> None:
    model = model_to_train()
    trainer = make_trainer(kind, tmp_path, model, Collator())
    expected = {**slow_losses(model, examples(), 0.0), **slow_routing(model, examples())}
    expected = {name: value for name, value in expected.items() if name in AVERAGES | LOSSES}
    assert len(expected) == 9
    # Twice: an evaluation starts anew.
    for prefix in ("eval", "validation"):
        metrics = trainer.evaluate(metric_key_prefix=prefix)
        assert_holds(metrics, {f"{prefix}_{name}": value for name, value in expected.items()})
        assert_holds(trainer.state.log_history[-1], {f"{prefix}_{name}": v for name, v in expected.items()})
    assert_holds(trainer.predict(trainer.eval_dataset).metrics, {f"test_{name}": v for name, v in expected.items()})
    if kind == "SparseqTrainer":
        assert metrics["validation_loss"] == pytest.approx(expected["cross_entropy"], rel=1e-5)


def test_the_best_checkpoint_may_be_chosen_by_any_of_it(tmp_path: Path) -> None:
    trainer = stock_trainer(
        tmp_path,
        model_to_train(),
        callbacks=[SparseqCallback()],
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="router/max_vio",
        greater_is_better=False,
    )
    trainer.train()
    violations = [entry["eval_router/max_vio"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(violations) == 3
    assert trainer.state.best_metric == min(violations)


def test_generation_is_not_counted(tmp_path: Path) -> None:
    results = []
    for generates in (False, True):
        trainer = make_trainer("given", tmp_path, model_to_train(), Collator(), predict_with_generate=generates)
        metrics = trainer.evaluate()
        results.append(
            {name: value for name, value in metrics.items() if name.removeprefix("eval_") in LOSSES | AVERAGES}
        )
    assert len(results[0]) == 9
    assert results[0] == results[1]


class _Measures(TrainerCallback):
    """A user's own callback, which runs the model beside the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"].eval()
        with torch.no_grad():
            model(**Collator()(examples()[:2]))
        model.train()


def test_training_evaluation_and_a_user_s_own_forwards_do_not_mix(tmp_path: Path) -> None:
    runs = []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = stock_trainer(
            tmp_path,
            model_to_train(),
            callbacks=[SparseqCallback(), *([_Measures()] if extra else [])],
            max_steps=4,
            logging_steps=2,
            per_device_train_batch_size=4,
            **extra,
        )
        trainer.train()
        runs.append(trainer)
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in runs]
    for ours, theirs in zip(*logs, strict=True):
        assert_holds(ours, theirs)
    evaluations = [entry for entry in runs[1].state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert_holds(evaluations[-1], {f"eval_{k}": v for k, v in slow_losses(runs[1].model, examples(), 0.0).items()})


def test_prediction_without_labels_leaves_nothing_to_the_next_evaluation(tmp_path: Path) -> None:
    model, unlabelled = model_to_train(), [{"input_ids": row["input_ids"]} for row in examples()]
    trainer = make_trainer("given", tmp_path, model, Collator(), predict_with_generate=True)
    # A forward of a user's own, just before.
    model.eval()(**Collator()(examples()[:2]))
    trainer.data_collator = lambda rows: {
        "input_ids": Collator()([{**row, "labels": [2]} for row in rows])["input_ids"]
    }
    assert not [name for name in trainer.predict(unlabelled).metrics if "router" in name]
    trainer.data_collator = Collator()
    assert_holds(trainer.evaluate(), {f"eval_{k}": v for k, v in slow_losses(model, examples(), 0.0).items()})


def adapted(model: SparseqForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, "attention", rank=4))


class _Wrapped(torch.nn.Module):
    """A module of a user's own around the model."""

    def __init__(self, model: SparseqForConditionalGeneration) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch)


WRAPPERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "peft": (adapted, {}),
    "compiled": (lambda model: torch.compile(model, backend="eager"), {}),
    "compiled by Trainer": (lambda model: model, {"torch_compile": True, "torch_compile_backend": "eager"}),
    "a user's": (_Wrapped, {}),
    "checkpointed": (lambda model: model, {"activation_checkpointing": True}),
    "autocast": (lambda model: model, {"bf16": True}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
def test_wrapped_models_are_measured_alike(wrapper: str, tmp_path: Path) -> None:
    wrap, arguments = WRAPPERS[wrapper]
    logs = []
    for wraps in (False, True):
        torch._dynamo.reset()
        model = model_to_train(tie_word_embeddings=False, encoder_layers=1, decoder_layers=1)
        trainer = stock_trainer(
            tmp_path,
            wrap(model) if wraps else model,
            callbacks=[SparseqCallback()],
            learning_rate=0.0,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,
            label_names=["labels"],
            **(arguments if wraps else {}),
        )
        trainer.train()
        assert find_sparse_model(trainer.model) is model
        logs.append(trainer.state.log_history[0])
    plain, wrapped = logs
    expected = {name: plain[name] for name in routing_keys(plain) | LOSSES}
    assert len(expected) == 5 + 4 + 2 * 8
    if wrapper == "autocast":
        # The model itself computes something slightly different.
        assert all(wrapped[name] == pytest.approx(plain[name], abs=0.2) for name in expected)
    else:
        assert_holds(wrapped, expected)


class _FromEncoderOutputs(_Wrapped):
    """Gives the model the encoder's output, so that nothing is known of how the encoder routed."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
        states = self.inner.get_encoder()(input_ids)
        return self.inner(
            input_ids=input_ids, encoder_outputs=states, labels=labels, num_items_in_batch=num_items_in_batch
        )


@pytest.mark.parametrize(("wrap", "overrides"), [(_FromEncoderOutputs, {}), (_Wrapped, {"encoder_sparse_step": 0})])
def test_a_stack_without_routing_is_left_out(wrap: Any, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = model_to_train(**overrides)
    trainer = stock_trainer(
        tmp_path, wrap(model), callbacks=[SparseqCallback()], remove_unused_columns=False, learning_rate=0.0
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert not [name for name in entry if "encoder" in name]
    assert_holds(entry, slow_losses(model, examples(), SMOOTHING, ("decoder",)))
    layers = [load for load in expert_load(model, [Collator()(examples())]) if load.stack == "decoder"]
    assert_holds(entry, {"router/max_vio": sum(load.max_violation for load in layers) / 2})


class _WithDecoderInputs(Collator):
    """What a collator that knows the model returns; Trainer's smoother takes the labels away from the model."""

    def __call__(self, batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        columns = super().__call__(batch)
        model = tiny_model(num_experts=0)
        return {**columns, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(columns["labels"])}


def test_a_dense_model_is_left_alone(tmp_path: Path) -> None:
    model, options = model_to_train(num_experts=0), {"collator": _WithDecoderInputs(), "label_smoothing_factor": 0.1}
    trainer = stock_trainer(tmp_path, model, callbacks=[SparseqCallback()], **options)
    trainer.train()
    assert not LOSSES & trainer.state.log_history[0].keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    plain = stock_trainer(tmp_path, model, **options)
    plain.train()
    assert trainer.evaluate().keys() == plain.evaluate().keys()
    with pytest.raises(ValueError, match="`label_smoothing_factor`"):
        # Its batches lack the logits that the smoother needs.
        sparseq_trainer(tmp_path, model, Collator(), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 4 + 4 * 8),
        ({"log_load_per_expert": False}, 4 + 4 * 6),
        ({"log_layers": False}, 4),
    ],
)
def test_less_can_be_logged(options: dict[str, bool], kept: int, tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, model_to_train(), callbacks=[SparseqCallback(**options)])
    trainer.train()
    assert len(routing_keys(trainer.state.log_history[0])) == kept


def test_of_many_experts_only_the_extremes_are_logged(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, model_to_train(num_experts=65), callbacks=[SparseqCallback()])
    trainer.train()
    entry = trainer.state.log_history[0]
    assert len(routing_keys(entry)) == 4 + 4 * 6
    assert entry["router/decoder_1/min_load"] == 0
    assert entry["router/decoder_1/max_load"] == pytest.approx((1 + entry["router/decoder_1/max_vio"]) / 65)


class _Reporter(TrainerCallback):
    """What stands in Trainer's list where TensorBoard does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_installed_ahead_it_reaches_reporters_and_spares_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, reporter = stock_trainer(tmp_path, model_to_train()), _Reporter()
    trainer.callback_handler.callbacks.insert(1, reporter)
    callback = SparseqCallback()
    callback.install(trainer)
    callback.install(trainer)
    names = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    assert names == ["SparseqCallback", "DefaultFlowCallback", "_Reporter", "_WithoutDetails", "PrinterCallback"]
    trainer.train()
    trainer.evaluate()
    log, _, evaluation = reporter.seen
    assert routing_keys(log) == routing_keys(trainer.state.log_history[0])
    assert "router/encoder_0/load_0" in log
    assert "eval_router/max_vio" in evaluation
    printed = capsys.readouterr().out
    assert "router/max_vio" in printed
    assert "router/encoder_0" not in printed


def test_reporters_that_come_first_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = stock_trainer(tmp_path, model_to_train(), callbacks=[SparseqCallback()])
    trainer.args.report_to = ["tensorboard"]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "tensorboard will not show what the routers do" in caplog.text
    assert "SparseqCallback().install(trainer)" in caplog.text


def test_sparseq_trainer_keeps_the_callback_it_is_given(tmp_path: Path) -> None:
    callback = SparseqCallback(log_layers=False)
    trainer = sparseq_trainer(tmp_path, model_to_train(), Collator(), callbacks=[callback])
    assert trainer.callback_handler.callbacks[0] is callback
    assert sum(isinstance(c, SparseqCallback) for c in trainer.callback_handler.callbacks) == 1


def test_detached_and_copied_models_return_what_is_asked_for(tmp_path: Path) -> None:
    model, callback = model_to_train(), SparseqCallback()
    trainer = stock_trainer(tmp_path, model, callbacks=[callback])
    trainer.train()
    batch = Collator()(examples())
    for asked in ({}, {"output_router_logits": True}, {"output_router_indices": True}):
        plain = tiny_model()
        plain.load_state_dict(model.state_dict())
        for mode in (True, False):
            expected = plain.train(mode)(**batch, **asked)
            for hooked in (model, copy.deepcopy(model)):
                assert set(hooked.train(mode)(**batch, **asked)) == set(expected)
    callback.detach()
    assert not model._forward_hooks
    trainer.train()
    assert len(model._forward_hooks) == 1, "training attaches it once again"


class _NoWaiting(TorchDispatchMode):
    """Refuses the operations that make the host wait for the device."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waiting, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_reading_the_output_does_not_wait_for_the_device(mode: str, tmp_path: Path) -> None:
    model, refusal = model_to_train().train(mode == "train"), _NoWaiting()
    batch = Collator()(examples())
    # Hooks run in the order of their registration: the callback's comes between these two.
    model.register_forward_hook(lambda *args: refusal.__enter__() and None)
    trainer = stock_trainer(tmp_path, model, callbacks=[SparseqCallback()])
    model.register_forward_hook(lambda *args: refusal.__exit__(None, None, None))
    model(**batch, num_items_in_batch=batch["labels"].ne(-100).sum())
    assert trainer.model is model
    with pytest.raises(AssertionError, match="waits for the device"), refusal:
        float(batch["labels"].sum())


class _Shove(TrainerCallback):
    """Pushes expert 3 of the first encoder layer far away before the given updates, and lets it back at others."""

    def __init__(self, biases: dict[int, float]) -> None:
        self.biases = biases

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.biases:
            router = kwargs["model"].routers("encoder")[0]
            router.e_score_correction_bias[3] = self.biases[state.global_step]


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, shove: _Shove, **options: Any) -> list[str]:
    model = model_to_train(router_balancing="loss_free", router_bias_update_rate=0.0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparseq"):
        stock_trainer(folder, model, callbacks=[SparseqCallback(), shove], learning_rate=0.0, **options).train()
    return [record.getMessage() for record in caplog.records if record.name.startswith("sparseq")]


def test_a_dead_expert_is_warned_of_once_until_it_revives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 104 source tokens an update, two choices each; an expert is judged from 400 choices on.
    options = {"max_steps": 16, "logging_steps": 4}
    (dead,) = warnings_of(tmp_path, caplog, _Shove({0: -10.0}), **options)
    assert dead.startswith("Expert 3 of encoder layer 0 got none of the last 416 tokens")
    assert "`router_bias_update_rate` (0.0)" in dead
    # Dead in the first, third and fourth of four windows.
    assert len(warnings_of(tmp_path, caplog, _Shove({0: -10.0, 4: 10.0, 8: -10.0}), **options)) == 2


def test_no_expert_is_declared_dead_by_a_handful_of_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_of(tmp_path, caplog, _Shove({0: -10.0}), max_steps=4, logging_steps=1)


@pytest.mark.parametrize("later", [False, True])
def test_the_library_s_label_smoothing_is_refused(later: bool, tmp_path: Path) -> None:
    message = r"`label_smoothing_factor` \(0.1\) would .* drop its router losses. Set `label_smoothing` in the model's"
    if not later:
        with pytest.raises(ValueError, match=message):
            stock_trainer(tmp_path, model_to_train(), callbacks=[SparseqCallback()], label_smoothing_factor=0.1)
        return
    trainer = stock_trainer(tmp_path, model_to_train(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=message):
        SparseqCallback().install(trainer)
    trainer.add_callback(SparseqCallback())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_loss_free_balancing_is_refused_where_its_counts_would_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    arguments: Any = SimpleNamespace(label_smoothing_factor=0.0, n_gpu=2, report_to=[])
    state, control = TrainerState(), TrainerControl()
    with pytest.raises(ValueError, match=r"one process on 2 devices.*accelerate launch"):
        SparseqCallback().on_init_end(arguments, state, control, model=model_to_train(router_balancing="loss_free"))
    model = model_to_train()
    SparseqCallback().on_init_end(arguments, state, control, model=model)
    assert "measures no routing under nn.DataParallel" in caplog.text
    assert not model._forward_hooks
