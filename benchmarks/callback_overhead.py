"""Measures what SparseqCallback adds to a training step, as a ratio of the step without it.

A model of the sizes of the recipe "multi30k" with experts in every layer makes the same steps (forward, backward and
AdamW) with the callback's hooks attached and detached, alternating in one process; the ratio is the median over pairs
of CPU times. A step has about 800 target tokens, a fifth of the recipe's, so that a minute gives enough pairs; what
the callback costs regardless of the batch weighs the more. Logging is counted at every 20th step, as in the recipe.

    python benchmarks/callback_overhead.py
    python benchmarks/callback_overhead.py --rounds 200 --balancing loss_free --json callback_overhead.json
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from interleave import setting  # type: ignore[import-not-found]  # it lies beside this script
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, TrainerControl, TrainerState, TrainingArguments

from sparseq.training.allocator import keep_freed_memory
from sparseq.training.callback import SparseqCallback
from sparseq.training.recipes import load_recipe

BAR = 1.01
LOGGING_STEPS = 20
SENTENCES = 64
VOCABULARY = 6000


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    """Random sentences of about the length of image captions."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 17, (SENTENCES, 2), generator=generator)
    is_real = torch.arange(16)[None, None] < lengths.T[..., None]
    ids = torch.randint(4, VOCABULARY, is_real.shape, generator=generator)
    return {"input_ids": ids[0].masked_fill(~is_real[0], 0), "labels": ids[1].masked_fill(~is_real[1], -100)}


class Steps:
    """Training steps of one model, with or without the callback."""

    def __init__(self, balancing: str, folder: str):
        overrides = ["encoder_sparse_step=1", "decoder_sparse_step=1", f"router_balancing={balancing}"]
        recipe = load_recipe("multi30k", [f"model.{override}" for override in overrides])
        torch.manual_seed(0)
        self.model = AutoModelForSeq2SeqLM.from_config(recipe.model_config(VOCABULARY)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.callback = SparseqCallback()
        self.trainer = (TrainingArguments(folder, use_cpu=True), TrainerState(), TrainerControl())

    def cpu_seconds(self, batch: dict[str, torch.Tensor], *, attached: bool) -> float:
        """CPU seconds of one step."""
        self.callback.on_train_begin(*self.trainer, model=self.model)
        if not attached:
            self.callback.detach()
        num_items = batch["labels"].ne(-100).sum()
        start = time.process_time()
        self.model(**batch, num_items_in_batch=num_items, skip_logits=True).loss.backward()
        self.optimizer.step()
        # Moving the biases is part of loss-free training, not of measuring it.
        self.callback.on_optimizer_step(*self.trainer)
        self.optimizer.zero_grad()
        seconds = time.process_time() - start
        if attached:
            start = time.process_time()
            self.callback.on_log(*self.trainer, {"loss": 0.0})
            seconds += (time.process_time() - start) / LOGGING_STEPS
            self.callback.detach()
        return seconds


def measure(balancing: str, rounds: int) -> dict[bool, list[float]]:
    """CPU seconds of every round, attached and detached; the first two rounds warm up and are not counted."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(balancing, folder)
        steps.callback.on_train_begin(*steps.trainer, model=steps.model)
        steps.callback.detach()
        for index in tqdm(range(rounds + 2), desc=balancing, file=sys.stderr):
            batch = make_batch(index)
            # Alternating who goes first cancels what one step leaves behind for the next.
            for attached in (True, False) if index % 2 else (False, True):
                elapsed = steps.cpu_seconds(batch, attached=attached)
                if index > 1:
                    seconds[attached].append(elapsed)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=80, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--balancing", choices=("aux_loss", "loss_free", "none"), default="aux_loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")
    torch.set_num_threads(1)
    keep_freed_memory()

    seconds = measure(args.balancing, args.rounds)
    # Of pairs, since neighbours see the same load on the machine.
    ratio = median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    if args.json:
        names = {"attached": seconds[True], "detached": seconds[False]}
        result = {"setting": setting(), "balancing": args.balancing, "seconds": names, "ratio": ratio}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for name, values in (("with", seconds[True]), ("without", seconds[False])):
        print(f"{median(values):8.4f} s  step {name} the callback (median of {args.rounds}, one thread)")
    print(f"{ratio:8.4f}    ratio, {args.balancing}; at most {BAR}: {'yes' if ratio <= BAR else 'NO'}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
