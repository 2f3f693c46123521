"""Pictures of a run: drawn from what there is, and left out without matplotlib."""

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest

from sparseq.inspection.experts import LayerLoad
from sparseq.inspection.plots import plot_run

LOG = [
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": 3.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 2, "eval_loss": 2.4},
]
LOADS = [
    LayerLoad(stack="encoder", layer=1, tokens=10, load=(0.5, 0.5, 0.0), router_entropy=0.7, mean_top1_probability=0.6)
]


@pytest.mark.parametrize("loads", [LOADS, []])
def test_a_png_is_written(loads: list[LayerLoad], tmp_path: Path) -> None:
    path = plot_run(LOG, loads, tmp_path / "run.png")
    assert path is not None
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height, "curves, and the experts beside them"
    assert (width > 1000) == bool(loads)


def test_without_matplotlib_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert plot_run(LOG, LOADS, tmp_path / "run.png") is None
    assert not list(tmp_path.iterdir())
