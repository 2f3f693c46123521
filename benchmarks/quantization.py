"""What int8 costs in quality: the translations of one test set by every way to run a model, in float32 and in int8.

    python benchmarks/quantization.py run multi30k translations --model dense=DENSE --model sparse=SPARSE
    python benchmarks/quantization.py report multi30k translations --json quantization.json
    python benchmarks/quantization.py speed --json quantization_speed.json

DATA is a folder with test_2016_flickr as {split}.{en,de}[.gz]; the captions are the public multi30k/dataset
repository's. DENSE and SPARSE are folders of trained models, such as those of benchmarks/upcycling.py. `run` goes on
where it stopped: translations are written as they are made. What a way needs and is not installed is left out.
`speed` times `generate()` with int8 weights against float32 ones, interleaved, on random models of one size.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # these two lie beside this script
from run_results import RESAMPLES  # type: ignore[import-not-found]
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

import sparseq
from sparseq.cli import main as command
from sparseq.data.parallel import ParallelText, read_parallel
from sparseq.languages import Direction
from sparseq.metrics.command import comparison_cells, figure_cell
from sparseq.metrics.corpus import Bleu, Chrf
from sparseq.metrics.scoring import Scored, paired_differences, score_predictions
from sparseq.metrics.systems import open_model
from sparseq.text_table import format_table
from sparseq.training.evaluation import translate_batchwise

TEST, SOURCE, TARGET = "test_2016_flickr", "en", "de"
# CTranslate2 ends a beam search as `early_stopping=True` does, so all of them do.
SEARCH: dict[str, Any] = {"num_beams": 5, "early_stopping": True}
BASE = "PyTorch float32"
# Sentences that are translated, and written, at a time.
PIECE = 50

# A small translation model; both kinds use as many parameters for a token.
SMALL = {
    **{"vocab_size": 8000, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024},
}
GEOMETRIES = {
    "dense": {"num_experts": 0},
    "sparse": {
        **{"num_experts": 8, "num_experts_per_tok": 2, "expert_ffn_dim": 512},
        **{"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    },
}
# What lies beside weights in a model's folder.
_TEXT = {".json", ".md", ".py", ".txt"}

Translate = Callable[[Sequence[str]], list[str]]


def pytorch(folder: Path, scratch: Path, precision: str) -> Translate:
    """`generate()` of the model as it is, or with int8 weights, as `save_pretrained` writes them to `scratch`."""
    int8 = sparseq.SparseqInt8Config() if precision == "int8" else None
    AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=int8).save_pretrained(scratch)
    model, system = AutoModelForSeq2SeqLM.from_pretrained(scratch), open_model(str(folder), Direction(SOURCE, TARGET))
    tokenizer: Any = system.tokenizer
    options: dict[str, Any] = {**SEARCH, **system.cue.generation, "prefix": system.cue.prefix, "batch_tokens": 4096}
    return lambda texts: translate_batchwise(model, tokenizer, texts, **options)


def onnx_runtime(folder: Path, scratch: Path, precision: str) -> Translate:
    """`sparseq.Translator`, which writes its graphs to `scratch`."""
    translator = sparseq.Translator.from_pretrained(
        folder, precision=precision, runtime="onnx", threads=1, cache_dir=scratch
    )
    options = {**SEARCH, "source_language": SOURCE, "target_language": TARGET}
    return lambda texts: [translation.text for translation in translator.translate(list(texts), **options)]


def ctranslate2(folder: Path, scratch: Path, precision: str) -> Translate:
    """CTranslate2 on the model that `sparseq export` writes to `scratch`."""
    import ctranslate2 as runtime

    quantization = ("--quantization", "int8") if precision == "int8" else ()
    command(["export", str(folder), str(scratch), "--to", "ctranslate2", "--force", *quantization])
    translator = runtime.Translator(str(scratch), device="cpu", intra_threads=1, inter_threads=1)
    system = open_model(str(folder), Direction(SOURCE, TARGET))
    if system.cue.generation:
        raise SystemExit(f"{folder} begins its outputs with the language, which this script does not tell CTranslate2")
    tokenizer: Any = system.tokenizer
    # The model's own limit counts the start token.
    limit = GenerationConfig.from_pretrained(folder).max_length - 1
    options = {"beam_size": SEARCH["num_beams"], "max_decoding_length": limit}

    def translate(texts: Sequence[str]) -> list[str]:
        marked = [system.cue.prefix + text for text in texts]
        sources = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(marked)["input_ids"]]
        results = translator.translate_batch(sources, max_input_length=0, min_decoding_length=0, **options)
        targets = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        return [text.strip() for text in tokenizer.batch_decode(targets, skip_special_tokens=True)]

    return translate


WAYS = {
    f"{name} {precision}": (make, precision, packages)
    for name, make, packages in (
        ("PyTorch", pytorch, ("torch", "transformers")),
        ("ONNX Runtime", onnx_runtime, ("onnx", "onnxruntime")),
        ("CTranslate2", ctranslate2, ("ctranslate2",)),
    )
    for precision in ("float32", "int8")
}


def run(args: argparse.Namespace) -> None:
    """Translate the test set in every way that is asked for and not finished."""
    torch.set_num_threads(1)
    sources = _text(args).sources
    for name, folder in args.model:
        for way in args.ways:
            if reason := _obstacle(way, folder):
                print(f"{name}, {way}: left out, since {reason}")
            else:
                _translate(args.output / name / way, folder, way, sources)


def _obstacle(way: str, folder: Path) -> str | None:
    """Why a model cannot be run in a way here."""
    make, _, packages = WAYS[way]
    if make is ctranslate2 and json.loads((folder / "config.json").read_text("utf-8"))["num_experts"]:
        return "CTranslate2 has no mixture of experts"
    missing = [package for package in packages if find_spec(package) is None]
    return f"{' and '.join(missing)} is not installed" if missing else None


def _translate(output: Path, folder: Path, way: str, sources: Sequence[str]) -> None:
    """Write to `output` the translations that it lacks, and then what the model takes on disk."""
    make, precision, packages = WAYS[way]
    translations, facts, files = output / "translations.txt", output / "facts.json", output / "files"
    if facts.is_file():
        print(f"{output} is finished")
        return
    files.mkdir(parents=True, exist_ok=True)
    text = translations.read_text("utf-8") if translations.is_file() else ""
    # What a kill has left of a line is translated again.
    done = text.split("\n")[:-1]
    translations.write_text("".join(f"{line}\n" for line in done), "utf-8")
    translate = make(folder, files, precision)
    for start in range(len(done), len(sources), PIECE):
        lines = translate(sources[start : start + PIECE])
        with translations.open("a", encoding="utf-8") as stream:
            stream.writelines(line.replace("\n", " ") + "\n" for line in lines)
        print(f"{output}: {start + len(lines):,} of {len(sources):,}", flush=True)
    content = {
        "bytes": sum(path.stat().st_size for path in files.rglob("*") if path.is_file() and path.suffix not in _TEXT),
        "versions": {package: metadata.version(package) for package in packages},
    }
    facts.write_text(json.dumps(content), "utf-8")


def report(args: argparse.Namespace) -> None:
    """Score what is finished, and say how it differs from the float32 model in PyTorch."""
    text = _text(args)
    rows: list[dict[str, Any]] = []
    for folder in sorted(path for path in args.output.iterdir() if path.is_dir()):
        finished = {way: folder / way for way in WAYS if (folder / way / "facts.json").is_file()}
        lines = {
            way: (path / "translations.txt").read_text("utf-8").split("\n")[:-1] for way, path in finished.items()
        }
        scored = {
            way: score_predictions(done, text.targets, [Bleu(), Chrf()], bootstrap=RESAMPLES)
            for way, done in lines.items()
        }
        for way, path in finished.items():
            facts = json.loads((path / "facts.json").read_text("utf-8"))
            row = {"model": folder.name, "way": way, **facts, **scored[way].report()}
            if way != BASE and BASE in scored:
                row["equal_sentences"] = sum(map(str.__eq__, lines[way], lines[BASE]))
                row["versus_float32"] = _differences(scored[way], scored[BASE])
            rows.append(row)
    if not rows:
        raise SystemExit(f"{args.output} holds nothing finished: use `run` first")
    print(f"{TEST}, {rows[0]['sentences']:,} sentences, {SEARCH}; ± half a 95% bootstrap interval; differences from")
    print(f"{BASE} of the same model, with 95% interval and paired bootstrap p")
    print(format_table(table_rows(rows)))
    print(f"\n{rows[0]['bleu_signature']}, {rows[0]['chrf_signature']}")
    if args.json:
        args.json.write_text(
            json.dumps({"setting": setting(), "search": SEARCH, "rows": rows}, indent=2) + "\n", "utf-8"
        )


def speed(args: argparse.Namespace) -> None:
    """Time greedy decoding in PyTorch with both precisions, and print int8's share of float32's tokens per second."""
    torch.set_num_threads(args.threads)
    rows = []
    for name, fields in GEOMETRIES.items():
        models = _in_both_precisions(SMALL | fields)
        megabytes = {precision: model.get_memory_footprint() / 1e6 for precision, model in models.items()}
        for batch in args.batches:
            systems = {precision: _decoding(model, batch, args.tokens) for precision, model in models.items()}
            seconds = interleave(systems, rounds=args.rounds)
            share = 1 / ratios(seconds, "float32")["int8"]
            print(
                f"{name:6} batch {batch:2}: int8 has {share:.2f} of float32's tokens per second, in "
                f"{megabytes['int8']:.1f} MB instead of {megabytes['float32']:.1f}",
                flush=True,
            )
            rows.append({"model": name, "batch": batch, "share": share, "megabytes": megabytes, "seconds": seconds})
    if args.json:
        content = {"setting": setting(), "geometry": SMALL, "models": GEOMETRIES, "tokens": args.tokens, "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _in_both_precisions(fields: dict[str, Any]) -> dict[str, Any]:
    """A random model by precision."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sparseq.SparseqForConditionalGeneration(sparseq.SparseqConfig(**fields)).save_pretrained(folder)
        int8 = {"quantization_config": sparseq.SparseqInt8Config()}
        return {
            precision: AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
            for precision, options in (("float32", {}), ("int8", int8))
        }


