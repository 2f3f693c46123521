"""The `sparseq` command: a thin shell around one module per sub-command.

A sub-command's module offers `add_parser(subparsers)`, which registers its arguments under its name, and
`run(args) -> int`, which does the work and returns the exit status. The module is imported only when its sub-command
is chosen, so that `sparseq --help` stays fast and a missing extra hurts nobody who does not need it.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import NamedTuple

from sparseq import __version__


class Command(NamedTuple):
    """A sub-command: where it lives, and the line that `sparseq --help` shows."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command("sparseq.demo", "train, score, translate, save and reload a small sparse model"),
    "train": Command("sparseq.training.train_command", "train a model from a recipe"),
    "pretrain": Command("sparseq.training.pretrain_command", "pre-train a model on plain text, to fine-tune it later"),
    "score": Command("sparseq.metrics.score_command", "score a trained model on a test set, alone or against another"),
    "compare": Command("sparseq.conversion.compare_command", "two models side by side: logits, BLEU, sizes, caches"),
    "translate": Command("sparseq.translation.translate_command", "translate standard input or files"),
    "average": Command("sparseq.training.average_command", "average the weights of several checkpoints"),
    "convert": Command(
        "sparseq.conversion.convert_command",
        "make a Sparseq model of a BART, Marian, mBART, M2M100 or Pegasus checkpoint",
    ),
    "export": Command("sparseq.conversion.export_command", "write a model for a runtime, or as one of those types"),
    "upcycle": Command("sparseq.conversion.upcycle_command", "give a dense model experts and grouped queries"),
    "densify": Command("sparseq.conversion.densify_command", "make a dense model of a sparse one"),
    "train-tokenizer": Command("sparseq.training.tokenizer_command", "train a tokenizer on text files or a dataset"),
    "card": Command("sparseq.hub.card_command", "write the model card of a folder or a repository anew"),
    "inspect": Command("sparseq.inspection.inspect_command", "what the experts of a trained model do"),
    "push": Command("sparseq.hub.push_command", "check a model's folder and upload it to the Hub"),
}

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "pyarrow": "train",
    "sacrebleu": "train",
    "peft": "peft",
    "evaluate": "eval",
    "rouge_score": "eval",
    "sentencepiece": "convert",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "ctranslate2": "ctranslate2",
}
"""Packages that only some users need, and the extra of ours that installs each."""

_DESCRIPTION = "Train, score and use Sparseq encoder-decoder models."

_EPILOG = """\
examples:
  sparseq demo                       see everything at work, in under 5 minutes on 2 CPU cores
  sparseq train --list               the recipes that come with sparseq
  sparseq train tiny-sparse data.folder=corpus data.source=en data.target=de --output outputs/tiny
                                     train on corpus/{train,val}.{en,de}
  sparseq pretrain pretrain-tiny text.folder=corpus text.languages=[en,de] --output outputs/pretrained
                                     learn from corpus/train.{en,de}, which need not be translations
  sparseq score outputs/tiny --data corpus --source en --target de
                                     BLEU and chrF of its translations of corpus/test.en
  sparseq compare outputs/dense outputs/upcycled --data corpus --source en --target de
                                     how far are their logits, perplexity, BLEU, sizes and caches apart?
  sparseq translate outputs/tiny < new.en > new.de
                                     fast, on ONNX Runtime where it is installed
  sparseq average outputs/tiny --last 5 --output outputs/average
                                     the mean of the weights of its last five checkpoints
  sparseq convert Helsinki-NLP/opus-mt-en-de models/en-de
                                     a Sparseq model of a checkpoint that others have trained
  sparseq export models/en-de exported --to onnx
                                     for ONNX Runtime; or --to ctranslate2, torch, or back, --to marian
  sparseq upcycle outputs/dense outputs/upcycled --experts 8 --kv-heads 2
                                     a mixture of experts with grouped queries, made of a dense model; train it further
  sparseq train-tokenizer train.en train.de --language de --output tokenizer
                                     one tokenizer for both languages, with the tag <2de>
  sparseq inspect experts outputs/tiny --data corpus --source en --target de
                                     load of each expert on corpus/test.{en,de}, and the tokens it takes
  sparseq push outputs/tiny someone/tiny --dry-run
                                     is it complete? what would be uploaded? without --dry-run: upload it
  sparseq card user/model --source en --target de --push
                                     put a model card in place of the draft that Trainer pushed
  sparseq COMMAND --help             the arguments of a command, with examples

An error of yours is reported in one line; --debug (or SPARSEQ_DEBUG=1) shows the full traceback.
"""

