"""Averaged checkpoints: the mean in float32, of whole saves only."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseq.training.averaging import average_checkpoints, complete_checkpoints


def _checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_mean_equals_that_of_stacked_tensors(tmp_path: Path) -> None:
    weights = [{"w": torch.randn(3, 4), "step": torch.tensor([i])} for i in range(4)]
    folders = [_checkpoint(tmp_path, i, tensors) for i, tensors in enumerate(weights)]
    mean = average_checkpoints(folders)
    torch.testing.assert_close(mean["w"], torch.stack([tensors["w"] for tensors in weights]).mean(dim=0))
    assert mean["step"].tolist() == [3]


def test_low_precision_weights_are_summed_in_float32(tmp_path: Path) -> None:
    # In bfloat16, 256 + 1 is 256: a running sum there would lose every addend after the first.
    values = [256.0, *[1.0] * 255]
    folders = [
        _checkpoint(tmp_path, i, {"w": torch.tensor([value], dtype=torch.bfloat16)}) for i, value in enumerate(values)
    ]
    mean = average_checkpoints(folders)["w"]
    assert mean.dtype == torch.bfloat16
    assert mean.item() == pytest.approx(511 / 256, rel=2**-8)


def test_only_complete_saves_count_in_numeric_order(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(1)}
    for step in (9, 10, 100):
        _checkpoint(tmp_path, step, tensors)
    _checkpoint(tmp_path, 200, tensors, state=None)
    _checkpoint(tmp_path, 300, tensors, state='{"global_step": 3')
    (tmp_path / "checkpoint-x").mkdir()
    (_checkpoint(tmp_path, 400, tensors) / "model.safetensors").unlink()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert complete_checkpoints(tmp_path / "absent") == []


def test_mistakes_are_named(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path, 1, {"w": torch.zeros(2)})
    other_shape = _checkpoint(tmp_path, 2, {"w": torch.zeros(3)})
    other_name = _checkpoint(tmp_path, 3, {"v": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"w is \(2,\) in .*checkpoint-1 but \(3,\)"):
        average_checkpoints([first, other_shape])
    with pytest.raises(ValueError, match="different tensors, for instance v, w"):
        average_checkpoints([first, other_name])
    with pytest.raises(ValueError, match="no checkpoint to average"):
        average_checkpoints([])
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        average_checkpoints([tmp_path])


def test_weights_that_are_not_finite_are_not_averaged(tmp_path: Path) -> None:
    folders = [
        _checkpoint(tmp_path, i, {"w": torch.tensor([1.0, value])}) for i, value in enumerate((2.0, float("inf")))
    ]
    with pytest.raises(ValueError, match=r"w is not finite in .*checkpoint-1: .*earlier checkpoints"):
        average_checkpoints(folders)
