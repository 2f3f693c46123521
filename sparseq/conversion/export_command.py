"""`sparseq export`: a Sparseq model for other programs, as one of the library's architectures or for a runtime."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparseq.conversion.command import (
    add_dtype_argument,
    add_output_arguments,
    experts_argument,
    option_of,
    recorded_command,
)

# What they bring in takes a moment, and `sparseq --help` needs none of it.
if TYPE_CHECKING:
    from sparseq.conversion.exporting import Checkpoint, Export

_EPILOG = """\
targets:
{targets}

examples:
  sparseq export models/en-de exported --to marian
      a model that was converted, and perhaps trained further, back as a MarianMT of the library
  sparseq export outputs/dense exported --to ctranslate2 --quantization int8
      for CTranslate2, with weights of 8 bits
  sparseq export outputs/sparse exported --to ctranslate2 --merge-experts mean
      likewise, each mixture of experts made one layer, which changes what the model computes
  sparseq export outputs/sparse exported --to onnx --precision int8
      encoder, prefill and decode step as graphs for ONNX Runtime, experts included
  sparseq export outputs/sparse exported --to torch
      encoder and decoder as programs of torch.export, experts included
  sparseq export outputs/dense exported --to marian --dry-run
      does a model that was trained here fit? what would become of every tensor?

The targets of the library have no experts, and the model must be built as they are; what was converted and is exported
again has the same weights, bit by bit. A folder for a runtime has the tokenizer, and a README.md that says how to run
it. docs/export.md has more.
"""
# As `ctranslate2.specs.model_spec.ACCEPTED_MODEL_TYPES`, which takes a moment to import.
_QUANTIZATIONS = (
    *("int8", "int8_float32", "int8_float16", "int8_bfloat16"),
    *("int16", "float16", "bfloat16", "float32"),
)


@dataclass(frozen=True)
class Target:
    """What a model can be exported to.

    Attributes:
        title: What it is, for `--help`.
        prepare: Checks a model and says what would be written.
        options: The options of the command that are for this target, by their attributes.
    """

    title: str
    prepare: "Callable[[Checkpoint, argparse.Namespace], Export]"
    options: tuple[str, ...]


def _library(checkpoint: "Checkpoint", args: argparse.Namespace) -> "Export":
    from sparseq.conversion.library_export import LibraryExport

    return LibraryExport.prepared(checkpoint, to=args.to, dtype=args.dtype, max_shard_size=args.max_shard_size)


def _ctranslate2(checkpoint: "Checkpoint", args: argparse.Namespace) -> "Export":
    from sparseq.conversion.ctranslate2_export import CTranslate2Export

    return CTranslate2Export.prepared(
        checkpoint, quantization=args.quantization, merge_experts=args.merge_experts, positions=args.positions
    )


def _torch(checkpoint: "Checkpoint", args: argparse.Namespace) -> "Export":
    from sparseq.conversion.torch_export import TorchExport

    return TorchExport.prepared(checkpoint, dtype=args.dtype)


def _onnx(checkpoint: "Checkpoint", args: argparse.Namespace) -> "Export":
    from sparseq.conversion.onnx_export import OnnxExport

    return OnnxExport.prepared(checkpoint, precision=args.precision or "float32")


_OF_LIBRARY = ("dtype", "max_shard_size")
TARGETS: dict[str, Target] = {
    "bart": Target("BART of the library", _library, _OF_LIBRARY),
    "marian": Target("MarianMT of the library", _library, _OF_LIBRARY),
    "mbart": Target("mBART of the library", _library, _OF_LIBRARY),
    "pegasus": Target("Pegasus of the library", _library, _OF_LIBRARY),
    "m2m_100": Target("M2M100 of the library", _library, _OF_LIBRARY),
    "ctranslate2": Target(
        "for ctranslate2.Translator; dense models", _ctranslate2, ("quantization", "merge_experts", "positions")
    ),
    "onnx": Target("graphs for ONNX Runtime", _onnx, ("precision",)),
    "torch": Target("programs of torch.export", _torch, ("dtype",)),
}
"""The targets by the names that `--to` takes: model types of the library, and runtimes."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for a runtime, or as a BART, Marian, ... of the library",
        description="Write a Sparseq model for other programs: as one of the library's own architectures, or for a\n"
        "runtime. Neither needs code of ours to load it.",
        epilog=_EPILOG.format(targets="\n".join(_lines())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a Sparseq model")
    parser.add_argument("--to", required=True, metavar="TARGET", help=f"what for: {', '.join(TARGETS)}")
    add_output_arguments(parser)
    # Whether it was given matters, since not every target takes it.
    parser.set_defaults(max_shard_size=None)
    add_dtype_argument(parser)
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        help="what weights of linear layers, experts and embeddings are stored as (default: float32)",
    )
    parser.add_argument(
        "--quantization",
        choices=_QUANTIZATIONS,
        metavar="TYPE",
        help=f"what weights are stored as: {', '.join(_QUANTIZATIONS)} (default: their type)",
    )
    parser.add_argument(
        "--merge-experts",
        type=experts_argument,
        metavar="mean|INDEX[,INDEX...]",
        help="make a sparse model dense first, as `sparseq densify --experts` does",
    )
    parser.add_argument(
        "--positions",
        type=_count,
        metavar="N",
        help="length of the longest source or target, where the model sets no limit but the target needs one",
    )


