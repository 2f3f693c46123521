"""`sparseq score`: translate a split with a trained model and score it, alone or against another system."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What it brings in takes a moment, and `sparseq --help` needs none of it.
if TYPE_CHECKING:
    from sparseq.data.parallel import ParallelText

_EPILOG = """\
examples:
  sparseq score outputs/tiny --data corpus --source en --target de --split test
      translate corpus/test.en (or .gz) and score it against corpus/test.de; JSON on standard output
  sparseq score outputs/tiny --data corpus --source en --target de --split test --beams 1 --bootstrap 1000
      greedy, with 95% confidence intervals
  sparseq score outputs/tiny --data corpus --source en --target de --metrics bleu chrf exact_match rouge
      more metrics; rouge needs pip install "sparseq[eval]"
  sparseq score outputs/sparse --baseline outputs/dense --data corpus --source en --target de
      two models: the difference of each figure with its interval and a paired bootstrap test
  sparseq score sparse.de --baseline dense.de --data corpus --target de
      the same for files of translations, one a line: nothing is loaded
  sparseq score outputs/tiny --data corpus_tok --source en --target de --split test --tokenize none
      text that is tokenised already
  sparseq score outputs/summaries --data test.jsonl --source-column document --target-column summary --metrics rouge
      a table: .jsonl, .csv, .parquet and the like, plain or .gz, or a dataset that was saved or lies on the Hub
