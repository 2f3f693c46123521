"""What the commands that write a converted model have in common: their arguments, and what they record."""

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Register what is written, and how."""
    parser.add_argument("output", type=Path, metavar="OUT", help="where to write the model")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: 5GB)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")
    parser.add_argument("--force", action="store_true", help="replace a model's folder that is there already")


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Register what says how exact the written weights are."""
    parser.add_argument("--dtype", choices=DTYPES, help="data type of the weights (default: that of the source)")


def experts_argument(text: str) -> str:
    """The value of an option that says what becomes of experts: "mean", or the numbers of those that are kept."""
    if text != "mean" and not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be mean, or numbers of experts such as 3 or 0,3, but is {text!r}")
    return text


def kept_experts(text: str) -> tuple[int, ...] | None:
    """The experts that such a value names; None for the mean of all."""
    return None if text == "mean" else tuple(map(int, text.split(",")))


def option_of(name: str) -> str:
    """The option that an attribute of the parsed arguments comes from."""
    return f"--{name.replace('_', '-')}"


def recorded_command(command: str, model: str | Path, options: Mapping[str, Any]) -> str:
    """The command line that makes a model again, for its record; a shell takes it as it is.

    Args:
        command: Name of the sub-command.
        model: What it reads.
        options: The options that matter for what is made, by the names of their attributes; those that are None were
            not given.
    """
    given = [(option_of(name), str(value)) for name, value in options.items() if value is not None]
    return shlex.join(["sparseq", command, str(model), *(word for pair in given for word in pair)])


def _size(text: str) -> str:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"must be a size above 0 in KB, MB, GB or TB, such as 500MB, but is {text!r}")
    return text
