"""`sparseq translate`: lines in, translations out, in order."""

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparseq.metrics.command import check_at_least_one, check_output_file

# What they bring in takes a moment, and `sparseq --help` needs none of it.
if TYPE_CHECKING:
    from sparseq.translation.translator import Translation, Translator

_EPILOG = """\
output:
  one translation a line, and an empty line for an empty one
  --scores           SCORE <tab> TRANSLATION
  --n-best N         N lines for each line: NUMBER <tab> SCORE <tab> TRANSLATION; lines are numbered from 1
  --json             {"line": 1, "translations": [{"text": "...", "score": -0.42}, ...]}

examples:
  sparseq translate outputs/tiny < test.en > test.de
  sparseq translate outputs/tiny part1.en part2.en.gz --output all.de --beams 4
      files one after another; stopped at any moment, it goes on with the same command and --resume
  sparseq translate outputs/tiny --int8 --threads 4 < test.en
      weights in 8 bits: faster, and a little less exact
  sparseq translate models/nllb --source eng_Latn --target deu_Latn test.en
      a model of several languages
  sparseq translate outputs/tiny --beams 8 --n-best 8 test.en
  sparseq translate outputs/tiny --sample --temperature 0.8 --seed 1 --n-best 3 test.en
  sparseq translate outputs/tiny
      type a line, and see its translation grow
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "translate",
        help="translate standard input or files with a trained model",
        description="Translate lines with a sequence-to-sequence model, in order and with flat memory. Progress goes\n"
        "to standard error. Runs on ONNX Runtime where that is installed and the model is Sparseq's; its graphs\n"
        "are made the first time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a sequence-to-sequence model")
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="text, one sentence or paragraph a line, plain or .gz (default: standard input)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here (default: standard output)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with --output where an earlier run of the command was stopped"
    )
    for side in ("source", "target"):
        parser.add_argument(f"--{side}", metavar="LANG", help=f"{side} language, for a model of several")
    _add_decoding_arguments(parser.add_argument_group("decoding"))
    _add_output_arguments(parser.add_argument_group("what is written"))
    _add_runtime_arguments(parser.add_argument_group("how it runs"))
    _take_files_behind_options(parser)


def _take_files_behind_options(parser: Any) -> None:
    """Have `translate MODEL --beams 4 FILE` parsed, where argparse would have MODEL and files side by side."""
    plain = parser.parse_known_args

    def parse(*arguments: Any) -> Any:
        # It calls the plain one itself.
        parser.parse_known_args = plain
        try:
            return parser.parse_known_intermixed_args(*arguments)
        finally:
            parser.parse_known_args = parse

    parser.parse_known_args = parse


def _add_decoding_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--beams", type=int, metavar="N", help="beams (default: what the model's settings say)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of a translation at most")
    group.add_argument("--length-penalty", type=float, metavar="X", help="above 1 beams prefer longer translations")
    group.add_argument("--prefix", metavar="TEXT", help="what each translation is to begin with")
    group.add_argument(
        "--too-long",
        choices=["split", "error", "truncate"],
        default="split",
        help="a line that is longer than the model reads is cut at ends of sentences (default), refused, or cut off",
    )
    group.add_argument("--sample", action="store_true", help="draw tokens at random in place of searching")
    group.add_argument("--temperature", type=float, metavar="X", help="with --sample: below 1 more likely tokens")
    group.add_argument("--top-k", type=int, metavar="N", help="with --sample: of the N likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="X", help="with --sample: of the likeliest that have X together")
    group.add_argument("--seed", type=int, metavar="N", help="with --sample: the same translations each time")


def _add_output_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--n-best", type=int, metavar="N", help="the N best translations of each line")
    group.add_argument("--scores", action="store_true", help="with the score of each translation")
    group.add_argument("--json", action="store_true", help="a JSON object for each line")
    group.add_argument("--progress", action="store_true", help="show progress even if standard error is no terminal")


def _add_runtime_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--int8", action="store_true", help="weights in 8 bits")
    group.add_argument(
        "--runtime", choices=["auto", "onnx", "torch"], default="auto", help="what computes (default: auto)"
    )
    group.add_argument("--device", help="such as cpu or cuda (default: an accelerator if there is one)")
    group.add_argument("--threads", type=int, metavar="N", help="threads of one operator (default: the runtime's)")
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="source tokens of a batch, padding included, once for each beam (default: 4096)",
    )
    group.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="keep graphs here (default: beside the model)")
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def run(args: argparse.Namespace) -> int:
    """Translate; returns the exit status."""
    _check(args)
    from transformers.utils.logging import disable_progress_bar

    from sparseq.translation.translator import Translator

    # Of the weights, which load in a moment; translating has its own.
    disable_progress_bar()
    translator = Translator.from_pretrained(
        args.model,
        precision="int8" if args.int8 else "float32",
        runtime=args.runtime,
        device=args.device,
        threads=args.threads,
        cache_dir=args.cache_dir,
        revision=args.revision,
    )
    own_beams = translator.generation_config.num_beams or 1
    if (args.n_best or 1) > (args.beams or own_beams) and not args.sample:
        raise ValueError(f"--n-best {args.n_best} needs --beams {args.n_best} or more, or --sample.")
    if not args.files and args.output is None and sys.stdin.isatty():
        return _converse(args, translator)
    return _translate(args, translator)


def _check(args: argparse.Namespace) -> None:
    """Report what can be found wrong before a model is loaded."""
    from sparseq.data.lines import near_file

    for option in ("beams", "n_best", "max_new_tokens", "batch_tokens", "threads"):
        check_at_least_one(f"--{option.replace('_', '-')}", getattr(args, option))
    if args.n_best is not None and args.beams is not None and args.n_best > args.beams and not args.sample:
        raise ValueError(f"--n-best {args.n_best} is more than --beams {args.beams}: raise --beams, or use --sample.")
    for option in ("temperature", "top_k", "top_p", "seed"):
        if getattr(args, option) is not None and not args.sample:
            raise ValueError(f"--{option.replace('_', '-')} is for --sample, which is not given.")
    for path in args.files:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.{near_file(path)}")
    check_output_file("--output", args.output)
    if args.output is not None:
        _check_output(args)
    if args.resume and args.output is None:
        raise ValueError("--resume goes on with a file: name it with --output.")


def _check_output(args: argparse.Namespace) -> None:
    output = args.output
    if output.suffix == ".gz":
        raise ValueError(f"--output {output}: what is written is not compressed; name a file without .gz.")
    if output.exists() and not args.resume:
        raise ValueError(f"--output {output} is there already: go on with it by --resume, or remove it.")
    if any(output.exists() and output.samefile(path) for path in args.files):
        raise ValueError(f"--output {output} is one of the files to be translated.")
    if not os.access(output if output.exists() else output.absolute().parent, os.W_OK):
        raise ValueError(f"--output {output} cannot be written: you lack the permission, or the disk is read-only.")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments ask of `Translator.translate`."""
    given = {
        "source_language": args.source,
        "target_language": args.target,
        "target_prefix": args.prefix,
        "num_beams": 1 if args.sample and args.beams is None else args.beams,
        "num_return_sequences": args.n_best,
        "max_new_tokens": args.max_new_tokens,
        "length_penalty": args.length_penalty,
        "do_sample": True if args.sample else None,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    return {"too_long": args.too_long, **{name: value for name, value in given.items() if value is not None}}


def _translate(args: argparse.Namespace, translator: "Translator") -> int:
    """Lines from files or standard input, to the end."""
    write = _writer(args)
    lines = _input(args)
    done = _lines_done(args)
    if sum(1 for _ in itertools.islice(lines, done)) < done:
        raise ValueError(f"--output {args.output} has {done} lines already, more than there are to translate.")
    with _Output(args.output) as out, _progress(args) as bar:
        translations = translator.translate_lines(
            _flushing(lines, out), first=done + 1, on_batch=bar, batch_tokens=args.batch_tokens, **_settings(args)
        )
        for number, translation in enumerate(translations, start=done + 1):
            out.open().write(write(number, translation))
        # Nothing to translate makes an empty file.
        out.open()
    return 0


def _flushing(lines: Iterator[str], out: "_Output") -> Iterator[str]:
    """The lines; before the next one is waited for, what was written goes to its reader."""
    for line in lines:
        yield line
        out.flush()


def _converse(args: argparse.Namespace, translator: "Translator") -> int:
    """Lines as somebody types them."""
    settings = _settings(args)
    write = _writer(args)
    beams = settings.get("num_beams", translator.generation_config.num_beams) or 1
    streams = beams == 1 and not (args.n_best or args.scores or args.json)
    print("sparseq: type a line to translate it; Ctrl-D ends.", file=sys.stderr)
    for number, line in enumerate(_input(args), start=1):
        if streams:
            for bit in translator.stream(line, **settings):
                print(bit.replace("\n", " "), end="", flush=True)
            print(flush=True)
        else:
            print(write(number, translator.translate(line, **settings)), end="", flush=True)
    return 0


def _input(args: argparse.Namespace) -> Iterator[str]:
    from sparseq.data.lines import read_lines, read_stream

    if not args.files:
        return read_stream(sys.stdin.buffer, "standard input")
    return itertools.chain.from_iterable(map(read_lines, args.files))


def _writer(args: argparse.Namespace) -> Callable[[int, "Translation"], str]:
    """What is written for a line and its translation."""

    def as_json(number: int, translation: "Translation") -> str:
        best = [{"text": one.text, "score": round(one.score, 4)} for one in translation.hypotheses]
        return json.dumps({"line": number, "translations": best}, ensure_ascii=False) + "\n"

    def as_table(number: int, translation: "Translation") -> str:
        return "".join(f"{number}\t{one.score:.4f}\t{_one_line(one.text)}\n" for one in translation.hypotheses)

    def with_score(number: int, translation: "Translation") -> str:
        return f"{translation.score:.4f}\t{_one_line(translation.text)}\n"

    def plain(number: int, translation: "Translation") -> str:
        return f"{_one_line(translation.text)}\n"

    if args.json:
        return as_json
    if args.n_best is not None:
        return as_table
    return with_score if args.scores else plain


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


class _Output:
    """Where translations go: a file, or standard output.

    The file is made when the first is written: a run that is refused before leaves none in the way of the next.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stream: TextIO | None = None

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        if self._path is not None and self._stream is not None:
            self._stream.close()

    def open(self) -> TextIO:
        """The stream to write to."""
        if self._stream is None and self._path is not None:
            self._stream = self._path.open("a", encoding="utf-8", newline="\n")
        elif self._stream is None:
            # Ends of lines are the same on all systems, and so is the encoding.
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]  # a TextIOWrapper
            self._stream = sys.stdout
        return self._stream

    def flush(self) -> None:
        """Hand on what was written."""
        if self._stream is not None:
            self._stream.flush()


def _lines_done(args: argparse.Namespace) -> int:
    """How many lines an earlier run has translated; what it left of the next one is cut off."""
    if not args.resume or not args.output.exists():
        return 0
    return _cut_to_whole(args.output, args.n_best if args.n_best is not None and not args.json else 1)


def _cut_to_whole(path: Path, written: int) -> int:
    """Take what is not whole off the end of a file, where each line translated has `written`; how many there are."""
    whole = lines = position = 0
    with path.open("r+b") as file:
        for line in file:
            position += len(line)
            if line.endswith(b"\n"):
                lines += 1
                whole = position if lines % written == 0 else whole
        file.truncate(whole)
    return lines // written


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """A bar with lines and source tokens a second."""
    from tqdm import tqdm

    # On one screen, translations and a bar would write over each other.
    shows = args.progress or (sys.stderr.isatty() and (args.output is not None or not sys.stdout.isatty()))
    total = 0
    with tqdm(unit=" lines", disable=not shows, file=sys.stderr, dynamic_ncols=True) as bar:

        def advance(number: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            elapsed = bar.format_dict["elapsed"] if shows else 0
            if elapsed:
                bar.set_postfix_str(f"{total / elapsed:,.0f} tokens/s", refresh=False)
            bar.update(number)

        yield advance
