"""Losses that run away or are not finite stop a training, and no checkpoint of theirs is written."""

import math
import os
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sparseq.training.checkpoints import complete_checkpoints, read_note
from sparseq.training.guards import DivergenceError, LossWatch, StopRequest
from sparseq.training.trainer import SparseqTrainer
from tests.training.resume_runs import tiny_trainer

# No evaluation, a checkpoint at each step.
EACH_STEP = {"eval_strategy": "no", "save_steps": 1, "gradient_accumulation_steps": 1}


def judged(losses: list[float], factor: float) -> list[bool]:
    """At each loss whether the training diverges there, by the definition alone."""
    found = []
    for end in range(1, len(losses) + 1):
        medians = [statistics.median(losses[max(0, i - 5) : i]) for i in range(1, end + 1)]
        limit = max(factor * min(medians), min(medians) + 2)
        found.append(end >= 5 and medians[-1] > limit)
    return found


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_the_watch_does_what_it_says(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(50):
        walk = torch.randn(40, generator=generator).cumsum(0).add(4).abs().tolist()
        watch, found = LossWatch(factor), []
        for loss in walk:
            watch.add(loss)
            found.append(watch.is_diverging)
        assert found == judged(walk, factor)
        outcomes |= set(found)
        resumed = LossWatch(factor, walk[:17])
        for loss in walk[17:]:
            resumed.add(loss)
        assert (resumed.lowest, resumed.last, resumed.is_suspicious) == (watch.lowest, watch.last, watch.is_suspicious)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [
        pytest.param([9, 6, 4, 3, 2.5, 2.4] * 3, False, id="falls and starts anew"),
        pytest.param([9.0] * 20, False, id="learns nothing"),
        pytest.param([4, 3, 2, 2, 2, 90, 80, 2, 2, 2], False, id="two spikes"),
        pytest.param([0.2, 0.2, 0.2, 0.2, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9], False, id="4 times nearly nothing"),
        pytest.param([9, 6, 4, 3, 3, 3, 7, 7, 7, 7, 7], True, id="forgets the language"),
        pytest.param([9, 40, 300, 5000, 1e6], True, id="explodes at once"),
    ],
)
def test_judgements_of_typical_trainings(losses: list[float], diverges: bool) -> None:
    watch, found = LossWatch(2.0), []
    for loss in losses:
        watch.add(loss)
        found.append(watch.is_diverging)
    assert any(found) == diverges
    always = LossWatch(0.0, losses)
    assert not always.is_diverging
    assert not always.is_suspicious


class PoisonWeights(TrainerCallback):
    """Makes a weight infinite after a step, as an overflow would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(kwargs["model"].parameters()).view(-1)[0] = math.inf


def scaled_loss(trainer: SparseqTrainer, scale: dict[int, float]) -> None:
    """Multiply the loss at some steps, as if the model had got worse."""
    original = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return original(*args, **kwargs) * scale.get(trainer.state.global_step + 1, 1.0)

    trainer.training_step = step  # type: ignore[method-assign]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {}, {**EACH_STEP, "logging_steps": 100})
    trainer.add_callback(PoisonWeights(step=5))
    message = (
        r"At step 5 the weights .* not finite. The last good checkpoint is .*checkpoint-4. Lower the learning rate"
    )
    with pytest.raises(DivergenceError, match=message):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_an_optimizer_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {}, {**EACH_STEP, "max_steps": 2, "save_steps": 2, "logging_steps": 100})

    class PoisonState(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(iter(kwargs["optimizer"].state.values()))["exp_avg_sq"].fill_(math.inf)

    trainer.add_callback(PoisonState())
    with pytest.raises(DivergenceError, match=r"At step 2 the weights or the optimizer's state .*no checkpoint"):
        trainer.train()
    assert not complete_checkpoints(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_loss_that_is_not_finite_is_seen_at_the_next_log(value: float, tmp_path: Path) -> None:
    arguments = {**EACH_STEP, "save_steps": 2, "logging_steps": 5}
    trainer = tiny_trainer(tmp_path, {}, arguments)
    scaled_loss(trainer, {3: value})
    with pytest.raises(DivergenceError, match=rf"At step 5 the training loss is {value}\. .*checkpoint-4"):
        trainer.train()


def test_the_loss_is_not_looked_at_between_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, {}, {**EACH_STEP, "save_strategy": "no", "logging_steps": 6})
    looks: list[int] = []
    for name in ("isnan", "isinf"):
        original = getattr(torch, name)

        def spied(tensor: torch.Tensor, original: Any = original) -> torch.Tensor:
            looks.append(trainer.state.global_step)
            return original(tensor)

        monkeypatch.setattr(torch, name, spied)
    trainer.train()
    assert trainer.state.global_step == 12
    assert looks == []


def test_a_loss_that_runs_away_stops_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {}, {**EACH_STEP, "logging_steps": 1, "max_steps": 30, "save_total_limit": 1})
    scaled_loss(trainer, dict.fromkeys(range(11, 31), 50.0))
    # The median of five logs is high from the third high loss on.
    message = r"At step 13 the training diverges: .* after 3\.\d+ at best .* checkpoint is .*checkpoint-10\."
    with pytest.raises(DivergenceError, match=message):
        trainer.train()
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-10", "checkpoint-12"]
    notes = [read_note(path) for path in found]
    assert [note.diverging for note in notes if note is not None] == [False, True]


def test_a_loss_that_comes_back_goes_on(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {}, {**EACH_STEP, "logging_steps": 1, "save_total_limit": 1})
    scaled_loss(trainer, {8: 50.0, 9: 50.0})
    trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-12"]


def test_a_run_that_diverges_does_so_again_after_resume(tmp_path: Path) -> None:
    arguments = {**EACH_STEP, "logging_steps": 1, "max_steps": 30}
    for resume in (False, True):
        trainer = tiny_trainer(tmp_path, {}, arguments)
        scaled_loss(trainer, dict.fromkeys(range(11, 31), 50.0))
        with pytest.raises(DivergenceError, match="At step 13 the training diverges"):
            trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("name", ["logging_nan_inf_filter", "enable_jit_checkpoint"])
def test_arguments_that_would_hide_or_save_the_wrong_thing_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` .* Leave it out"):
        tiny_trainer(tmp_path, {}, {name: True})


@pytest.fixture
def plain_signals() -> Iterator[None]:
    """The effect of signals in a program that handles none; test runners do."""
    effects = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    previous = {signum: signal.signal(signum, effect) for signum, effect in effects.items()}
    yield
    for signum, effect in previous.items():
        signal.signal(signum, effect)


@pytest.mark.usefixtures("plain_signals")
@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_is_noted_and_acts_later(signum: signal.Signals, error: type[BaseException]) -> None:
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(error) as raised:
            stop.act(signum)
    assert signal.getsignal(signum) is before
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 143


@pytest.mark.usefixtures("plain_signals")
def test_a_second_ctrl_c_acts_at_once_and_a_second_sigterm_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("plain_signals")
def test_a_program_s_own_handler_is_called_and_an_ignored_signal_stays_ignored() -> None:
    calls = []
    signal.signal(signal.SIGTERM, lambda signum, frame: calls.append(signum))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == []
        with pytest.raises(SystemExit):
            stop.act(signal.SIGTERM)
    assert calls == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum is None