def _decoding(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(5, model.config.vocab_size, (batch, 24), generator=generator)
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "max_length": None, "do_sample": False}
    return lambda: model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)


def table_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table, header first."""
    cells: list[tuple[str, ...]] = [
        ("model", "way", "MB", "BLEU", "difference", "p", "chrF", "difference", "p", "equal to float32")
    ]
    for row in rows:
        figures: list[str] = []
        for figure in ("bleu", "chrf"):
            tests = comparison_cells(row["versus_float32"][figure])[:2] if "versus_float32" in row else ("", "")
            figures += [figure_cell(row, figure), *tests]
        equal = f"{row['equal_sentences'] / row['sentences']:.1%}" if "equal_sentences" in row else ""
        cells.append((row["model"], row["way"], f"{row['bytes'] / 1e6:.2f}", *figures, equal))
    return cells


def _differences(system: Scored, base: Scored) -> dict[str, Any]:
    return {figure: test.report() for figure, test in paired_differences(system, base).items()}


def _text(args: argparse.Namespace) -> ParallelText:
    return read_parallel(args.data, TEST, SOURCE, TARGET, drop_empty=False)


def _model(value: str) -> tuple[str, Path]:
    name, _, folder = value.partition("=")
    if not (name and (Path(folder) / "config.json").is_file()):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=FOLDER with a folder that has a config.json")
    return name, Path(folder)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    part = commands.add_parser("run", help="translate, or go on with it")
    part.set_defaults(function=run)
    part.add_argument("data", type=Path, metavar="DATA", help="folder of the captions")
    part.add_argument("output", type=Path, metavar="TRANSLATIONS", help="folder for translations and converted models")
    part.add_argument(
        "--model", action="append", required=True, type=_model, metavar="NAME=FOLDER", help="a trained model; repeat"
    )
    part.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="default: all")
    part = commands.add_parser("report", help="score what is finished")
    part.set_defaults(function=report)
    part.add_argument("data", type=Path, metavar="DATA")
    part.add_argument("output", type=Path, metavar="TRANSLATIONS")
    part.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    part = commands.add_parser("speed", help="time both precisions in PyTorch")
    part.set_defaults(function=speed)
    part.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="default: 1 and 16")
    part.add_argument("--tokens", type=int, default=64, help="of each output (default: 64)")
    part.add_argument("--rounds", type=int, default=9, help="default: 9")
    part.add_argument("--threads", type=int, default=1, help="default: 1")
    part.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
