"""`sparseq demo`: train, score, translate, save and reload a small sparse model, from nothing or on your own text."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Train a small sparse translation model and show all of it: tokenizer, training, BLEU and chrF on held-out pairs, sample
translations, the load of the experts, and a Hub-ready folder that a fresh process loads back, once with this package
and once with transformers alone.

Without --data it generates an English-German corpus from a grammar (under 5 minutes on 2 CPU cores, no network). With
--data it trains on real text: files {train,val,TEST}.{SOURCE,TARGET}, plain or .gz, one sentence a line, aligned.

Killed, it goes on from the last checkpoint when the same command is given again.
"""

_EPILOG = """\
examples:
  sparseq demo
      the generated corpus
  sparseq demo --quick
      the same in less than a minute, with a model that has learned next to nothing: to see that everything works
  sparseq demo --data multi30k/data/task1/raw --source en --target de --test test_2016_flickr
      image captions from a clone of the public multi30k/dataset repository (about half an hour)
  sparseq demo --data corpus --source en --target fr --test test training.max_steps=3000
      your own text, with one value of the recipe changed
"""

_QUICK = ["training.max_steps=12", "training.eval_steps=6", "training.save_steps=6", "data.generated_pairs=600"]
_QUICK += ["training.warmup_steps=4", "training.logging_steps=2", "tokenizer.vocab_size=800", "decoding.max_length=40"]
_SAMPLES = 6
_LOAD_BATCH, _LOAD_SENTENCES = 50, 500

# Run by a fresh interpreter: loads a folder and translates, as a user of the Hub would.
_RELOAD = """
import json, sys
if sys.argv[1] == "package":
    import sparseq
    options = {}
else:
    sys.modules["sparseq"] = None  # any import of the package would fail
    options = {"trust_remote_code": True}
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, job = sys.argv[2], json.load(open(sys.argv[3], encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()
batch = tokenizer(job["sources"], padding=True, return_tensors="pt")
texts = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
print(json.dumps({"model": type(model).__module__, "translations": texts}))
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="train, score, translate, save and reload a small sparse model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--data", metavar="DIR", help="folder with real text instead of the generated corpus")
    parser.add_argument("--source", metavar="LANG", help="ending of the source files, such as en")
    parser.add_argument("--target", metavar="LANG", help="ending of the target files, such as de")
    parser.add_argument("--test", metavar="NAME", help="beginning of the test files' names (default: test)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="output folder (default: outputs/demo[-SOURCE-TARGET][-quick])"
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="another recipe, by name or as a YAML file")
    parser.add_argument("--quick", action="store_true", help="a few updates only, to see that everything works")
    parser.add_argument("--no-resume", action="store_true", help="start over, deleting an earlier run's checkpoints")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit status: 1 if a reload gives another output."""
    recipe, output = _settle(args)
    from sparseq.training.run import train

    start = time.perf_counter()
    _headline(f"Training ({recipe.name}: {recipe.description})")
    result = train(recipe, output, resume=not args.no_resume)
    _headline(f"Scores on {len(result.references):,} held-out pairs")
    _show_scores(recipe, result)
    _headline("Samples")
    _show_samples(result)
    _headline(f"Expert load on {_LOAD_SENTENCES} of them")
    folder = _write_folder(recipe, result)
    _headline("Reloading in fresh processes")
    is_equal = _reload(folder, result.sources[:_SAMPLES], recipe)
    seconds = time.perf_counter() - start
    print(f"\nDone in {seconds / 60:.1f} minutes. Ready for the Hub: {folder}")
    print(f"Scores, loss curve and seconds: {output / 'results.json'}; how to repeat it: {output / 'manifest.json'}")
    return 0 if is_equal else 1


def _settle(args: argparse.Namespace) -> tuple[Any, Path]:
    """The recipe and the output folder that the arguments ask for, checked before anything long begins."""
    from sparseq.training.recipes import load_recipe

    named = {"--source": args.source, "--target": args.target, "--test": args.test}
    if args.data is None:
        given = [option for option, value in named.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} describe the files of --data DIR; give that folder too")
        overrides, name, output = [], "demo", Path("outputs/demo")
    else:
        missing = [option for option in ("--source", "--target") if named[option] is None]
        if missing:
            raise ValueError(f"--data needs {' and '.join(missing)}, for instance --source en --target de")
        values = {"folder": args.data, "source": args.source, "target": args.target, "test": args.test or "test"}
        # A JSON string is YAML, whatever is in it: 2016 stays a name.
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
        name, output = "multi30k", Path(f"outputs/demo-{args.source}-{args.target}")
    if args.quick:
        overrides += _QUICK if args.data is None else [item for item in _QUICK if "generated" not in item]
        output = output.with_name(f"{output.name}-quick")
    recipe = load_recipe(args.recipe or name, [*overrides, *args.overrides])
    return recipe, args.output or output