"""

_COMPARISON_RESAMPLES = 1000


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "score",
        help="BLEU, chrF and more of a trained model, alone or against another",
        description="Translate a split of parallel text with a trained model and score it, alone or against another\n"
        "model. Files of translations can be scored as well. JSON goes to standard output, a table to standard error.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder or Hub id of a sequence-to-sequence model, or a file of translations, one a line",
    )
    parser.add_argument("--data", required=True, help="folder with SPLIT.LANGUAGE[.gz], or a table or dataset")
    parser.add_argument("--source", metavar="LANG", help="language to translate from; not needed for files")
    parser.add_argument("--target", metavar="LANG", help="language to translate into; a table may go without")
    parser.add_argument("--source-column", metavar="NAME", help="column of a table with the sources")
    parser.add_argument("--target-column", metavar="NAME", help="column of a table with the references")
    parser.add_argument("--split", default="test", help="split to translate (default: test)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["bleu", "chrf"],
        metavar="NAME",
        help="some of bleu, chrf, exact_match, rouge (default: bleu chrf)",
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="compare with this model or file of translations, by a paired bootstrap test",
    )
    parser.add_argument("--beams", type=int, help="beams (default: what the model's generation_config says)")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="source tokens of a batch")
    parser.add_argument(
        "--max-source-length",
        type=int,
        metavar="N",
        help="longer sources are cut to so many tokens (default: what the model's tokenizer says)",
    )
    parser.add_argument("--tokenize", default="13a", help="sacrebleu's tokenizer for BLEU (default: 13a)")
    parser.add_argument(
        "--rouge-tokenize",
        default="ascii",
        metavar="TOKENIZE",
        help='"ascii" (default) or one of sacrebleu\'s tokenizers',
    )
    parser.add_argument("--rouge-stemmer", action="store_true", help="strip English suffixes for ROUGE")
    parser.add_argument("--lowercase", action="store_true", help="ignore case")
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help=f"95%% confidence intervals from N resamples (default: none; with --baseline {_COMPARISON_RESAMPLES})",
    )
    parser.add_argument("--translations", type=Path, metavar="FILE", help="write the translations, one a line")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the JSON here; the table goes to standard output then"
    )


def run(args: argparse.Namespace) -> int:
    """Translate, score and report; returns the exit status."""
    from sparseq.metrics.corpus import make_metrics
    from sparseq.metrics.scoring import SEED, paired_differences, score_predictions

    # Everything that can be wrong is reported before a model is loaded.
    metrics = make_metrics(
        args.metrics,
        tokenize=args.tokenize,
        lowercase=args.lowercase,
        rouge_stemmer=args.rouge_stemmer,
        rouge_tokenize=args.rouge_tokenize,
    )
    resamples = _resamples(args)
    _check_outputs(args)
    text = _read(args)
    system, baseline = _systems(args, len(text))

    options: dict[str, Any] = {"batch_tokens": args.batch_tokens, "max_source_length": args.max_source_length}
    options |= {"num_beams": args.beams} if args.beams else {}
    sources, references = list(text.sources), list(text.targets)
    results = []
    for one in [system, *([baseline] if baseline else [])]:
        translations = one.translate(sources, args.target, **options)
        if one is system and args.translations:
            _write_lines(args.translations, translations)
        results.append(score_predictions(translations, references, metrics, bootstrap=resamples))

    report = {"model": args.model, "split": args.split, "files": text.report.files, **results[0].report()}
    if baseline:
        differences = paired_differences(results[0], results[1])
        report["baseline"] = {"model": args.baseline, **results[1].report()}
        report["comparison"] = {figure: value.report() for figure, value in differences.items()}
        report |= {"resamples": resamples, "seed": SEED}
    rendered = json.dumps(report, indent=2, ensure_ascii=False)
    if args.output:
        args.output.write_text(rendered + "\n", encoding="utf-8")
    else:
        print(rendered)
    print(_table(report, list(results[0].scores)), file=sys.stdout if args.output else sys.stderr)
    return 0


def _read(args: argparse.Namespace) -> "ParallelText":
    """The test set, every line of it: aligned files of a folder, or two columns of a table."""
    from sparseq.data.cleaning import Policy
    from sparseq.data.parallel import read_pairs
    from sparseq.data.sources import PairPlace

    source, source_column = args.source, args.source_column
    if not _models(args) and source is None and source_column is None:
        # Files of translations need the references alone, which then stand for both sides.
        source, source_column = args.target, args.target_column
    is_file, has_columns = Path(args.data).is_file(), bool(args.source_column or args.target_column)
    if not is_file and not has_columns:
        if args.target is None:
            raise ValueError(
                f"--target is missing: the folder {args.data} has a file for each language. For a dataset, name "
                "--source-column and --target-column."
            )
        if source is None:
            raise ValueError(f"--source is missing: {_models(args)[0]} is to translate from it.")
    place = PairPlace(
        source,
        args.target,
        folder=None if is_file or has_columns else args.data,
        dataset=args.data if has_columns and not is_file else None,
        source_column=source_column,
        target_column=args.target_column,
        files=((args.split, (args.data,)),) if is_file else (),
    )
    return read_pairs(place.open(args.split), args.split, Policy().for_evaluation(), language=args.target)


def _models(args: argparse.Namespace) -> list[str]:
    """The systems that are to translate."""
    return [name for name in (args.model, args.baseline) if name is not None and not Path(name).is_file()]


def _resamples(args: argparse.Namespace) -> int:
    from sparseq.metrics.scoring import check_bootstrap

    resamples: int = args.bootstrap if args.bootstrap is not None else (_COMPARISON_RESAMPLES if args.baseline else 0)
    check_bootstrap(resamples)
    if args.baseline and not resamples:
        raise ValueError(
            "--baseline needs resamples for its test, but --bootstrap is 0: give it 1000, or leave it out."
        )
    return resamples


def _check_outputs(args: argparse.Namespace) -> None:
    for option, path in (("--output", args.output), ("--translations", args.translations)):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}.")


def _systems(args: argparse.Namespace, lines: int) -> tuple[Any, Any]:
    """The system and the baseline (None without one)."""
    if args.beams is not None and args.beams < 1:
        raise ValueError(f"--beams must be at least 1, but is {args.beams}.")
    if args.batch_tokens < 1:
        raise ValueError(f"--batch-tokens must be at least 1, but is {args.batch_tokens}.")
    if args.max_source_length is not None and args.max_source_length < 1:
        raise ValueError(f"--max-source-length must be at least 1, but is {args.max_source_length}.")
    if args.translations and Path(args.model).is_file():
        raise ValueError(f"--translations has nothing to write: {args.model} holds the translations already.")

    from sparseq.metrics.systems import open_system

    system = open_system(args.model, lines=lines)
    return system, open_system(args.baseline, lines=lines) if args.baseline is not None else None


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line.replace("\n", " ") + "\n" for line in lines), encoding="utf-8")


def _table(report: dict[str, Any], figures: list[str]) -> str:
    """The report for people: a row for each figure."""

    def cell(scores: dict[str, Any], figure: str) -> str:
        interval = f" ± {scores[f'{figure}_ci']:.2f}" if f"{figure}_ci" in scores else ""
        return f"{scores[figure]:.2f}{interval}"

    header = ["", report["model"]]
    rows = [[figure, cell(report, figure)] for figure in figures]
    if "baseline" in report:
        header += [report["baseline"]["model"], "difference (95% interval)", "p", "better in"]
        for row, figure in zip(rows, figures, strict=True):
            test = report["comparison"][figure]
            low, high = test["interval"]
            row += [
                cell(report["baseline"], figure),
                f"{test['difference']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{test['p_value']:.3f}",
                f"{100 * test['better']:.0f}% of resamples",
            ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in [header, *rows]
    ]
    return "\n".join([*(line.rstrip() for line in lines), f"{report['sentences']:,} sentences of {report['split']}"])
