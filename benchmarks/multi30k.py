"""Multi30k translated from text alone, on the papers' text with the papers' score: Wu et al. 2021, and further arms.

    python benchmarks/multi30k.py run multi30k runs                    # hours an arm; goes on where it stopped
    python benchmarks/multi30k.py run multi30k runs --arms paper --targets de fr --seeds 1 2 3
    accelerate launch --num_processes 2 benchmarks/multi30k.py run ...         # shares the two batches of an update
    python benchmarks/multi30k.py report runs --split val              # arms are compared on this one alone
    python benchmarks/multi30k.py report runs --json multi30k.json     # the test set, beside published figures
    python benchmarks/multi30k.py report runs --unfinished             # also runs that have not ended yet
    python benchmarks/multi30k.py captions captions.de.gz tok          # plain captions as that text, for pre-training
    python benchmarks/multi30k.py run multi30k runs --arms pretrained --start FOLDER

DATA is a folder with train, val and test_2016_flickr as {split}.lc.norm.tok.{en,de,fr}[.gz]: lower-cased, normalised
and tokenised by the authors of the public multi30k/dataset repository. A run that was stopped goes on from its last
checkpoint, and one that is finished is not run again. `report` and `captions` need sacremoses, and `report` keeps the
translations that it has to make (of the validation set, and of unfinished runs) in RUNS/translations.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interleave import setting  # type: ignore[import-not-found]  # these two lie beside this script
from run_results import (  # type: ignore[import-not-found]
    curve,
    mean_figures,
    validation_losses,
)
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from sparseq.data.lines import file_hash, read_lines
from sparseq.data.parallel import ParallelText, read_parallel
from sparseq.metrics.command import figure_cell
from sparseq.metrics.corpus import Bleu, Chrf
from sparseq.metrics.scoring import score_predictions
from sparseq.text_table import format_table
from sparseq.training.allocator import keep_freed_memory
from sparseq.training.average_command import write_average
from sparseq.training.checkpoints import checkpoint_step, complete_checkpoints
from sparseq.training.fitting import prepare_process
from sparseq.training.recipes import Recipe, build_recipe, load_recipe
from sparseq.training.run import train
from sparseq.training.text import translate_text


@dataclass(frozen=True)
class Arm:
    """A recipe with changes; its runs lie in the folders FOLDER-TARGET-SEED.

    Attributes:
        starts: Whether it goes on from the weights of `run --start`.
    """

    folder: str
    recipe: str
    overrides: tuple[str, ...] = ()
    starts: bool = False


def _goes_on(folder: str, *overrides: str) -> Arm:
    """An arm that goes on from another model."""
    shared = ("training.lr_scheduler=cosine", "training.save_steps=50", "training.eval_steps=100")
    return Arm(folder, "finetune", (*shared, *overrides), starts=True)


def _with_machine_translations(folder: str, *overrides: str) -> Arm:
    """One on DATA with translations by machine among its pairs."""
    shared = ("model.dropout=0.1", "training.learning_rate=2e-3", "training.average_checkpoints=5")
    return _goes_on(folder, *shared, *overrides)


ARMS = {
    "paper": Arm("tiny-2021", "transformer-tiny-2021"),
    "sparse": Arm("sparse", "tiny-sparse", ("model.router_balancing=loss_free", "model.router_scoring=sigmoid")),
    "pretrained": _goes_on(
        *("pretrained", "model.dropout=0.3", "training.learning_rate=2e-3"),
        *("training.max_steps=2200", "training.average_checkpoints=10"),
    ),
    "augmented": _with_machine_translations("augmented", "training.max_steps=3000"),
    # From a model of both languages.
    "joint": _with_machine_translations("joint", "model.dropout=0.15", "training.max_steps=2200"),
    # From the paper's model, with captions that it has translated itself.
    "self-taught": _with_machine_translations("self-taught", "model.dropout=0.15", "training.max_steps=700"),
    # Once more, where the best model so far has translated. The penalty is the best on the validation set.
    "again": _with_machine_translations("again", "training.max_steps=6000", "decoding.length_penalty=1.6"),
    # From one of these, on people's translations alone.
    "adapted": _goes_on(
        *("adapted", "model.dropout=0.3", "training.learning_rate=5e-4"),
        *("training.max_steps=600", "training.average_checkpoints=5"),
    ),
}
SOURCE, TARGETS = "en", ("de", "fr")
SPLITS = {"train": "train.lc.norm.tok", "val": "val.lc.norm.tok", "test": "test_2016_flickr.lc.norm.tok"}
# BLEU of tokenised lower-cased text, test_2016_flickr. The first: Wu et al. 2021, "Good for Misconceived Reasons: An
# Empirical Revisiting on the Need for Visual Context in Multimodal Machine Translation", its text-only
# Transformer-Tiny. The second: the best text-only figure since that we know of.
PUBLISHED = {
    "Wu et al. 2021, Transformer-Tiny": {"de": 41.02, "fr": 61.80},
    "best text-only figure since": {"de": 42.50, "fr": 63.71},
}
RESAMPLES = 1000


def run(args: argparse.Namespace) -> None:
    """Train, translate and score every arm with every target and seed that is not finished yet."""
    missing = [arm for arm in args.arms if ARMS[arm].starts and args.start is None]
    if missing:
        raise SystemExit(
            f"arm {missing[0]} goes on from another model: name it with --start (docs/results.md has the commands "
            f"that make one), or leave the arm out"
        )
    processes = prepare_process().num_processes
    for seed in args.seeds:
        for target in args.targets:
            for arm in args.arms:
                folder = args.output / f"{ARMS[arm].folder}-{target}-{seed}"
                if (folder / "results.json").is_file():
                    print(f"{folder} is finished")
                    continue
                recipe = arm_recipe(ARMS[arm], args.data, target, seed, args.start, processes)
                print(f"{folder}: recipe {recipe.name} {' '.join(ARMS[arm].overrides)}", flush=True)
                train(recipe, folder, bootstrap=RESAMPLES)


def arm_recipe(arm: Arm, data: Path, target: str, seed: int, start: Path | None = None, processes: int = 1) -> Recipe:
    """The recipe of one run."""
    places = {"folder": data, "source": SOURCE, "target": target}
    places |= {"train": SPLITS["train"], "validation": SPLITS["val"], "test": SPLITS["test"]}
    changes = [f"data.{key}={value}" for key, value in places.items()]
    if arm.starts:
        changes.append(f"start.checkpoint={start}")
    changes = [*arm.overrides, *changes, f"seed={seed}"]
    # Several processes share the batches that a recipe sums up for an update, so that it remains the recipe's.
    # An update of one batch grows with the processes.
    batches = load_recipe(arm.recipe, changes).training.gradient_accumulation_steps
    if batches % processes == 0:
        changes.append(f"training.gradient_accumulation_steps={batches // processes}")
    elif batches > 1:
        raise SystemExit(
            f"recipe {arm.recipe} has {batches} batches an update, which {processes} processes cannot share: start "
            f"as many processes as divide {batches}"
        )
    return load_recipe(arm.recipe, changes)


def report(args: argparse.Namespace) -> None:
    """Print the scores of the runs, their means over seeds, the published figures and the validation losses."""
    _check_moses()
    keep_freed_memory()
    rows = []
    for arm, target, seed, folder in find_runs(args.output):
        if (folder / "results.json").is_file() or (args.unfinished and _checkpoints(folder)):
            row = report_run(folder, target, args.split, args.data)
            rows.append({"arm": arm, "target": target, "seed": seed, **row})
    if not rows:
        raise SystemExit(
            f"{args.output} holds no finished run of {', '.join(ARMS)}: use `run` first, or --unfinished for those "
            "that have a checkpoint"
        )
    means = seed_means(rows)
    print(f"{SPLITS[args.split]}, {rows[0]['detokenised']['sentences']:,} sentences, ± half a 95% bootstrap interval")
    print(format_table(score_rows(rows, means, published=args.split == "test")))
    print(f"tokenised: {rows[0]['tokenised']['bleu_signature']}")
    print(f"detokenised: {rows[0]['detokenised']['bleu_signature']}, {rows[0]['detokenised']['chrf_signature']}")
    for row in rows:
        print(f"validation loss, {_name(row)}: {curve(row['validation_losses'])}")
    if args.json:
        published = PUBLISHED if args.split == "test" else {}
        content = {"setting": setting(), "split": SPLITS[args.split], "published": published}
        args.json.write_text(json.dumps({**content, "runs": rows, "means": means}, indent=2) + "\n", "utf-8")


def captions(args: argparse.Namespace) -> None:
    """Write plain captions, NAME.LANGUAGE[.gz], as OUTPUT/NAME.lc.norm.tok.LANGUAGE."""
    _check_moses()
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        name, _, language = path.name.removesuffix(".gz").rpartition(".")
        if not name or not language:
            raise SystemExit(f"{path} must be named NAME.LANGUAGE or NAME.LANGUAGE.gz, such as captions.de.gz")
        written = args.output / f"{name}.lc.norm.tok.{language}"
        with written.open("w", encoding="utf-8") as stream:
            lines = tqdm(tokenize(read_lines(path), language), desc=str(written), unit=" lines", unit_scale=True)
            stream.writelines(f"{line}\n" for line in lines)


def tokenize(lines: Iterable[str], language: str) -> Iterator[str]:
    """Lower-case, normalise and tokenise as the authors of the data set did: of its raw parallel text this makes their
    tokenised text, but for a line in a thousand with quotation marks."""
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)
    for line in lines:
        yield tokenizer.tokenize(normalizer.normalize(line.lower()), return_str=True)


def find_runs(output: Path) -> list[tuple[str, str, int, Path]]:
    """Arm, target, seed and folder of every run in `output`, in the order of the arms."""
    found = []
    for number, (name, arm) in enumerate(ARMS.items()):
        for path in output.glob(f"{arm.folder}-*-*"):
            match = re.fullmatch(rf"{re.escape(arm.folder)}-({'|'.join(TARGETS)})-(\d+)", path.name)
            if match:
                found.append((TARGETS.index(match[1]), number, int(match[2]), name, match[1], path))
    return [(name, target, seed, path) for _, _, seed, name, target, path in sorted(found)]


def report_run(folder: Path, target: str, split: str, data: Path | None) -> dict[str, Any]:
    """Everything about one run.

    Args:
        folder: A finished run, or one with a checkpoint: then the mean of its last checkpoints is scored, of as many
            as its recipe averages.
        target: Its target language.
        split: "val" or "test".
        data: Folder of the text; None: where the run found it.
    """
    kept = folder.parent / "translations"
    recipe = build_recipe(folder.name, json.loads((folder / "recipe.json").read_text("utf-8")))
    text = read_parallel(data or str(recipe.data.folder), SPLITS[split], SOURCE, target, drop_empty=False)
    finished = (folder / "results.json").is_file()
    if finished:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        updates, loss, log = results["steps"], results["validation_loss"], results["log"]
        translated = folder / f"{SPLITS['test']}.{target}.translated"
        lines = _lines(translated) if split == "test" else translate([folder], text, recipe, kept)
    else:
        averaged = _checkpoints(folder)[-recipe.training.average_checkpoints :]
        updates, loss = checkpoint_step(averaged[-1]), None
        log = json.loads((averaged[-1] / "trainer_state.json").read_text("utf-8"))["log_history"]
        lines = translate(averaged, text, recipe, kept)
    config: Any = AutoConfig.from_pretrained(folder if finished else averaged[-1])
    return {
        "finished": finished,
        "updates": updates,
        "max_updates": recipe.training.max_steps,
        "averaged_updates": None if finished else [checkpoint_step(path) for path in averaged],
        "parameters": config.num_parameters(),
        "active_parameters": config.num_parameters(active=True),
        **score(lines, text.targets, target),
        "validation_loss": loss,
        "validation_losses": validation_losses(log, finished=finished),
    }


def translate(models: Sequence[Path], text: ParallelText, recipe: Recipe, kept: Path) -> list[str]:
    """Translations by a model, or by the mean of the weights of several checkpoints, decoded as the run decodes.

    Args:
        models: Folder of the model, or of each checkpoint.
        text: What to translate.
        recipe: The run's.
        kept: Folder of translations, which are made once.
    """
    made_of = [*(file_hash(model / "model.safetensors") for model in models), *text.report.files.values()]
    key = hashlib.sha256(json.dumps([*made_of, asdict(recipe.decoding)]).encode()).hexdigest()[:16]
    path = kept / f"{key}.{text.language}.translated"
    if not path.is_file():
        updates = f", mean of {len(models)} checkpoints up to {models[-1].name}" if len(models) > 1 else ""
        print(f"translating {text.report.split} by {recipe.name}{updates}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            model = models[0]
            if len(models) > 1:
                model = Path(folder) / "mean"
                write_average(models, model)
            translations = _translate(model, text, recipe)
        kept.mkdir(exist_ok=True)
        path.write_text("".join(line.replace("\n", " ") + "\n" for line in translations), "utf-8")
    return _lines(path)


def score(translations: Sequence[str], references: Sequence[str], language: str) -> dict[str, dict[str, Any]]:
    """Scores as papers have them, of the tokenised text, and those of the text as people write it."""
    tokenised = score_predictions(translations, references, [Bleu(tokenize="none")], bootstrap=RESAMPLES)
    plain, plain_references = (detokenize(lines, language) for lines in (translations, references))
    detokenised = score_predictions(plain, plain_references, [Bleu(), Chrf()], bootstrap=RESAMPLES)
    return {"tokenised": tokenised.report(), "detokenised": detokenised.report()}


def detokenize(lines: Sequence[str], language: str) -> list[str]:
    """Undo the Moses tokenizer, its "&apos;" and other escapes included.

    It gives the raw text of test_2016_flickr, normalised and lower-cased, for 997 of the 1,000 German and 999 of the
    French references; the others differ in a space or the place of a quotation mark.
    """
    # Imported here: nothing but this report needs it.
    from sacremoses import MosesDetokenizer

    detokenizer = MosesDetokenizer(lang=language)
    return [detokenizer.detokenize(line.split()) for line in lines]


def seed_means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the finished seeds of each arm and target that has several."""
    means = []
    for arm, target in dict.fromkeys((row["arm"], row["target"]) for row in rows):
        seeds = [row for row in rows if (row["arm"], row["target"]) == (arm, target) and row["finished"]]
        if len(seeds) > 1:
            mean = {
                "arm": arm,
                "target": target,
                "seeds": [row["seed"] for row in seeds],
                "tokenised": mean_figures([row["tokenised"] for row in seeds], ["bleu"]),
                "detokenised": mean_figures([row["detokenised"] for row in seeds], ["bleu", "chrf"]),
                **mean_figures(seeds, ["validation_loss"]),
            }
            means.append(mean)
    return means


