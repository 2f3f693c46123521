"""Dense and sparse models, and each way to balance experts, on real text with the same updates and active parameters.

    python benchmarks/balancing.py run multi30k runs                     # 30 minutes an arm on one core
    python benchmarks/balancing.py run multi30k runs --arms loss-free sequence --seeds 2 3
    python benchmarks/balancing.py report runs --json balancing.json     # tables, also of unfinished sets of runs
    python benchmarks/balancing.py speed runs                            # target tokens per second, interleaved

DATA is a folder with train, val and test_2016_flickr as {split}.{en,de}[.gz]; the captions are the public
multi30k/dataset repository's. A run that was stopped goes on from its last checkpoint, and one that is finished is not
run again, so the command may be repeated until all is done. Several may work on different arms at once.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # it lies beside this script
from transformers import AutoModelForSeq2SeqLM

from sparseq.data.parallel import read_parallel
from sparseq.metrics.corpus import Bleu, Chrf
from sparseq.metrics.scoring import paired_differences, score_predictions
from sparseq.training.allocator import keep_freed_memory
from sparseq.training.recipes import load_recipe
from sparseq.training.run import train

# Sparse arms have 8 experts of width 128 in every second layer, of which each token gets two: as many active
# parameters as the dense layers of width 256. "dense-total" spends all 3.3 million parameters on every token.
ARMS: dict[str, list[str]] = {
    "dense": ["model.num_experts=0"],
    "dense-total": ["model.num_experts=0", "model.encoder_ffn_dim=640", "model.decoder_ffn_dim=640"],
    "sequence": ["model.router_balancing=aux_loss", "model.router_balancing_scope=sequence"],
    "batch": ["model.router_balancing=aux_loss", "model.router_balancing_scope=batch"],
    "loss-free": ["model.router_balancing=loss_free", "model.router_scoring=sigmoid"],
    "none": ["model.router_balancing=none"],
}
SHARED = ["training.max_steps=1500", "training.eval_steps=150", "training.save_steps=50", "model.dropout=0.1"]
BASE, TEST = "dense", "test_2016_flickr"


def run(args: argparse.Namespace) -> None:
    """Train, translate and score every arm with every seed that is not finished yet."""
    for seed in args.seeds:
        for arm in args.arms:
            folder = args.output / f"{arm}-{seed}"
            if (folder / "results.json").is_file():
                print(f"{folder} is finished")
                continue
            print(f"{folder}: {' '.join(ARMS[arm])}", flush=True)
            changes = [*SHARED, *ARMS[arm], f"data.folder={args.data}", f"seed={seed}"]
            train(load_recipe("multi30k", changes), folder, bootstrap=1000)


def report(args: argparse.Namespace) -> None:
    """Print what the finished runs gave, and how each compares with the dense one of the same seed."""
    runs = {path.parent.name: json.loads(path.read_text("utf-8")) for path in args.output.glob("*/results.json")}
    rows = []
    for name in sorted(runs, key=lambda name: (list(ARMS).index(name.rpartition("-")[0]), name)):
        arm, _, seed = name.rpartition("-")
        result, scores = runs[name], runs[name]["scores"]
        # The last one is that of the averaged weights, the model that is saved and scored.
        trace = [(e["step"], e["eval_router/max_vio"], e["eval_router/dead_experts"]) for e in _sparse(result["log"])]
        base = args.output / f"{BASE}-{seed}"
        rows.append(
            {
                "arm": arm,
                "seed": int(seed),
                "parameters": result["parameters"],
                "active_parameters": result["active_parameters"],
                **{key: scores[key] for key in ("bleu", "bleu_ci", "chrf", "chrf_ci")},
                "validation_loss": result["validation_loss"],
                "max_vio": trace[-1][1] if trace else None,
                "dead_experts": trace[-1][2] if trace else None,
                "max_vio_over_time": {step: round(value, 3) for step, value, _ in trace},
                "versus_dense": _paired(args.output / name, base) if (base / "results.json").is_file() else None,
            }
        )
    print("arm          seed  total/active (M)   BLEU          chrF          val loss  MaxVio  dead  p against dense")
    for row in rows:
        sparse = (
            (f"{row['max_vio']:6.3f}", f"{row['dead_experts']:4.0f}")
            if row["max_vio"] is not None
            else (" " * 6, " " * 4)
        )
        versus = row["versus_dense"]
        print(
            f"{row['arm']:12} {row['seed']:4}  "
            f"{row['parameters'] / 1e6:6.2f} / {row['active_parameters'] / 1e6:5.2f}    "
            f"{row['bleu']:5.2f} ± {row['bleu_ci']:4.2f}  {row['chrf']:5.2f} ± {row['chrf_ci']:4.2f}  "
            f"{row['validation_loss']:8.4f}  {sparse[0]}  {sparse[1]}  "
            + (f"BLEU {versus['bleu']:.3f}, chrF {versus['chrf']:.3f}" if versus else "")
        )
    for row in rows:
        if row["max_vio_over_time"]:
            values = "  ".join(f"{step}: {value:.2f}" for step, value in row["max_vio_over_time"].items())
            print(f"MaxVio, {row['arm']} {row['seed']}: {values}")
    if args.json:
        args.json.write_text(json.dumps({"setting": setting(), "runs": rows}, indent=2) + "\n", "utf-8")


def speed(args: argparse.Namespace) -> None:
    """Time training steps of the arms on one batch, in turn, and print each one's tokens per second."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if missing := [arm for arm in args.arms if not (args.output / f"{arm}-1" / "config.json").is_file()]:
        raise SystemExit(
            f"{args.output} holds no finished run with seed 1 of {', '.join(missing)}: use `run` first, or --arms"
        )
    steps = {arm: _training_step(args.output / f"{arm}-1") for arm in args.arms}
    seconds = interleave({arm: step for arm, (step, _) in steps.items()}, rounds=args.rounds)
    for arm, ratio in ratios(seconds, args.arms[0]).items():
        tokens = steps[arm][1] / statistics.median(seconds[arm])
        print(f"{arm:12} {tokens:8,.0f} target tokens per CPU second   {1 / ratio:5.3f} of {args.arms[0]}")