# What a shell reports for a command ended by a signal: 128 + its number.
_EXIT_INTERRUPTED = 128 + 2
_EXIT_BROKEN_PIPE = 128 + 13


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Runs the `sparseq` command.

    Args:
        argv: The arguments without the program's name; those of the process if None.
        commands: The sub-commands by name.

    Returns:
        The exit status: 0 for success, 2 for a mistake in the arguments or in what they name, 130 after Ctrl-C.

    Raises:
        SystemExit: From argparse: 0 after help or the version, 2 for arguments it cannot parse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("SPARSEQ_DEBUG", "0") not in ("", "0")
    try:
        status = _dispatch(arguments, commands)
        # A reader that has gone away must be noticed here: at the interpreter's exit it is too late to be quiet.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("sparseq: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        if debug or not _stdout_is_broken():
            raise
        # Python flushes stdout once more when it exits; that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except ImportError as error:
        message = _missing_extra(error)
        if debug or message is None:
            raise
        return _fail(message)
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _fail(_describe(error), hint="--debug shows where it was raised")


def _dispatch(arguments: list[str], commands: Mapping[str, Command]) -> int:
    # Options before the sub-command take no values, so the first word is the sub-command.
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in commands:
        matches = difflib.get_close_matches(name, commands, n=1)
        suggestion = f"did you mean '{matches[0]}'? " if matches else ""
        return _fail(f"unknown command '{name}'; {suggestion}`sparseq --help` lists the commands")

    parser, subparsers = _top_parser()
    if name is None:
        for other, command in commands.items():
            subparsers.add_parser(other, help=command.help)
        parser.parse_args(arguments)
        parser.print_help()
        return 0

    module = importlib.import_module(commands[name].module)
    module.add_parser(subparsers)
    # Also accepted behind the sub-command, unless that has an option of this name for itself.
    with contextlib.suppress(argparse.ArgumentError):
        subparsers.choices[name].add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    status: int = module.run(parser.parse_args(arguments))
    return status


def _top_parser() -> tuple[argparse.ArgumentParser, "argparse._SubParsersAction[argparse.ArgumentParser]"]:
    parser = argparse.ArgumentParser(
        prog="sparseq",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the full traceback of every error")
    return parser, parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")


def _version() -> str:
    """Our version, with those a bug report needs read from their metadata: nothing is imported for them."""
    others = ", ".join(f"{package} {metadata.version(package)}" for package in ("transformers", "torch"))
    return f"sparseq {__version__} ({others}, python {sys.version.split()[0]})"


def _missing_extra(error: ImportError) -> str | None:
    """A message that names the extra to install, or None where `error` is not about a package of an extra."""
    if error.name is not None:
        missing = error.name.partition(".")[0]
    else:
        # transformers raises a plain ImportError that names the package in its text.
        found = re.search(rf"\b({'|'.join(EXTRAS)})\b", str(error))
        missing = found[1] if found else ""
    if missing not in EXTRAS:
        return None
    install = f'pip install "sparseq[{EXTRAS[missing]}]"'
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs the package {missing}, which is not installed; install it with: {install}"
    return f"this command needs the package {missing}; install it with: {install} (the import said: {error})"


def _stdout_is_broken() -> bool:
    """Whether it is our own output that nobody reads any more; a pipe of a worker process is no reason to be quiet."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _fail(message: str, *, hint: str | None = None) -> int:
    print(f"sparseq: error: {message}", file=sys.stderr)
    if hint:
        print(f"sparseq: {hint}", file=sys.stderr)
    return 2
