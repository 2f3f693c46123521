"""A whole training step, Sparseq dense and sparse beside MarianMT of the same shape.

    python benchmarks/training_step.py                     # about 5 minutes on one core
    python benchmarks/training_step.py --shape small
    python benchmarks/training_step.py --device cuda --dtype bfloat16 --json step.json

Shapes: "base" d 512, 6 + 6 layers, 8 heads, ff 2,048, 32,000 tokens, batches of 8 x 64 source and 64 target tokens;
"small" d 256, 3 + 3, 4 heads, ff 1,024, 8,000 tokens, 32 x 64 x 64. All models: plain ReLU, LayerNorm behind each
sub-layer, multi-head attention with biases, sdpa, no dropout, fused AdamW. "sparse" has 8 experts as wide as the
dense layer in every layer, two for each token, and both auxiliary losses on: 1.42 times the dense model's operations
at "base". Speed is MarianMT's time over the model's, the median over rounds. Exits with status 1 where "base" in
float32 on the CPU misses a bar.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # it lies beside this script
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.training.allocator import keep_freed_memory

SHAPES: dict[str, dict[str, int]] = {
    "base": {"d": 512, "layers": 6, "heads": 8, "ff": 2048, "vocab": 32_000, "batch": 8, "length": 64},
    "small": {"d": 256, "layers": 3, "heads": 4, "ff": 1024, "vocab": 8_000, "batch": 32, "length": 64},
}
# Smallest speed relative to MarianMT.
BARS = {"dense": 0.97, "sparse": 0.61}
MODELS = ("marian", "dense", "sparse", "sparse, every 2nd layer")


def make_model(name: str, shape: dict[str, int]) -> PreTrainedModel:
    """MarianMT or Sparseq with random weights."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": shape["vocab"],
        "d_model": shape["d"],
        "encoder_layers": shape["layers"],
        "decoder_layers": shape["layers"],
        "encoder_attention_heads": shape["heads"],
        "decoder_attention_heads": shape["heads"],
        "encoder_ffn_dim": shape["ff"],
        "decoder_ffn_dim": shape["ff"],
        "activation_function": "relu",
        "dropout": 0.0,
        "max_position_embeddings": 512,
    }
    if name == "marian":
        config = MarianConfig(**common, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
        return MarianMTModel._from_config(config, attn_implementation="sdpa").train()
    step = 2 if "2nd" in name else 1
    ours = SparseqConfig(
        **common,
        encoder_num_key_value_heads=shape["heads"],
        decoder_num_key_value_heads=shape["heads"],
        gated_ffn=False,
        attention_bias=True,
        ffn_bias=True,
        expert_bias=True,
        norm_type="layernorm",
        norm_position="post",
        position_embedding_type="sinusoidal",
        final_logits_bias=True,
        num_experts=0 if name == "dense" else 8,
        expert_ffn_dim=shape["ff"],
        encoder_sparse_step=step,
        decoder_sparse_step=step,
    )
    return SparseqForConditionalGeneration(ours).train()


def training_step(model: PreTrainedModel, shape: dict[str, int], args: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and update on one batch of random ids."""
    model = model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    size = (shape["batch"], shape["length"])
    generator = torch.Generator().manual_seed(1)
    inputs, labels = (torch.randint(3, shape["vocab"], size, generator=generator).to(args.device) for _ in range(2))
    mask = torch.ones_like(inputs)
    dtype = getattr(torch, args.dtype)

    def step() -> None:
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """Largest resident size in GB of a process that makes three steps, by model."""
    script = [sys.executable, __file__, "--shape", args.shape, "--dtype", args.dtype, "--allocator", args.allocator]
    return {
        name: float(subprocess.run([*script, "--memory-of", name], capture_output=True, text=True, check=True).stdout)
        for name in args.models
    }


def _peak_resident_gb() -> float:
    # Not getrusage, whose figure a process inherits from the one that started it.
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def main() -> int:
    """Measure, print and judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base", choices=SHAPES)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="default: all; marian is always there"
    )
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: cpu)')
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions (default: 9)")
    parser.add_argument("--allocator", default="keep", choices=["keep", "default"], help="glibc's thresholds, for all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")
    args.models = list(dict.fromkeys(["marian", *args.models]))
    torch.set_num_threads(args.threads)
    kept = args.allocator == "keep" and keep_freed_memory()
    shape = SHAPES[args.shape]
    if args.memory_of:
        step = training_step(make_model(args.memory_of, shape), shape, args)
        for _ in range(3):
            step()
        print(_peak_resident_gb())
        return 0
    steps = {name: training_step(make_model(name, shape), shape, args) for name in args.models}
    times = ratios(interleave(steps, rounds=args.rounds, device=args.device), "marian")
    memory = peak_memory(args) if args.device == "cpu" else {}
    is_judged = args.shape == "base" and args.device == "cpu" and args.dtype == "float32"
    misses = 0
    for name in args.models:
        speed, bar = 1 / times[name], BARS.get(name) if is_judged else None
        misses += bar is not None and speed < bar
        judged = "" if bar is None else f"  {'MISSED' if speed < bar else 'bar'} {bar}"
        print(f"{name:26} speed {speed:5.3f}  peak {memory.get(name, float('nan')):5.2f} GB{judged}")
    results: dict[str, Any] = {
        "setting": setting(args.device) | {"freed_memory_kept": kept, "dtype": args.dtype, "shape": args.shape},
        "speed": {name: 1 / ratio for name, ratio in times.items()},
        "peak_memory_gb": memory,
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 1 if misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
