"""`sparseq score`: translate a split with a trained model and score it."""

import argparse
import json
from pathlib import Path

_EPILOG = """\
examples:
  sparseq score outputs/tiny --data corpus --source en --target de --split test
      translate corpus/test.en (or .gz) and score it against corpus/test.de; JSON on standard output
  sparseq score outputs/tiny --data corpus --source en --target de --split test --beams 1 --bootstrap 1000
      greedy, with 95% confidence intervals
  sparseq score outputs/tiny --data corpus_tok --source en --target de --split test --tokenize none
      text that is tokenised already
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "score",
        help="BLEU and chrF of a trained model",
        description="Translate a split of parallel text with a trained model and score it with BLEU and chrF.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a sequence-to-sequence model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with SPLIT.LANGUAGE[.gz]")
    parser.add_argument("--source", required=True, metavar="LANG", help="language to translate from")
    parser.add_argument("--target", required=True, metavar="LANG", help="language to translate into")
    parser.add_argument("--split", default="test", help="split to translate (default: test)")
    parser.add_argument("--beams", type=int, help="beams (default: what the model's generation_config says)")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="source tokens of a batch")
    parser.add_argument("--tokenize", default="13a", help="sacrebleu's tokenizer for BLEU (default: 13a)")
    parser.add_argument("--lowercase", action="store_true", help="ignore case")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="confidence intervals from N resamples")
    parser.add_argument("--translations", type=Path, metavar="FILE", help="write the translations, one a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here instead of standard output")


def run(args: argparse.Namespace) -> int:
    """Translate, score and report; returns the exit status."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    import sparseq  # noqa: F401  # registers the model type with the Auto classes
    from sparseq.data.parallel import read_parallel
    from sparseq.metrics import translation_scores
    from sparseq.tokenization_sparseq import source_prefix
    from sparseq.training.evaluation import translate_batchwise

    # Everything that can be wrong with the data is reported before the model is loaded.
    text = read_parallel(args.data, args.split, args.source, args.target, drop_empty=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    translations = translate_batchwise(
        model,
        tokenizer,
        text.sources,
        prefix=source_prefix(tokenizer, args.target),
        batch_tokens=args.batch_tokens,
        progress=True,
        **({"num_beams": args.beams} if args.beams else {}),
    )
    scores = translation_scores(
        translations, text.targets, tokenize=args.tokenize, lowercase=args.lowercase, bootstrap=args.bootstrap
    )
    if args.translations:
        lines = "".join(line.replace("\n", " ") + "\n" for line in translations)
        args.translations.write_text(lines, encoding="utf-8")
    report = {"model": args.model, "split": args.split, "files": text.report.files, **scores}
    rendered = json.dumps(report, indent=2, ensure_ascii=False)
    if args.output:
        args.output.write_text(rendered + "\n", encoding="utf-8")
    else:
        print(rendered)
    return 0
