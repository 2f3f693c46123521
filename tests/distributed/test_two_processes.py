"""Two processes make the same updates, move the same selection biases and log the same numbers as one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.scenarios import MODELS, Results, batch_scope, loss_free, sparseq_logs, stock_logs, update
from tests.tolerances import assert_close

# One launch serves all tests of a worker; without this each worker of `make test` would launch its own.
pytestmark = pytest.mark.xdist_group("two-processes")

# What a log holds of time, not of the run.
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def assert_same_update(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank in ranks:
        assert_close(torch.tensor(rank["loss"]), torch.tensor(expected["loss"]), torch.float32, "loss")
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert_close(rank["gradients"][name], gradient, torch.float32, name)


def assert_same_numbers(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    def numbers(entry: dict[str, Any]) -> dict[str, float]:
        return {name: value for name, value in entry.items() if not name.endswith(_TIMES)}

    assert numbers(actual).keys() == numbers(expected).keys()
    for name, value in numbers(expected).items():
        assert_close(torch.tensor(float(actual[name])), torch.tensor(float(value)), torch.float32, name)


@pytest.mark.parametrize("model", MODELS)
def test_an_update_is_that_of_one_process(model: str, on_two_processes: Results, tmp_path: Path) -> None:
    ranks = on_two_processes(f"update {model}")
    shares = [sum(rank["label_tokens"]) for rank in ranks]
    assert len(ranks[0]["label_tokens"]) == 2
    assert shares[0] != shares[1], "equal shares would hide a mean of means"
    assert_same_update(ranks, update(tmp_path, **MODELS[model]))


def test_padding_and_checkpointing_change_nothing(on_two_processes: Results, tmp_path: Path) -> None:
    assert_same_update(on_two_processes("update padded and checkpointed"), update(tmp_path, label_smoothing=0.1))


def test_batch_scope_does_not_grow_with_processes(on_two_processes: Results, tmp_path: Path) -> None:
    assert_same_update(on_two_processes("batch scope"), batch_scope(tmp_path, copies=1, size=4))


def test_selection_biases_are_exactly_those_of_one_process(on_two_processes: Results, tmp_path: Path) -> None:
    expected = loss_free(tmp_path, size=16, accumulation=1)
    for rank in on_two_processes("loss_free"):
        assert len(rank["biases"]) == len(expected["biases"]) == 5
        for ours, theirs in zip(rank["biases"], expected["biases"], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], bias) for name, bias in theirs.items())
        for name, bias in rank["biases"][-1].items():
            assert bias.any(), name
            assert torch.equal(rank["resumed"][name], bias), f"{name} of the run that was resumed"


def test_a_stock_trainer_logs_what_one_process_does(on_two_processes: Results, tmp_path: Path) -> None:
    expected = stock_logs(tmp_path, size=16, accumulation=1)
    assert any("router/decoder_1/load_3" in entry for entry in expected["logs"])
    for rank in on_two_processes("stock logs"):
        assert len(rank["logs"]) == len(expected["logs"]) == 2
        for ours, theirs in zip(rank["logs"], expected["logs"], strict=True):
            assert_same_numbers(ours, theirs)
        for kind, prefix in (("evaluation", "eval"), ("prediction", "test")):
            # Trainer's own is a mean of batch means, so it depends on the batches.
            loss = f"{prefix}_loss"
            assert math.isfinite(rank[kind].pop(loss))
            assert_same_numbers(rank[kind], {k: v for k, v in expected[kind].items() if k != loss})
            assert f"{prefix}_decoder_z_loss" in rank[kind]


def test_sparseq_trainer_logs_what_one_process_does(on_two_processes: Results, tmp_path: Path) -> None:
    expected = sparseq_logs(tmp_path)
    for rank in on_two_processes("sparseq logs"):
        assert_same_numbers(rank["evaluation"], expected["evaluation"])
        (ours,), (theirs,) = rank["logs"], expected["logs"]
        # An epoch has another number of updates, over which Trainer's loss is a mean, of other batches; the sentences
        # are the same.
        skipped = ("loss", "grad_norm", "step", "padding")
        names = [name for name in theirs if name not in skipped]
        assert "router/max_vio" in names
        assert_same_numbers({n: ours[n] for n in names}, {n: theirs[n] for n in names})