def score_rows(
    rows: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]], *, published: bool
) -> list[tuple[str, ...]]:
    """The rows of the table, header first: for each target its runs, the means over seeds, the published figures."""
    header = ("run", "updates", "BLEU, tokenised", "BLEU, detokenised", "chrF, detokenised", "validation loss")
    cells: list[tuple[str, ...]] = [header]
    for target in dict.fromkeys(row["target"] for row in rows):
        for row in [row for row in rows if row["target"] == target]:
            of = "" if row["finished"] else f" of {row['max_updates']:,}"
            cells.append((_name(row), f"{row['updates']:,}{of}", *_figures(row)))
        for row in [row for row in means if row["target"] == target]:
            cells.append((f"{row['arm']}, {target}, mean of {len(row['seeds'])}", "", *_figures(row)))
        for name, figures in PUBLISHED.items() if published else ():
            cells.append((f"{name}, {target}", "", f"{figures[target]:.2f}", "", "", ""))
    return cells


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    scores = (("tokenised", "bleu"), ("detokenised", "bleu"), ("detokenised", "chrf"))
    loss = row["validation_loss"]
    return *(figure_cell(row[text], figure) for text, figure in scores), "" if loss is None else f"{loss:.4f}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['arm']}, {row['target']}, seed {row['seed']}"


