"""What the reports of several benchmarks read from the folders of training runs, and how they print it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def validation_losses(log: Sequence[Mapping[str, Any]], *, finished: bool) -> dict[int, float]:
    """Validation loss by update, from the `log` of results.json or of a checkpoint's trainer_state.json.

    Args:
        log: Trainer's log.
        finished: Its last validation is that of the saved weights, the mean of several checkpoints, so it belongs to
            no update.
    """
    losses = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    return {step: round(loss, 4) for step, loss in (losses[:-1] if finished else losses)}


def mean_figures(rows: Iterable[Mapping[str, Any]], figures: Sequence[str]) -> dict[str, float]:
    """The mean of each figure over the rows, those of one system's seeds."""
    values = list(rows)
    return {figure: statistics.fmean(row[figure] for row in values) for figure in figures}


def with_interval(scores: Mapping[str, Any], figure: str) -> str:
    """A figure as tables have it, with half its 95% interval where that is known."""
    interval = f" ± {scores[f'{figure}_ci']:.2f}" if f"{figure}_ci" in scores else ""
    return f"{scores[figure]:.2f}{interval}"


def curve(losses: Mapping[int, float]) -> str:
    """Losses by update, in one line."""
    return "  ".join(f"{step:,}: {loss:.3f}" for step, loss in losses.items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns as wide as their longest cell; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
