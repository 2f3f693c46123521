"""Real target tokens per second of training: batches by tokens beside stock Seq2SeqTrainer.

    python benchmarks/token_batches.py multi30k --source en --target de       # about 10 minutes on one core
    python benchmarks/token_batches.py                                        # on the demo's generated corpus
    python benchmarks/token_batches.py multi30k --source en --target de --rounds 40 --json token_batches.json

DATA is a folder with train.{source,target}[.gz]. Each system trains the same model on the same pairs in the loop of
its own Trainer; after some updates it waits while the others make theirs, so that all see the same machine:

  stock     Seq2SeqTrainer, 64 pairs a batch, random order, DataCollatorForSeq2Seq
  grouped   the same with train_sampling_strategy="group_by_length", which knows the sources' lengths only
  sparseq   SparseqTrainer with a budget of 4,096 source and target tokens, padding included

The figures are medians over rounds of each system's real target tokens per CPU second (per second on a GPU), as ratios
to "stock"; and the padding of both sides. All run with the allocator settings of `sparseq train`; --allocator default
shows what they are worth. Exits with status 1 where a bar is missed on the CPU.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from interleave import setting  # type: ignore[import-not-found]  # it lies beside this script
from tqdm import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from sparseq.data.batching import padding_share
from sparseq.data.collation import PairCollator, TokenizedPairs, tokenize_pairs
from sparseq.data.grammar import generate_corpus, write_corpus
from sparseq.data.parallel import ParallelText, read_parallel
from sparseq.training.allocator import keep_freed_memory
from sparseq.training.recipes import load_recipe
from sparseq.training.tokenizer import train_tokenizer
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments

BATCH, BUDGET, VOCABULARY, MAX_LENGTH = 64, 4096, 6000, 100
# Of the real target tokens per second of "stock", and of all tokens of both sides.
SPEED_BAR, PADDING_BAR = 1.6, 0.06
SYSTEMS = ("stock", "grouped", "sparseq")


class Turns(TrainerCallback):
    """
    Lets several Trainers, each in a thread of its own, train in turns of `updates` updates, and times their turns.

    A turn goes from the end of one update to the end of another, so that fetching and collating batches counts.
    """

    def __init__(self, name: str, baton: threading.Condition, state: dict[str, Any], updates: int, is_cuda: bool):
        self.name, self.baton, self.shared, self.updates, self.is_cuda = name, baton, state, updates, is_cuda
        self.tokens = 0
        self.turns: list[tuple[float, int]] = []
        self._start = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end of a turn note it, and wait for the next."""
        if state.global_step % self.updates:
            return
        self.turns.append((self._now() - self._start, self.tokens))
        if len(self.turns) > self.shared["rounds"]:
            control.should_training_stop = True
        self.pass_on()
        if not control.should_training_stop:
            self._wait()

    def pass_on(self) -> None:
        """Let the next system of this round go on, or begin a round in another order."""
        with self.baton:
            queue = self.shared["queue"]
            queue.pop(0)
            if not queue:
                queue += self.shared["random"].sample(SYSTEMS, len(SYSTEMS))
                self.shared["bar"].update()
            self.baton.notify_all()

    def _wait(self) -> None:
        with self.baton:
            self.baton.wait_for(lambda: self.shared["queue"][0] == self.name)
        self.tokens = 0
        self._start = self._now()

    def _now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def make_trainer(
    name: str, model: PreTrainedModel, pairs: TokenizedPairs, tokenizer: Any, args: argparse.Namespace, folder: str
) -> Seq2SeqTrainer:
    """The Trainer of a system; only what belongs to its batches differs."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": args.updates * (args.rounds + 2),
        "learning_rate": 1e-3,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bfloat16",
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    data: dict[str, Any] = {"model": model, "train_dataset": pairs, "processing_class": tokenizer}
    if name == "sparseq":
        ours = SparseqTrainingArguments(**common, tokens_per_batch=BUDGET, budget_counts="source+target")
        return SparseqTrainer(args=ours, data_collator=PairCollator(tokenizer.pad_token_id), **data)
    strategy = "group_by_length" if name == "grouped" else "random"
    stock = Seq2SeqTrainingArguments(**common, per_device_train_batch_size=BATCH, train_sampling_strategy=strategy)
    return Seq2SeqTrainer(args=stock, data_collator=DataCollatorForSeq2Seq(tokenizer, model=model), **data)


def measure(args: argparse.Namespace, pairs: TokenizedPairs, tokenizer: Any) -> dict[str, list[tuple[float, int]]]:
    """Seconds and real target tokens of each turn of each system."""
    baton = threading.Condition()
    shared: dict[str, Any] = {"rounds": args.rounds, "random": random.Random(0), "queue": list(SYSTEMS)}
    systems: dict[str, tuple[Turns, threading.Thread]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.rounds + 1, desc="rounds", file=sys.stderr) as bar:
        shared["bar"] = bar
        for name in SYSTEMS:
            torch.manual_seed(0)
            config = load_recipe("multi30k", args.overrides).model_config(len(tokenizer))
            model = AutoModelForSeq2SeqLM.from_config(config)
            trainer = make_trainer(name, model, pairs, tokenizer, args, f"{folder}/{name}")
            turns = Turns(name, baton, shared, args.updates, args.device != "cpu")
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(turns)
            _count_tokens(trainer, turns)
            systems[name] = turns, threading.Thread(target=_train, args=(trainer, args.threads, failures), daemon=True)
        for _, thread in systems.values():
            thread.start()
        for _, thread in systems.values():
            while thread.is_alive() and not failures:
                thread.join(1.0)
        if failures:
            raise RuntimeError(failures[0])
    # The first turn warms up.
    return {name: turns.turns[1:] for name, (turns, _) in systems.items()}


def _train(trainer: Seq2SeqTrainer, threads: int, failures: list[str]) -> None:
    # A setting of each thread.
    torch.set_num_threads(threads)
    try:
        trainer.train()
    except Exception as error:
        failures.append(repr(error))
        raise


def _count_tokens(trainer: Seq2SeqTrainer, turns: Turns) -> None:
    """Count the labels of what the Trainer trains on, in the turn in which it does."""
    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        turns.tokens += int(inputs["labels"].ne(-100).sum())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]


def padding(trainer: Seq2SeqTrainer, pairs: TokenizedPairs) -> float:
    """Padding among all tokens of both sides in one epoch."""
    dataloader = trainer.get_train_dataloader()
    sampler = dataloader.batch_sampler
    return padding_share(list(sampler), pairs.source_lengths, pairs.target_lengths)  # type: ignore[arg-type]


def main() -> int:
    """Measure, print and judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="folder with train.{source,target}[.gz]")
    parser.add_argument("--source", default="en", help="language to translate from (default: %(default)s)")
    parser.add_argument("--target", default="de", help="language to translate into (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each system (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=5, help="updates of a turn (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--allocator", default="keep", choices=["keep", "default"], help="glibc's thresholds, for all")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="model.KEY=VALUE", help="of the recipe multi30k")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    for name in ("rounds", "updates", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    kept = args.allocator == "keep" and keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        text = _read(args, Path(folder))
    tokenizer = train_tokenizer([*text.sources, *text.targets], vocab_size=VOCABULARY, language_tags=[args.target])
    pairs, _ = tokenize_pairs(tokenizer, text, max_length=MAX_LENGTH)

    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForSeq2SeqLM.from_config(load_recipe("tiny-dense").model_config(len(tokenizer)))
        for name in SYSTEMS:
            shares[name] = padding(make_trainer(name, model, pairs, tokenizer, args, folder), pairs)
    turns = measure(args, pairs, tokenizer)
    rates = {name: statistics.median(tokens / seconds for seconds, tokens in turns[name]) for name in SYSTEMS}
    ratios = {name: rate / rates["stock"] for name, rate in rates.items()}

    misses = 0
    print("                padding   target tokens per second, stock = 1")
    for name in SYSTEMS:
        print(f"{name:14} {shares[name]:8.1%}   {ratios[name]:6.2f}")
    if args.device == "cpu" and args.data is not None:
        misses = (ratios["sparseq"] < SPEED_BAR) + (shares["sparseq"] > PADDING_BAR)
        print(f"bars: {SPEED_BAR} and {PADDING_BAR:.0%}: {'MISSED' if misses else 'met'}")
    if args.json:
        shared = setting(args.device) | {"freed_memory_kept": kept, "dtype": args.dtype, "pairs": len(pairs)}
        result = {"setting": shared, "padding": shares, "ratios": ratios, "turns": turns}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if misses else 0


def _read(args: argparse.Namespace, folder: Path) -> ParallelText:
    if args.data is None:
        write_corpus(generate_corpus(train_size=20_000, validation_size=1, test_size=10), folder)
    return read_parallel(args.data or folder, "train", args.source, args.target)


if __name__ == "__main__":
    raise SystemExit(main())