def _checkpoints(folder: Path) -> list[Path]:
    # One from an interruption is not what the run will average.
    return complete_checkpoints(folder / "checkpoints", scheduled=True)


def _lines(path: Path) -> list[str]:
    # Not splitlines, which knows other ends of lines than "\n" too.
    return path.read_text("utf-8").split("\n")[:-1]


def _translate(folder: Path, text: ParallelText, recipe: Recipe) -> list[str]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    return translate_text(model, AutoTokenizer.from_pretrained(folder), text, recipe, recipe.data, progress=True)


def _check_moses() -> None:
    try:
        import sacremoses  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit("this needs Moses' tokenizer: pip install sacremoses") from error


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    part = commands.add_parser("run", help="train the arms, or go on")
    part.set_defaults(function=run)
    part.add_argument("data", type=Path, metavar="DATA", help="folder of the tokenised captions")
    part.add_argument("output", type=Path, metavar="RUNS", help="folder for the runs")
    from_random = [name for name, arm in ARMS.items() if not arm.starts]
    part.add_argument(
        "--arms", nargs="+", choices=ARMS, default=from_random, help="default: those from random weights"
    )
    part.add_argument("--start", type=Path, metavar="FOLDER", help="the model that the other arms go on from")
    part.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    part.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="default: 1")
    part = commands.add_parser("report", help="score what is finished")
    part.set_defaults(function=report)
    part.add_argument("output", type=Path, metavar="RUNS")
    part.add_argument("--data", type=Path, help="folder of the captions, where they have moved since")
    part.add_argument("--split", choices=["val", "test"], default="test", help="default: test")
    part.add_argument(
        "--unfinished", action="store_true", help="also the mean of the last checkpoints of runs that have not ended"
    )
    part.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    part = commands.add_parser("captions", help="tokenise plain captions as the data set's authors did")
    part.set_defaults(function=captions)
    part.add_argument("files", nargs="+", type=Path, metavar="FILE", help="NAME.LANGUAGE[.gz], a caption a line")
    part.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write to")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
