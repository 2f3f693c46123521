"""`sparseq densify`: a dense model made of a mixture-of-experts one."""

import argparse

from sparseq.conversion.changed_folder import add_folder_arguments, change_folder
from sparseq.conversion.command import experts_argument, kept_experts, recorded_command

_EPILOG = """\
examples:
  sparseq densify outputs/sparse outputs/dense --experts mean
      each mixture becomes one dense layer, with the mean of its experts' weights
  sparseq densify outputs/sparse outputs/dense --experts 3
      expert 3 of every sparse layer; `sparseq inspect experts` says what each one does
  sparseq densify outputs/sparse outputs/dense --experts 0,3 --dry-run
      experts 0 and 3 side by side: twice the width, and the mean of what the two compute

Shared experts stay, beside what becomes of the others. Of experts that are copies of one layer, as `sparseq upcycle`
makes them, the mean and each single one are that layer, bit by bit. Trained experts differ, and a dense layer without
a router computes something else than they did: the report ends with how far logits moved. Train on.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "densify",
        help="make a dense model of a sparse one: merge its experts, or keep some",
        description="Write a dense Sparseq model in which each mixture of experts has become one feed-forward layer:\n"
        "the mean of its experts, or some of them. Everything else is copied.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_folder_arguments(parser)
    parser.add_argument(
        "--experts",
        type=experts_argument,
        required=True,
        metavar="mean|INDEX[,INDEX...]",
        help="the mean of all experts' weights, or the experts to keep, counted from 0, the same in every layer",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the weights of units that fill up layers where a stack needs one width (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, write, measure and report; returns the exit status."""
    from sparseq.conversion.merged_experts import MergedExperts

    merged = MergedExperts(experts=kept_experts(args.experts), seed=args.seed)
    options = {name: getattr(args, name) for name in ("revision", "experts", "seed")}
    change_folder(args, [merged], recorded_command("densify", args.checkpoint, options))
    return 0
