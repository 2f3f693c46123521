"""One mixture-of-experts layer, forward and backward, beside the dense layer with the same active parameters.

    python benchmarks/moe_layer.py                          # about 3 minutes on one core
    python benchmarks/moe_layer.py --allocator default      # without the allocator setting that `sparseq train` makes
    python benchmarks/moe_layer.py --device cuda --dtype bfloat16 --json layer.json

The layer is 512 wide, with 8 plain ReLU experts of 2,048 of which each token gets 2; the dense layer is 4,096 wide.
"grouped_mm" is the same layer with the experts implementation of that name in transformers. All run in one process
with the same threads, precision and allocator, in turn; a figure is the median over rounds of the ratio within the
round. Exits with status 1 where a float32 figure on the CPU misses its bar.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # it lies beside this script
from torch import nn

from sparseq import SparseqConfig
from sparseq.modeling_sparseq import SparseqMLP, SparseqSparseMLP
from sparseq.training.allocator import keep_freed_memory

HIDDEN, WIDTH, TOP_K = 512, 2048, 2
# Tokens to the largest ratio to the dense layer, for float32 on one CPU thread.
DENSE_BARS = {1024: 1.10, 16: 4.5}
# Time with 128 experts over that with 8, at 8,192 tokens.
MANY_EXPERTS_BAR = 1.3


def make_layer(kind: str, num_experts: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A layer of random weights: "dense", or sparse with that experts implementation."""
    config = SparseqConfig(
        d_model=HIDDEN,
        encoder_ffn_dim=TOP_K * WIDTH,
        expert_ffn_dim=WIDTH,
        num_experts=num_experts,
        num_experts_per_tok=TOP_K,
        activation_function="relu",
        gated_ffn=False,
    )
    config._experts_implementation = kind
    torch.manual_seed(0)
    with torch.device(device):
        layer = SparseqMLP(config, TOP_K * WIDTH) if kind == "dense" else SparseqSparseMLP(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return layer.to(dtype)


def training_step(layer: nn.Module, tokens: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward over `tokens` random tokens, with gradients made anew as an optimizer leaves them."""
    generator = torch.Generator(device).manual_seed(1)
    inputs = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype, generator=generator, requires_grad=True)
    gradient = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype, generator=generator)

    def step() -> None:
        inputs.grad = None
        layer.zero_grad(set_to_none=True)
        outputs, _ = layer(inputs)
        outputs.backward(gradient)

    return step


def compare(kinds: dict[str, tuple[str, int]], base: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Ratios of the systems `name: (kind, experts)` to `base`."""
    dtype = getattr(torch, args.dtype)
    steps = {
        name: training_step(make_layer(kind, experts, args.device, dtype), tokens, args.device, dtype)
        for name, (kind, experts) in kinds.items()
    }
    rounds = args.rounds * (3 if tokens < 100 else 1)
    return ratios(interleave(steps, rounds=rounds, device=args.device), base)


def main() -> int:
    """Measure, print and judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: cpu)')
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="repetitions (default: 15; three times that at 16 tokens)"
    )
    parser.add_argument("--allocator", default="keep", choices=["keep", "default"], help="glibc's thresholds, for all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")
    torch.set_num_threads(args.threads)
    kept = args.allocator == "keep" and keep_freed_memory()
    results: dict[str, Any] = {"setting": setting(args.device) | {"freed_memory_kept": kept, "dtype": args.dtype}}
    is_judged = args.device == "cpu" and args.dtype == "float32" and args.threads == 1
    misses = 0

    def show(what: str, value: float, bar: float | None) -> None:
        nonlocal misses
        missed = is_judged and bar is not None and value > bar
        misses += missed
        results[what] = value
        print(f"{what:58} {value:6.3f}" + (f"  {'MISSED' if missed else 'bar'} {bar}" if bar else ""), flush=True)

    for tokens, bar in DENSE_BARS.items():
        found = compare(
            {"dense": ("dense", 0), "ours": ("sparseq", 8), "gmm": ("grouped_mm", 8)}, "dense", tokens, args
        )
        show(f"{tokens:,} tokens: 8 experts over dense", found["ours"], bar)
        show(f"{tokens:,} tokens: transformers' grouped_mm over dense", found["gmm"], None)
    for experts in (8, 128):
        found = compare({"ours": ("sparseq", experts), "gmm": ("grouped_mm", experts)}, "gmm", 1024, args)
        show(f"1,024 tokens: {experts} experts over transformers' grouped_mm", found["ours"], 1.0)
    found = compare({"8": ("sparseq", 8), "128": ("sparseq", 128)}, "8", 8192, args)
    show("8,192 tokens: 128 experts over 8", found["128"], MANY_EXPERTS_BAR)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 1 if misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
