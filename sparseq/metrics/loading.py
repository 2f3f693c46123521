"""The metrics of this package as modules of the `evaluate` library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseq.metrics.corpus import check_metric

if TYPE_CHECKING:
    import evaluate


def module_path(name: str) -> Path:
    """The file that `evaluate.load` takes for a metric; it lies in this package, so nothing is downloaded.

    Args:
        name: "bleu", "chrf", "exact_match" or "rouge".

    Raises:
        ValueError: There is no metric of that name.
    """
    check_metric(name)
    return Path(__file__).resolve().parent / "modules" / f"{name}.py"


def load(
    name: str, *, keep_in_memory: bool | None = None, num_process: int = 1, **options: Any
) -> "evaluate.EvaluationModule":
    """Load a metric of this package as an `evaluate` module; works offline and with an empty cache.

    Args:
        name: "bleu", "chrf", "exact_match" or "rouge".
        keep_in_memory: Hold added texts in memory instead of files in the cache. Default: where one process computes.
        num_process: Processes that add texts to one result, as for `evaluate.load`.
        options: Further arguments of `evaluate.load`.

    Returns:
        A module whose `compute(predictions=..., references=...)` gives `score` and `signature`, and takes the metric's
        options, `bootstrap` and `seed`.

    Raises:
        ValueError: There is no metric of that name.
        ModuleNotFoundError: `evaluate`, or rouge-score for "rouge", is not installed.
    """
    path = module_path(name)
    import evaluate

    in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
    return evaluate.load(str(path), keep_in_memory=in_memory, num_process=num_process, **options)