def run(args: argparse.Namespace) -> int:
    """Export and report; returns the exit status."""
    target = _target(args)
    from sparseq.conversion.exporting import Checkpoint
    from sparseq.conversion.license import carry_license, origin_facts
    from sparseq.conversion.plan import write_record
    from sparseq.conversion.tokenizers import carry_tokenizer, has_tokenizer
    from sparseq.model_folder import check_new_folder, new_folder

    check_new_folder(args.output, force=args.force, keep=[args.checkpoint])
    export = target.prepare(Checkpoint.open(args.checkpoint), args)
    if args.dry_run:
        print("\n".join(export.report()))
        return 0
    with new_folder(args.output, force=args.force) as partial:
        export.write_settings(partial)
        if has_tokenizer(args.checkpoint):
            carry_tokenizer(args.checkpoint, partial)
        origin = origin_facts(str(args.checkpoint), args.checkpoint)
        carry_license(origin, args.checkpoint, partial, text=export.readme)
        export.write_weights(partial)
        command = recorded_command("export", args.checkpoint, _options(args, target))
        write_record(partial, command=command, facts={**origin, **export.account()})
    print("\n".join(export.report()))
    print(f"The model is in {args.output}.")
    return 0


def _target(args: argparse.Namespace) -> Target:
    """The target that is asked for.

    Raises:
        ValueError: There is no such target, or an option is given that is for others.
    """
    if args.to not in TARGETS:
        raise ValueError(f'There is no export to "{args.to}"; there is one to {", ".join(TARGETS)}.')
    target = TARGETS[args.to]
    for name in dict.fromkeys(name for other in TARGETS.values() for name in other.options):
        if name not in target.options and getattr(args, name) is not None:
            takers = [key for key, other in TARGETS.items() if name in other.options]
            raise ValueError(f"{option_of(name)} is for {', '.join(takers)}; it has no effect with --to {args.to}.")
    return target


def _options(args: argparse.Namespace, target: Target) -> dict[str, str | int | None]:
    """The options that matter for what is made; how it is cut into files does not."""
    return {name: getattr(args, name) for name in ("to", *target.options) if name != "max_shard_size"}


def _lines() -> list[str]:
    """The targets for `--help`, those that take the same options together."""
    lines = []
    for key, target in TARGETS.items():
        options = " ".join(option_of(name) for name in target.options)
        lines.append(f"  {key:<12} {target.title:<44} {options}".rstrip())
    return lines


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, but is {text!r}")
    return int(text)
