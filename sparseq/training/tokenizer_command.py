"""`sparseq train-tokenizer`: train a tokenizer on text files or on columns of a dataset."""

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ..data.lines import read_lines
from ..data.sources import check_text
from ..data.tables import open_table
from ..tokenization_sparseq import SparseqTokenizer
from .tokenizer import (
    Algorithm,
    Normalization,
    format_report,
    smallest_vocab_size,
    tokenizer_report,
    train_tokenizer,
)

_DESCRIPTION = """\
Train one tokenizer for source and target together, report how well it fits the text, and save it as a folder that
AutoTokenizer loads, with this package or without. Give every language of the data: one joint vocabulary serves both
sides. The same text and options always give the same tokenizer."""

_EXAMPLES = """\
examples:
  two text files, one sentence a line, and a tag <2de> to ask for German:
    sparseq train-tokenizer train.en.gz train.de.gz --language de --output tokenizer

  two columns of a dataset of the Hub, or of a local CSV, JSON or Parquet file:
    sparseq train-tokenizer --dataset bentrevett/multi30k --column en --column de --output tokenizer
    sparseq train-tokenizer --dataset pairs.csv --column source --column target --output tokenizer

  the translation column of WMT data, whose text lies one level deeper:
    sparseq train-tokenizer --dataset wmt/wmt16 --config-name de-en --column translation.en \\
        --column translation.de --vocab-size 32000 --output tokenizer

  see whether the data can be read and how small the vocabulary may be, without training:
    sparseq train-tokenizer train.en.gz train.de.gz --output tokenizer --dry-run

then, in Python:
  from transformers import AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained("tokenizer")
  tokenizer("<2de> A man walks.", text_target="Ein Mann geht.")

exit codes: 0 done, 2 the input or an option is wrong (the message says which)"""

# What `SparseqTokenizer.save_pretrained` and earlier versions of transformers write.
_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `train-tokenizer` to the sub-commands of `sparseq` and return its parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train-tokenizer",
        help="train a tokenizer on text files or dataset columns",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data_options(parser.add_argument_group("text (files or a dataset)"))
    _add_tokenizer_options(parser.add_argument_group("tokenizer"))
    _add_result_options(parser.add_argument_group("result"))
    return parser


def _add_data_options(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="UTF-8 text, one text a line; .gz is read too"
    )
    data.add_argument("--dataset", metavar="PATH_OR_ID", help="dataset of the Hub, saved dataset folder, or data file")
    data.add_argument(
        "--column", action="append", default=[], metavar="NAME", help="column with text; repeat for more"
    )
    data.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    data.add_argument("--config-name", metavar="NAME", help="configuration of the dataset, where it has several")


def _add_tokenizer_options(form: argparse._ArgumentGroup) -> None:
    form.add_argument(
        "--vocab-size",
        type=int,
        default=10_000,
        metavar="N",
        help="whole vocabulary, special and byte tokens included (default: %(default)s)",
    )
    form.add_argument(
        "--algorithm",
        choices=get_args(Algorithm),
        default="bpe-bytes",
        help="bpe-bytes spells unknown characters with bytes, so nothing is ever unknown (default: %(default)s)",
    )
    form.add_argument(
        "--language", action="append", default=[], metavar="CODE", help="make the tag <2CODE>; repeat for more"
    )
    form.add_argument(
        "--normalization",
        choices=get_args(Normalization),
        help="Unicode normalization (default: none, decoding then returns the text exactly)",
    )
    form.add_argument("--lowercase", action="store_true", help="lower-case all text")
    form.add_argument(
        "--min-frequency", type=int, default=2, metavar="N", help="pairs seen less often are not merged (default: 2)"
    )
    form.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the text whose characters get tokens of their own (default: 1.0; try 0.9995 for Chinese)",
    )
    form.add_argument(
        "--model-max-length",
        type=int,
        default=1024,
        metavar="N",
        help="length that truncation cuts to (default: 1024)",
    )