def _sparse(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log if "eval_router/max_vio" in entry]


def _paired(folder: Path, base: Path) -> dict[str, float] | None:
    """p-values of a paired bootstrap test (Koehn 2004) against the translations in `base`."""
    if folder == base:
        return None
    data = json.loads((folder / "manifest.json").read_text("utf-8"))["recipe"]["data"]
    references = read_parallel(data["folder"], TEST, "en", "de").targets
    system, baseline = (
        score_predictions(
            (run / f"{TEST}.de.translated").read_text("utf-8").splitlines(),
            references,
            [Bleu(), Chrf()],
            bootstrap=1000,
        )
        for run in (folder, base)
    )
    return {figure: test.p_value for figure, test in paired_differences(system, baseline).items()}


def _training_step(folder: Path) -> tuple[Callable[[], None], int]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    # A batch as the recipe makes them: 4,096 target tokens, little padding.
    size = (273, 15)
    inputs, labels = (torch.randint(5, model.config.vocab_size, size, generator=generator) for _ in range(2))

    def step() -> None:
        model(input_ids=inputs, labels=labels, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.config.num_experts and model.config.router_balancing == "loss_free":
            model.update_router_bias()

    return step, labels.numel()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    part = commands.add_parser("run", help="train the arms, or go on")
    part.set_defaults(function=run)
    part.add_argument("data", type=Path, metavar="DATA", help="folder of the captions")
    part.add_argument("output", type=Path, metavar="RUNS", help="folder for the runs, one in each folder ARM-SEED")
    part.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    part.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="default: 1")
    part = commands.add_parser("report", help="print tables of what is finished")
    part.set_defaults(function=report)
    part.add_argument("output", type=Path, metavar="RUNS")
    part.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    part = commands.add_parser("speed", help="time training steps of the finished arms side by side")
    part.set_defaults(function=speed)
    part.add_argument("output", type=Path, metavar="RUNS")
    part.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all; the first is the base"
    )
    part.add_argument("--rounds", type=int, default=15)
    part.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
