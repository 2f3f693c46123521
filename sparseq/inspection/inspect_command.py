"""`sparseq inspect experts`: what the experts of a trained model do on text."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseq.inspection.examples import DataOptions, Group
    from sparseq.inspection.routing import Stack

_DESCRIPTION = """\
Route text through a trained sparse model and show what its experts do: the load of each expert, MaxVio, router
entropy, dead experts, and the tokens that each expert takes most. Several --data, or --by COLUMN, are shown side by
side, which is how languages or domains compare. Writes experts.json, experts.html (one file, opens in any browser) and
experts.png.

--data may be
  a table       .jsonl, .json, .csv, .tsv (each also .gz) or .parquet, with columns for source and target
  plain text    one sentence a line (also .gz); --target FILE holds the translation of each line
  a folder      with SPLIT.LANGUAGE[.gz], as for `sparseq score`: --source en --target de --split test
Without targets only the encoder is shown, because the decoder needs them.
"""

_EPILOG = """\
examples:
  sparseq inspect experts outputs/tiny --data corpus --source en --target de --split test
      the pairs corpus/test.{en,de} (or .gz)
  sparseq inspect experts outputs/tiny --data test.en --target test.de
      two aligned files, named one by one
  sparseq inspect experts outputs/tiny --data test.jsonl --source-column text --target-column summary --by domain
      a table, split by the values of its column "domain"
  sparseq inspect experts outputs/many --data news.jsonl --source-column translation.en \\
      --target-column translation.de --tag de
      {"translation": {"en": ..., "de": ...}}, with the tag <2de> before each source
  sparseq inspect experts outputs/many --data corpus --source en --target de --data corpus --target fr
      two languages compared; an option given once holds for every --data, else give it for each, in the same order
  sparseq inspect experts outputs/tiny --data test.en --max-examples 0 --output report
      the encoder alone, on the whole file
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    inspect = subparsers.add_parser(
        "inspect",
        help="what the experts of a trained model do",
        description="Look into a trained model.",
        epilog="`sparseq inspect experts --help` has examples.",
        allow_abbrev=False,
    )
    subjects = inspect.add_subparsers(title="what to look at", metavar="SUBJECT", dest="subject", required=True)
    parser = subjects.add_parser(
        "experts",
        help="load of each expert, dead experts, and the tokens that each expert takes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a model with its tokenizer")
    parser.add_argument(
        "--data", type=Path, required=True, action="append", metavar="PATH", help="text to route; may be repeated"
    )
    text = parser.add_argument_group("what is in the data")
    text.add_argument("--source", action="append", metavar="LANG", help="folder: source language")
    text.add_argument(
        "--target", action="append", metavar="LANG|FILE", help="folder: target language; plain text: the other file"
    )
    text.add_argument("--split", action="append", metavar="NAME", help="folder: split (default: test)")
    text.add_argument("--source-column", metavar="NAME", help='table: source texts (default: "source")')
    text.add_argument(
        "--target-column", metavar="NAME", help='table: target texts (default: "target" if there is such a column)'
    )
    text.add_argument("--by", metavar="COLUMN", help="table: one group for each value of this column")
    text.add_argument(
        "--tag",
        action="append",
        metavar="LANG",
        help="put the tag of this target language before each source (default: that of --target, where there is one)",
    )
    text.add_argument("--tag-column", metavar="NAME", help="table: target language of each row, to take its tag")
    parser.add_argument(
        "--max-examples", type=int, default=1000, metavar="N", help="examples of each group, 0 = all (default: 1000)"
    )
    parser.add_argument("--stack", choices=("encoder", "decoder"), help="show one stack only")
    parser.add_argument("--top-tokens", type=int, default=10, metavar="N", help="tokens for each expert (default: 10)")
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, metavar="N", help="tokens of a batch, both sides (default: 2048)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: CHECKPOINT/inspection; ./inspection for a Hub id"
    )
    # `sparseq` takes it behind its own sub-commands only.
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit status."""
    from sparseq.inspection.examples import read_groups

    # Everything that can be wrong is reported before the weights are loaded.
    _check_numbers(args)
    config = _load_config(args.checkpoint)
    groups = read_groups(_data_options(args), args.max_examples)
    stacks, notes = _choose_stacks(args, config, groups)
    device = _device(args.device)

    from transformers import AutoModel, AutoModelForTextEncoding

    from sparseq.inspection.report import data_notes, show, write
    from sparseq.inspection.survey import inspect_experts
    from sparseq.loading import check_model_files, load_model, load_tokenizer

    tokenizer = load_tokenizer(args.checkpoint)
    notes += _check_tags(groups, tokenizer)
    folder = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else Path()
    output = args.output or folder / "inspection"
    if Path(args.checkpoint).is_dir():
        check_model_files(args.checkpoint, may_be_int8=True)
    output.mkdir(parents=True, exist_ok=True)
    auto = AutoModel if "decoder" in stacks else AutoModelForTextEncoding
    model: Any = load_model(auto, args.checkpoint)
    routings = inspect_experts(
        model.to(device),
        tokenizer,
        groups,
        stacks=stacks,
        batch_tokens=args.batch_tokens,
        limit=args.top_tokens,
        progress=True,
    )
    notes += data_notes(routings)
    # The path of a folder is nobody's business who gets the files.
    name = Path(args.checkpoint).name if Path(args.checkpoint).is_absolute() else args.checkpoint
    files = write(output, name, config, routings, notes)
    show(routings, notes)
    print("\n".join(map(str, files)))
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for option, value, least in (
        ("--max-examples", args.max_examples, 0),
        ("--top-tokens", args.top_tokens, 1),
        ("--batch-tokens", args.batch_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, but is {value}.")


def _load_config(checkpoint: str) -> Any:
    """The configuration of a sparse model of ours."""
    from sparseq.loading import load_config

    config = load_config(checkpoint)
    if not hasattr(config, "sparse_layers"):
        raise ValueError(
            f"{checkpoint} is a model of type {config.model_type!r}: only the experts of Sparseq models can be "
            "inspected."
        )
    if config.num_experts == 0:
        raise ValueError(f"{checkpoint} is a dense model (its `num_experts` is 0): there are no experts to inspect.")
    return config


def _data_options(args: argparse.Namespace) -> "list[DataOptions]":
    """Give each `--data` the options that belong to it."""
    from sparseq.inspection.examples import DataOptions

    kinds = [DataOptions(path=path).kind for path in args.data]

    def spread(name: str, *owners: str) -> dict[int, Any]:
        values = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        places = [place for place, kind in enumerate(kinds) if kind in owners]
        if values is None:
            return {}
        if not places:
            given = ", ".join(f"{path} (a {kind})" for path, kind in zip(args.data, kinds, strict=True))
            raise ValueError(f"{option} belongs to a {' or a '.join(owners)} as --data, but --data is {given}.")
        values = values if isinstance(values, list) else [values]
        if len(values) not in (1, len(places)):
            raise ValueError(
                f"{option} was given {len(values)} times for {len(places)} --data that it can belong to: give it once "
                "for all of them, or once for each in the same order."
            )
        return dict(zip(places, values * len(places) if len(values) == 1 else values, strict=True))

    named = {name: spread(name, "folder") for name in ("source", "split")}
    named["target"] = spread("target", "folder", "plain text")
    named["tag"] = spread("tag", "folder", "plain text", "table")
    named |= {name: spread(name, "table") for name in ("source_column", "target_column", "tag_column", "by")}
    return [
        DataOptions(path=path, **{name: values[place] for name, values in named.items() if place in values})
        for place, path in enumerate(args.data)
    ]


def _choose_stacks(
    args: argparse.Namespace, config: Any, groups: "Sequence[Group]"
) -> "tuple[tuple[Stack, ...], list[str]]":
    """The stacks to show, and a note where one cannot be shown; an error where nothing that was asked for can."""
    is_encoder_only = "SparseqEncoderModel" in (config.architectures or [])
    sparse: list[Stack] = ["encoder"] if config.sparse_layers("encoder") else []
    if config.sparse_layers("decoder") and not is_encoder_only:
        sparse.append("decoder")
    if args.stack and args.stack not in sparse:
        reason = (
            "it is an encoder alone" if is_encoder_only else f"its `{args.stack}_sparse_step` makes it dense there"
        )
        raise ValueError(f"--stack {args.stack}: {args.checkpoint} has no experts in that stack, because {reason}.")
    stacks: tuple[Stack, ...] = (args.stack,) if args.stack else tuple(sparse)
    without = ", ".join(group.name for group in groups if group.targets is None)
    if "decoder" not in stacks or not without:
        return stacks, []
    need = "the decoder needs targets (--target for folders and plain text, --target-column for tables)"
    if stacks == ("decoder",):
        raise ValueError(f"There are no targets for {without}, but the experts to show are in the decoder: {need}.")
    return ("encoder",), [f"there are no targets for {without}, so the encoder alone is shown: {need}"]


def _check_tags(groups: "Sequence[Group]", tokenizer: Any) -> list[str]:
    """Refuse tags that the tokenizer does not have, and note where it has tags but none is before the sources."""
    tags = tuple(getattr(tokenizer, "language_tags", ()))
    without = [group.name for group in groups if not group.tagged_sources(tokenizer)[0].startswith(tags or "")]
    if not without:
        return []
    return [
        f"there is no language tag before the sources of {', '.join(without)}, but the tokenizer has "
        f"{', '.join(tags)}: if the model was trained with them, name the target language with --tag"
    ]


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
