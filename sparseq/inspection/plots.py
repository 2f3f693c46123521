"""Pictures of a training run, where matplotlib is installed."""

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(11 if loads else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
        experts = len(loads[0].load)
        heat = figure.add_subplot(1, 2, 2)
        shares = [[share * experts for share in entry.load] for entry in loads]
        image = heat.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        heat.set_yticks(range(len(loads)), [f"{entry.stack} {entry.layer}" for entry in loads])
        heat.set_xticks(range(experts))
        heat.set_xlabel("expert")
        heat.set_title("expert load (1 = uniform share)")
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                color = "white" if abs(value - 1) > 0.7 else "black"
                heat.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=110)
    return path


__all__ = ["plot_run"]