def _add_result_options(result: argparse._ArgumentGroup) -> None:
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the tokenizer to")
    result.add_argument("--overwrite", action="store_true", help="replace the tokenizer that the folder holds")
    result.add_argument("--report-json", type=Path, metavar="FILE", help="also write the report as JSON")
    result.add_argument("--dry-run", action="store_true", help="read and check everything, train and write nothing")


def run(args: argparse.Namespace) -> int:
    """Train, report and save; return the exit code 0.

    Raises:
        ValueError, OSError: If the input or an option is wrong; `sparseq` turns them into a message and exit code 2.
    """
    _check_output(args.output, overwrite=args.overwrite)
    if args.report_json is not None and not args.report_json.absolute().parent.is_dir():
        raise ValueError(f"--report-json {args.report_json}: the folder {args.report_json.parent} does not exist.")
    texts = _read_texts(args)
    everything = [text for group in texts.values() for text in group]
    if not everything:
        raise ValueError(f"There is no text in {', '.join(texts)}: every line is empty.")
    options = {
        "algorithm": args.algorithm,
        "language_tags": args.language,
        "normalization": args.normalization,
        "lowercase": args.lowercase,
        "character_coverage": args.character_coverage,
    }
    if args.dry_run:
        smallest = smallest_vocab_size(everything, **options)
        for name, group in texts.items():
            print(f"{name}: {len(group):,} texts")
        print(f"smallest workable vocabulary size: {smallest:,}")
        if args.vocab_size < smallest:
            raise ValueError(f"--vocab-size {args.vocab_size} is less than that.")
        print(f"would train {args.algorithm} with {args.vocab_size:,} tokens and write {args.output} (dry run)")
        return 0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tokenizer = train_tokenizer(
            everything,
            vocab_size=args.vocab_size,
            min_frequency=args.min_frequency,
            model_max_length=args.model_max_length,
            **options,
        )
    for warning in caught:
        print(f"sparseq train-tokenizer: warning: {warning.message}", file=sys.stderr)
    report = tokenizer_report(tokenizer, texts)
    _save_folder(tokenizer, args.output)
    print(format_report(report))
    print(f"saved to {args.output}")
    if args.report_json is not None:
        args.report_json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _read_texts(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the texts by file or column, blank ones left out."""
    if bool(args.files) == bool(args.dataset):
        raise ValueError("Give either text files or --dataset with --column; see --help for examples.")
    if args.dataset:
        if not args.column:
            raise ValueError("--dataset needs --column: name each column that holds text.")
        return _read_dataset(args.dataset, args.config_name, args.split, args.column)
    if args.column or args.config_name:
        raise ValueError("--column and --config-name go with --dataset, not with text files.")
    for file in args.files:
        if not file.is_file():
            raise ValueError(f"{file} is {'a folder, not a text file' if file.is_dir() else 'missing'}.")
    return {str(file): [line for line in read_lines(file) if line.strip()] for file in args.files}


def _read_dataset(name: str, config_name: str | None, split: str, columns: Sequence[str]) -> dict[str, list[str]]:
    table = open_table(name, config=config_name, split=split, text_columns=columns)
    texts: dict[str, list[str]] = {column: [] for column in columns}
    rows = 0
    for batch in table.columns(columns):
        for column, values in zip(columns, batch, strict=True):
            check_text(table.name, column, values, rows)
            texts[column] += [value for value in values if value and value.strip()]
        rows += len(batch[0])
    return texts


def _check_output(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder.")
    present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if present and not overwrite:
        raise ValueError(f"--output {folder} is not empty; choose another folder or give --overwrite.")
    foreign = [name for name in present if name not in _TOKENIZER_FILES]
    if foreign:
        raise ValueError(
            f"--output {folder} holds more than a tokenizer ({', '.join(foreign[:3])}), and --overwrite would delete "
            "it; choose another folder."
        )


def _save_folder(tokenizer: SparseqTokenizer, folder: Path) -> None:
    """Write the whole folder beside its place and move it there, so that no reader meets half a tokenizer."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        tokenizer.save_pretrained(new)
        if folder.is_dir():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.is_dir():
                os.replace(old, folder)
            raise
