"""Pictures of a run: drawn from what there is, and left out without matplotlib."""

import builtins
import itertools
import struct
from pathlib import Path
from typing import Any

import pytest

from sparseq.inspection import plots
from sparseq.inspection.experts import LayerLoad
from sparseq.inspection.plots import plot_expert_loads, plot_run

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


def uniform(experts: int, layers: int) -> list[LayerLoad]:
    return [
        LayerLoad(
            stack="encoder" if layer < layers / 2 else "decoder",
            layer=layer,
            tokens=10,
            load=(1 / experts,) * experts,
            router_entropy=0.7,
            mean_top1_probability=0.6,
        )
        for layer in range(layers)
    ]


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    original = Figure.savefig

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


@pytest.mark.parametrize(
    ("panels", "experts", "layers", "has_numbers"),
    [
        (1, 8, 4, True),
        (1, 1, 1, True),
        (3, 8, 4, True),
        (1, 128, 24, False),
        (1, 8, 96, False),
        (20, 16, 8, False),
        (9, 128, 24, False),
        (5, 64, 12, False),
    ],
)
def test_heat_maps_are_readable_at_any_size(
    panels: int, experts: int, layers: int, has_numbers: bool, figures: list[Any], tmp_path: Path
) -> None:
    loads = uniform(experts, layers)
    path = plot_expert_loads([(f"a group $x$ {i}", loads) for i in range(panels)], tmp_path / "experts.png")
    assert path is not None
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width < 1700
    assert height < 5000
    (figure,) = figures
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == [f"a group $x$ {i}" for i in range(panels)]
    for axis in maps:
        (image,) = axis.images
        assert image.get_array().shape == (layers, experts)
        assert image.get_clim() == (0, 2), "one scale for all, with the uniform share in its middle"
    assert len(texts_of(figure)) == (panels * experts * layers if has_numbers else 0)
    # Tick labels do not overlap: there is room for the height of each.
    for axis in maps:
        boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
        assert all(not one.overlaps(other) for one, other in itertools.pairwise(boxes))
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert all(not one.overlaps(other) for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("experts", [4, 64])
def test_dead_experts_are_marked(experts: int, figures: list[Any], tmp_path: Path) -> None:
    load = (0.0, *(1 / (experts - 2),) * (experts - 2), 0.0)
    row = LayerLoad(stack="encoder", layer=1, tokens=10, load=load, router_entropy=0.7, mean_top1_probability=0.6)
    assert plot_expert_loads([("g", [row])], tmp_path / "experts.png")
    (marks,) = figures[0].axes[0].lines
    assert marks.get_xydata().tolist() == [[0, 0], [experts - 1, 0]]
    assert "0.0" not in texts_of(figures[0])


def test_more_groups_than_can_be_seen(figures: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "MAX_PANELS", 3)
    panels = [(f"g{i}", uniform(2, 1)) for i in range(5)]
    assert plot_expert_loads(panels, tmp_path / "experts.png")
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    assert titles == ["g0", "g1", "g2"]


def test_without_matplotlib_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert plot_run(LOG, LOADS, tmp_path / "run.png") is None
    assert plot_expert_loads([("g", LOADS)], tmp_path / "experts.png") is None
    assert not list(tmp_path.iterdir())
