"""`sparseq train`: train a model from a recipe."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseq.training.recipes import Recipe

_DESCRIPTION = """\
Train a sequence-to-sequence model from a recipe, a YAML file with the sections model, tokenizer, data, training,
decoding and scoring; start and lora, to go on from a trained model; hub, to push it. Trains the tokenizer, trains the
model on batches filled to a token budget, averages the last checkpoints, generates and scores outputs for the test
split, and writes a folder that AutoModelForSeq2SeqLM.from_pretrained loads.

An interrupted run continues from its last complete checkpoint when the same command is given again.
"""

_EPILOG = """\
examples:
  sparseq train --list
      the recipes that come with sparseq
  sparseq train tiny-sparse data.folder=corpus data.source=en data.target=de --dry-run
      check the recipe and the data, print sizes and schedule; train nothing
  sparseq train tiny-sparse data.folder=corpus data.source=en data.target=de data.test=test --output outputs/tiny
      train on corpus/train.en and corpus/train.de (or .gz), validate on corpus/val.*, score corpus/test.*
  sparseq train finetune start.checkpoint=outputs/tiny data.folder=... --output outputs/finetuned
      go on with all weights of a trained model; `lora` in place of `finetune` trains an adapter of it
  sparseq train tiny-sparse data.dataset=wmt/wmt16 data.dataset_config=de-en data.source=en data.target=de
      train on a dataset of the Hub; data.dataset may be a table or a saved dataset too
  sparseq train tiny-sparse data.folder=corpus "data.pairs=[en-de, en-fr, de-en]" data.test=test
      several language pairs in one run
  sparseq train summarization data.train_files=train.jsonl data.validation_files=val.jsonl data.test_files=test.jsonl
      documents and summaries, the columns "document" and "summary" of tables, scored by ROUGE
  sparseq train my-recipe.yaml training.max_steps=500 seed=2 --output outputs/trial
      a recipe of your own, with two values changed
  sparseq train tiny-sparse data.folder=... hub.repo=user/name hub.private=true
      pushed to the Hub at every save, and at the end; the token is that of HF_TOKEN or `hf auth login`
  accelerate launch --num_processes 2 scripts/train.py tiny-sparse data.folder=... --output outputs/tiny
      the same on several devices, from a clone

in the output folder: model.safetensors, config.json, tokenizer.json, generation_config.json, README.md (the card: the
folder is ready for `sparseq push`), results.json (scores, seconds, loss curve), manifest.json (versions, commit, seed,
hashes of the data, recipe), SPLIT.LANGUAGE.translated, checkpoints/ and cache/ (text and tokens; delete both when you
are done).
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="confidence intervals of the scores from N resamples"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that runs a recipe."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe (--list), or a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="right after RECIPE: change a value of it, such as training.max_steps=100",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="output folder (default: outputs/RECIPE)")
    parser.add_argument("--list", action="store_true", help="list the recipes that come with sparseq")
    parser.add_argument("--dry-run", action="store_true", help="check recipe and data, print sizes; train nothing")
    parser.add_argument(
        "--no-resume", action="store_true", help="start over, deleting the checkpoints of an earlier run in DIR"
    )


def read_recipe(args: argparse.Namespace, example: str) -> "Recipe | None":
    """The recipe that the arguments name, or None after listing them all.

    Raises:
        FileNotFoundError, ValueError: As `load_recipe`; or none is named.
    """
    from sparseq.training.recipes import list_recipes, load_recipe

    if args.list:
        for name, path in list_recipes().items():
            print(f"{name:24}{load_recipe(path).description}")
        return None
    if args.recipe is None:
        command = args.command
        raise ValueError(
            f"name a recipe, for instance `sparseq {command} {example}`; `sparseq {command} --list` shows them"
        )
    return load_recipe(args.recipe, args.overrides)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit status."""
    recipe = read_recipe(args, "tiny-sparse")
    if recipe is None:
        return 0
    if args.dry_run:
        from sparseq.training.summary import describe

        print(describe(recipe))
        return 0

    from accelerate import PartialState

    from sparseq.training.run import train

    output = args.output or Path("outputs") / recipe.name
    result = train(recipe, output, resume=not args.no_resume, bootstrap=args.bootstrap)
    # Every process of a distributed run gets here; one of them speaks.
    if PartialState().is_main_process:
        for name, pair in result.language_pairs.items():
            figures = ", ".join(text for text, _ in _figures(pair["scores"]))
            print(f"{name:12}{figures}, validation loss {pair['validation_loss']:.3f}")
        _report(result.scores, result.seconds, result.validation_loss)
        print(f"The model is in {output}.")
    return 0


def _report(scores: dict[str, Any], seconds: dict[str, float], validation_loss: float) -> None:
    for text, signature in _figures(scores):
        print(f"{text}  ({signature})")
    print(f"validation loss {validation_loss:.3f}")
    print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))


def _figures(scores: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of each metric, with intervals if there are any, and the metric's signature."""
    from sparseq.training.sections import METRIC_FIGURES

    for metric, labels in METRIC_FIGURES.items():
        if f"{metric}_signature" in scores:
            intervals = {name: f" +- {scores[f'{name}_ci']:.2f}" if f"{name}_ci" in scores else "" for name in labels}
            texts = [f"{label} {scores[name]:.2f}{intervals[name]}" for name, label in labels.items()]
            yield ", ".join(texts), scores[f"{metric}_signature"]
