"""The memory that logits take in a training step: all of them, or those of a few label positions (`skip_logits`).

    python benchmarks/logits_memory.py                     # about 5 minutes on one core, 4 GB
    python benchmarks/logits_memory.py --shapes tiny --padding 0.5
    python benchmarks/logits_memory.py --rounds 15         # the time of the step instead
    python benchmarks/logits_memory.py --device cuda --dtype bfloat16 --json memory.json

Dense Sparseq with and without `skip_logits`, and the library's MarianMT of the same shape: "tiny" d 128, 4 + 4 layers,
ff 256, 10,000 tokens, batches of 128 x 32 source and target positions; "base" d 512, 6 + 6 layers, ff 2,048, 32,000
tokens, 32 x 64. A share of the positions is padding. All models: plain ReLU, LayerNorm behind each sub-layer, sdpa, no
dropout, fused AdamW. Labels are smoothed by the model's own loss, MarianMT's by Trainer's `LabelSmoother`, which
`label_smoothing_factor` stands for.

The figure is the most bytes that are alive at once in forward, backward and update, beyond weights and Adam's moments.
On the CPU every allocation and release of the step's tensors counts, as torch's profiler notes them, so it is the same
on every run; on CUDA it is `max_memory_allocated`. "logits" is the size of one float32 tensor of all logits.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # it lies beside this script
from torch.profiler import ProfilerActivity, profile
from training_step import make_model  # type: ignore[import-not-found]  # as interleave
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from sparseq.training.allocator import keep_freed_memory

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"d": 128, "layers": 4, "heads": 4, "ff": 256, "vocab": 10_000, "batch": 128, "length": 32},
    "base": {"d": 512, "layers": 6, "heads": 8, "ff": 2048, "vocab": 32_000, "batch": 32, "length": 64},
}
SYSTEMS = ("marian", "sparseq", "sparseq, skip_logits")


def make_batch(shape: dict[str, int], padding: float, device: str) -> dict[str, torch.Tensor]:
    """Random ids; sentences of equally spread lengths, the longest of which fills the row, leave `padding` empty."""
    rows, length = shape["batch"], shape["length"]
    lengths = torch.linspace(length * (1 - 2 * padding), length, rows).round().clamp(min=1).long()
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, shape["vocab"], (rows, length), generator=generator) for _ in range(2))
    is_token = torch.arange(length) < lengths[:, None]
    batch = {
        "input_ids": ids.masked_fill(~is_token, 0),
        "attention_mask": is_token.long(),
        "labels": labels.masked_fill(~is_token, -100),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def training_step(
    system: str, model: PreTrainedModel, batch: dict[str, torch.Tensor], args: argparse.Namespace
) -> Callable[[], None]:
    """Forward, backward and update, the loss computed as the system's Trainer does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    # Adam's moments, which stay, are no part of what a step takes.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    dtype = getattr(torch, args.dtype)
    smoother = LabelSmoother(epsilon=args.label_smoothing) if system == "marian" and args.label_smoothing else None
    options = {"skip_logits": True} if "skip" in system else {}
    if smoother is not None:
        # Trainer's collator has made them, and takes the labels away from the model.
        shift: Any = model
        decoder_ids = shift.prepare_decoder_input_ids_from_labels(labels=batch["labels"])

    def loss() -> torch.Tensor:
        if smoother is None:
            value: torch.Tensor = model(**batch, **options).loss
            return value
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return smoother(model(**inputs, decoder_input_ids=decoder_ids, use_cache=False), batch["labels"])

    def step() -> None:
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Most bytes alive at once during `step`, beyond those that are alive before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Otherwise the profiler tells of itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    alive = peak = 0
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def measure(shape_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each share of padding."""
    shape = SHAPES[shape_name]
    logits = 4 * shape["batch"] * shape["length"] * shape["vocab"]
    rows = []
    for padding in args.padding:
        peaks = {}
        for system in SYSTEMS:
            model = make_model("marian" if system == "marian" else "dense", shape).to(args.device)
            if system != "marian":
                model.config.label_smoothing = args.label_smoothing
            batch = make_batch(shape, padding, args.device)
            peaks[system] = peak_bytes(training_step(system, model, batch, args), args.device)
        share = float(batch["labels"].eq(-100).float().mean())
        rows.append({"shape": shape_name, "padding": share, "logits": logits, "peak": peaks})
    return rows


def time_steps(shape_name: str, args: argparse.Namespace) -> dict[str, float]:
    """Time of the step with `skip_logits` and of MarianMT's over that with all logits, on one full batch, in turn."""
    shape = SHAPES[shape_name]
    steps = {}
    for system in SYSTEMS:
        model = make_model("marian" if system == "marian" else "dense", shape).to(args.device)
        if system != "marian":
            model.config.label_smoothing = args.label_smoothing
        steps[system] = training_step(system, model, make_batch(shape, args.padding[0], args.device), args)
    return ratios(interleave(steps, rounds=args.rounds, device=args.device), "sparseq")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="default: all")
    parser.add_argument(
        "--padding", nargs="+", type=float, default=[0.0, 0.05, 0.25, 0.5], help="share (default: 0 0.05 0.25 0.5)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="time the step in so many rounds instead")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: cpu)')
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    if not all(0 <= padding <= 0.5 for padding in args.padding):
        parser.error(f"--padding must be from 0 to 0.5, but is {args.padding}")
    torch.set_num_threads(args.threads)
    if args.rounds:
        keep_freed_memory()
        for name in args.shapes:
            for system, ratio in time_steps(name, args).items():
                print(f"{name:6}{system:>24} {ratio:6.3f} of the time of sparseq with all logits")
        return
    print(f"{'':6}{'padding':>8}{'logits':>10}" + "".join(f"{system:>24}" for system in SYSTEMS) + "    in MB")
    rows = []
    for name in args.shapes:
        for row in measure(name, args):
            rows.append(row)
            base = row["peak"]["marian"]
            cells = "".join(f"{peak / 1e6:14,.0f} ({peak / base:6.3f})" for peak in row["peak"].values())
            print(f"{name:6}{row['padding']:8.1%}{row['logits'] / 1e6:10,.0f}{cells}")
    if args.json:
        about = {"dtype": args.dtype, "label_smoothing": args.label_smoothing}
        args.json.write_text(json.dumps({"setting": setting(args.device) | about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
