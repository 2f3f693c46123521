"""What the demo corpus demands: BLEU of a word-for-word dictionary, and of the demo model without one of its parts.

    python benchmarks/demo_ablations.py                      # about 4 minutes a model on 2 cores
    python benchmarks/demo_ablations.py --json ablations.json training.max_steps=300

"no positions" has `position_embedding_type="none"`; "no cross-attention" gets zeros where the decoder would read the
source. Both are trained like the whole model, from the recipe "demo". Exits with status 1 unless the dictionary scores
under 40 BLEU, both twins under 60 and the whole model above 90.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparseq.data.grammar import word_for_word
from sparseq.metrics import translation_scores
from sparseq.modeling_sparseq import SparseqAttention
from sparseq.training.recipes import load_recipe
from sparseq.training.run import train

BARS = {"dictionary": (0, 40), "no positions": (0, 60), "no cross-attention": (0, 60), "whole model": (90, 100)}


@contextmanager
def no_cross_attention() -> Iterator[None]:
    """Within the block the decoder reads nothing of the source."""
    original = SparseqAttention.forward

    def forward(self: SparseqAttention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_causal and len(args) > 1:
            # The layer passes encoder states as third argument, to cross-attention only.
            return torch.zeros_like(hidden_states), None
        return original(self, hidden_states, *args, **kwargs)

    SparseqAttention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        SparseqAttention.forward = original  # type: ignore[method-assign]


def measure(overrides: list[str]) -> dict[str, float]:
    """BLEU of each system on the demo's test pairs."""
    scores: dict[str, float] = {}

    def run(name: str, *changes: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            result = train(load_recipe("demo", [*overrides, *changes]), Path(folder) / "run")
        scores[name] = result.scores["bleu"]
        print(f"{name:20} BLEU {scores[name]:6.2f}", flush=True)
        return result

    whole = run("whole model")
    translations = [word_for_word(source) for source in whole.sources]
    scores["dictionary"] = translation_scores(translations, whole.references)["bleu"]
    run("no positions", "model.position_embedding_type=none")
    with no_cross_attention():
        run("no cross-attention")
    return scores


def main() -> int:
    """Measure, print and judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the recipe for all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here too")
    args = parser.parse_args()
    scores = measure(args.overrides)
    print()
    is_good = True
    for name, (low, high) in BARS.items():
        holds = low <= scores[name] <= high
        is_good &= holds
        print(f"{name:20} BLEU {scores[name]:6.2f}   {'within' if holds else 'OUTSIDE'} [{low}, {high}]")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