def _headline(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _show_scores(recipe: Any, result: Any) -> None:
    from sparseq.metrics import translation_scores
    from sparseq.training.sections import METRIC_FIGURES

    for metric in recipe.scoring.metrics:
        for figure, label in METRIC_FIGURES[metric].items():
            print(f"{label:4} {result.scores[figure]:6.2f}   {result.scores[f'{metric}_signature']}")
    if recipe.data.folder is not None or not recipe.data.generated_pairs:
        return
    from sparseq.data.grammar import generate_corpus, is_held_out, word_for_word

    # The same seed gives the same pairs again, now with the rules that made them.
    test = generate_corpus(train_size=recipe.data.generated_pairs, seed=recipe.seed).test
    rows = [row for row, pair in enumerate(test) if is_held_out(pair)]
    options = {"tokenize": recipe.scoring.tokenize, "lowercase": recipe.scoring.lowercase}
    kept_apart = translation_scores(
        [result.translations[row] for row in rows], [result.references[row] for row in rows], **options
    )
    dictionary = translation_scores([word_for_word(source) for source in result.sources], result.references, **options)
    print(f"BLEU {kept_apart['bleu']:6.2f}   on the {len(rows)} pairs that combine rules never seen together")
    print(f"BLEU {dictionary['bleu']:6.2f}   a word-for-word dictionary, for comparison")


def _show_samples(result: Any) -> None:
    for source, reference, translation in zip(
        result.sources[:_SAMPLES], result.references, result.translations, strict=False
    ):
        same = "   (as the reference)" if translation == reference else ""
        print(f"source       {source}\nreference    {reference}\ntranslation  {translation}{same}\n")


def _write_folder(recipe: Any, result: Any) -> Path:
    """Load what was trained, measure its experts, and write the Hub-ready folder."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from sparseq.hub.facts import facts_of_run
    from sparseq.hub.folder import write_hub_folder
    from sparseq.inspection.experts import expert_load, format_expert_load
    from sparseq.inspection.plots import plot_run
    from sparseq.tokenization_sparseq import source_prefix

    model = AutoModelForSeq2SeqLM.from_pretrained(result.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    prefix = source_prefix(tokenizer, recipe.data.target)
    loads = expert_load(model, _batches(tokenizer, result, prefix))
    print(format_expert_load(loads))
    log = json.loads((result.output_dir / "results.json").read_text("utf-8"))["log"]
    picture = plot_run(log, loads, result.output_dir / "run.png")
    print(f"\nLoss curve and expert load: {picture}" if picture else "\n(install sparseq[plot] to get them drawn)")
    # A sentence of the grammar, where there is one: a small model knows no other.
    facts = facts_of_run(result.output_dir)
    example = prefix + result.sources[0] if recipe.data.folder is None else facts.example
    facts = replace(facts, expert_load=loads, example=example)
    return write_hub_folder(model, tokenizer, result.output_dir / "hub", card=facts)


def _batches(tokenizer: Any, result: Any, prefix: str) -> Any:
    for first in range(0, min(_LOAD_SENTENCES, len(result.sources)), _LOAD_BATCH):
        rows = slice(first, first + _LOAD_BATCH)
        batch = tokenizer([prefix + source for source in result.sources[rows]], padding=True, return_tensors="pt")
        target = tokenizer(text_target=result.references[rows], padding=True, return_tensors="pt")
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        yield {**batch, "labels": labels}


def _reload(folder: Path, sources: list[str], recipe: Any) -> bool:
    """Translate in this process, in a fresh one, and in one without the package; say whether all agree."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from sparseq.tokenization_sparseq import source_prefix

    tokenizer = AutoTokenizer.from_pretrained(folder)
    job = {"sources": [source_prefix(tokenizer, recipe.data.target) + source for source in sources]}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    batch = tokenizer(job["sources"], padding=True, return_tensors="pt")
    expected = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
    is_equal = True
    with tempfile.TemporaryDirectory() as scratch:
        job_file = Path(scratch) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        for way, words in (
            ("package", "import sparseq"),
            ("remote", "transformers alone, trust_remote_code=True"),
        ):
            command = [sys.executable, "-c", _RELOAD, way, str(folder.resolve()), str(job_file)]
            done = subprocess.run(
                command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL, cwd=scratch
            )
            if done.returncode:
                raise RuntimeError(f"{folder} could not be loaded with {words}:\n{done.stderr}")
            answer = json.loads(done.stdout.splitlines()[-1])
            same = answer["translations"] == expected
            is_equal &= same
            verdict = "the same translations" if same else "OTHER TRANSLATIONS"
            print(f"AutoModelForSeq2SeqLM, {words}: {verdict} ({answer['model']})")
    return is_equal
