"""`sparseq score`: translate a split with a trained model and score it, alone or against another system."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with SPLIT.LANGUAGE[.gz]")
    parser.add_argument("--source", metavar="LANG", help="language to translate from; not needed for files")
    parser.add_argument("--target", required=True, metavar="LANG", help="language to translate into")
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
    from sparseq.data.parallel import read_parallel
    from sparseq.metrics.scoring import SEED, paired_differences, score_predictions

    # Everything that can be wrong is reported before a model is loaded.
    metrics = _metrics(args)
    resamples = _resamples(args)
    _check_outputs(args)
    # A file of translations needs the references alone: the target's file then stands for both sides.
    text = read_parallel(args.data, args.split, args.source or args.target, args.target, drop_empty=False)
    system, baseline = _systems(args, len(text))

    options = {"num_beams": args.beams} if args.beams else {}
    results = []
    for one in [system, *([baseline] if baseline else [])]:
        translations = one.translate(text.sources, args.target, batch_tokens=args.batch_tokens, **options)
        if one is system and args.translations:
            _write_lines(args.translations, translations)
        results.append(score_predictions(translations, text.targets, metrics, bootstrap=resamples))

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


def _metrics(args: argparse.Namespace) -> list[Any]:
    """The metrics asked for, each once, with their options."""
    from sparseq.metrics.corpus import Bleu, Chrf, ExactMatch, Rouge, check_metric

    for name in args.metrics:
        check_metric(name)
    make = {
        "bleu": lambda: Bleu(tokenize=args.tokenize, lowercase=args.lowercase),
        "chrf": lambda: Chrf(lowercase=args.lowercase),
        "exact_match": lambda: ExactMatch(lowercase=args.lowercase),
        # A line holds no line breaks, so rougeLsum would only repeat rougeL.
        "rouge": lambda: Rouge(
            kinds=("rouge1", "rouge2", "rougeL"), stemmer=args.rouge_stemmer, tokenize=args.rouge_tokenize
        ),
    }
    return [make[name]() for name in dict.fromkeys(args.metrics)]


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
    given = [name for name in (args.model, args.baseline) if name is not None]
    models = [name for name in given if not Path(name).is_file()]
    if models and args.source is None:
        raise ValueError(f"--source is missing: {models[0]} is to translate from it.")
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
