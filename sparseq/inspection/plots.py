"""Pictures of a training run and of what its experts do, where matplotlib is installed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseq.inspection.experts import LayerLoad


def plot_run(log: Sequence[Mapping[str, Any]], loads: Sequence[LayerLoad], path: Path) -> Path | None:
    """
    Draw the loss curves of a run and, beside them, the load of its experts as a heat map (layers x experts).

    Args:
        log: Trainer's log history: entries with "step" and "loss" or "eval_loss".
        loads: From `expert_load`; may be empty.
        path: The PNG to write.

    Returns:
        `path`, or None where matplotlib is not installed.
    """
    figure = _new_figure(11 if loads else 6, 4)
    if figure is None:
        return None
    curve = figure.add_subplot(1, 2 if loads else 1, 1)
    for key, label in (("loss", "training (with smoothing and router losses)"), ("eval_loss", "validation")):
        # The first value of a step: after the last one, the averaged weights are evaluated again.
        points: dict[int, float] = {}
        for entry in log:
            if key in entry:
                points.setdefault(entry["step"], entry[key])
        if points:
            curve.plot(list(points), list(points.values()), label=label, marker="o" if key == "eval_loss" else None)
    curve.set_xlabel("updates")
    curve.set_ylabel("loss per target token (nats)")
    curve.set_yscale("log")
    curve.grid(alpha=0.3, which="both")
    curve.legend()
    if loads:
        heat = figure.add_subplot(1, 2, 2)
        # The panel is about 5 inches wide and 3 high.
        cell = (5 / len(loads[0].load), 3 / len(loads))
        image = _draw_loads(heat, loads, cell=cell, numbers=min(cell[0] / 0.3, cell[1] / 0.15) >= 1)
        heat.set_title("expert load (1 = uniform share)")
        figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=110)
    return path


# More panels than this are unreadable, and a picture of them is refused by some viewers.
MAX_PANELS = 30


def plot_expert_loads(panels: Sequence[tuple[str, Sequence[LayerLoad]]], path: Path) -> Path | None:
    """
    Draw the expert load of several groups of text as heat maps, layers x experts, in one scale of colours.

    Args:
        panels: Title of each panel and its layers; all panels have the same layers. The first `MAX_PANELS` are drawn.
        path: The PNG to write.

    Returns:
        `path`, or None where matplotlib is not installed.
    """
    drawn = panels[:MAX_PANELS]
    _, loads = drawn[0]
    rows, experts = len(loads), len(loads[0].load)
    # Inches of one cell: with room for a number, unless that would make the picture wider or higher than can be seen.
    across = 1 if len(drawn) <= 3 else 2 if len(drawn) <= 8 else 3
    cell_width = min(0.42, (13 / across - 1.5) / experts)
    width = max(cell_width * experts, 2.4) + 1.0
    columns = max(1, min(len(drawn), int(14 / width)))
    lines = math.ceil(len(drawn) / columns)
    cell = (cell_width, min(0.3, 9 / rows, (40 / lines - 0.8) / rows))
    height = cell[1] * rows + 0.8
    # matplotlib draws a few hundred numbers a second.
    numbers = min(cell[0] / 0.3, cell[1] / 0.18) >= 1 and len(drawn) * rows * experts <= 2000
    figure = _new_figure(columns * width + 0.9, lines * height + 0.5)
    if figure is None:
        return None
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(drawn):
            axis.set_axis_off()
    for axis, (title, layers) in zip(axes.flat, drawn, strict=False):
        image = _draw_loads(axis, layers, cell=cell, numbers=numbers)
        axis.set_title(_shorten(title, width), fontsize=9, parse_math=False)
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.02, pad=0.01, aspect=25)
    figure.suptitle("expert load, 1 = uniform share (x: no token)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    return path


def _new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_loads(axis: Any, loads: Sequence[LayerLoad], *, cell: tuple[float, float], numbers: bool) -> Any:
    """A heat map of layers x experts, in cells of `cell` inches (width, height), with or without a number in each."""
    experts = len(loads[0].load)
    shares = [[share * experts for share in entry.load] for entry in loads]
    image = axis.imshow(shares, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
    every_layer = math.ceil(0.14 / cell[1])
    labels = [(row, f"{entry.stack} {entry.layer}") for row, entry in enumerate(loads)][::every_layer]
    axis.set_yticks([row for row, _ in labels], [label for _, label in labels])
    every_expert = 2 ** max(0, math.ceil(math.log2(0.22 / cell[0])))
    axis.set_xticks(range(0, experts, every_expert))
    axis.tick_params(labelsize=8 if every_layer == 1 else 7, length=2)
    axis.set_xlabel("expert", fontsize=8)
    for row in range(1, len(loads)):
        if loads[row].stack != loads[row - 1].stack:
            axis.axhline(row - 0.5, color="black", linewidth=1.2)
    size = min(8.0, 70 * cell[0], 70 * cell[1])
    # A dead expert is marked whatever the size.
    dead = [(column, row) for row, values in enumerate(shares) for column, value in enumerate(values) if value == 0]
    axis.plot([x for x, _ in dead], [y for _, y in dead], "x", color="white", markersize=size / 2)
    if not numbers:
        return image
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if value:
                color = "white" if abs(value - 1) > 0.7 else "black"
                text = axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=size, color=color)
                # Measuring every number would take most of the time of the layout.
                text.set_in_layout(False)
    return image


def _shorten(title: str, inches: float) -> str:
    # About 12 characters an inch at this size.
    room = max(8, int(12 * inches))
    return title if len(title) <= room else f"{title[: room - 1]}…"


__all__ = ["MAX_PANELS", "plot_expert_loads", "plot_run"]
