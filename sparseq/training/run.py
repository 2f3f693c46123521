"""One training run from a recipe: tokenizer, model, training, averaging, scores, and a folder ready to load."""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import sparseq
from sparseq.data.collation import PairCollator, TokenizedPairs, tokenize_pairs
from sparseq.data.parallel import ParallelReport, ParallelText, read_parallel
from sparseq.metrics import translation_scores
from sparseq.tokenization_sparseq import source_prefix
from sparseq.training.allocator import keep_freed_memory
from sparseq.training.averaging import average_checkpoints, complete_checkpoints
from sparseq.training.evaluation import translate_batchwise
from sparseq.training.recipes import DataRecipe, Recipe
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments

RESULTS_FILE = "results.json"
MANIFEST_FILE = "manifest.json"
_RECIPE_FILE = "recipe.json"
_TEXT_FILE = "text.json"
_VERSIONED = ("torch", "transformers", "accelerate", "tokenizers", "sacrebleu")
_CHECKPOINTS = "checkpoints"
_TOKENIZER = "tokenizer"
_GENERATED_DATA = "data"


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        output_dir: Folder with the averaged weights, configuration, tokenizer, `results.json` and `manifest.json`.
        scores: BLEU and chrF of the scored split, as `translation_scores` returns them.
        validation_loss: Cross-entropy per target token of the saved weights on the validation split.
        steps: Optimizer updates made in all.
        seconds: Wall-clock time of each part of this call ("tokenizer", "training", "decoding", "total", ...).
        sources, references, translations: The scored split.
    """

    output_dir: Path
    scores: dict[str, Any]
    validation_loss: float
    steps: int
    seconds: dict[str, float]
    sources: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    translations: list[str] = field(repr=False)


class _Stopwatch:
    """Wall-clock seconds of named parts."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def finish(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self.start, 2)}


def train(
    recipe: Recipe, output_dir: str | Path, *, resume: bool = True, progress: bool = True, bootstrap: int = 0
) -> TrainResult:
    """Run a recipe from scratch, or go on where an interrupted run of it stopped.

    Args:
        recipe: What to do.
        output_dir: Where everything goes; checkpoints into its folder "checkpoints".
        resume: Continue from the last complete checkpoint in `output_dir`. False deletes what an earlier run left.
        progress: Show progress bars and what was read.
        bootstrap: Resamples for confidence intervals of the scores; 0 leaves them out.

    Raises:
        ValueError: The recipe names no data, the data is defective, or `output_dir` holds a run of another recipe.
        FileNotFoundError: A data file is missing.
    """
    output_dir = Path(output_dir)
    keep_freed_memory()
    # One bar for the training is enough: the library would add one for every file it writes.
    transformers.utils.logging.disable_progress_bar()
    watch = _Stopwatch()
    # Said outright: otherwise several processes on a machine without accelerators do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first(), watch.part("data"):
        if state.is_main_process:
            _prepare_output(recipe, output_dir, resume=resume)
        data = locate_data(recipe, output_dir)
        texts = read_splits(data)
        if state.is_main_process:
            _check_same_text(output_dir, texts, data)
    scored = texts[data.test or data.validation]
    say = print if progress and state.is_main_process else _silent
    for text in texts.values():
        say(text.report)

    with state.main_process_first(), watch.part("tokenizer"):
        tokenizer = _load_or_train_tokenizer(recipe, data, texts[data.train], output_dir, progress)
    with watch.part("tokenization"):
        pairs, reports = _tokenize(recipe, data, texts, tokenizer)
    set_seed(recipe.seed)
    config = recipe.model_config(len(tokenizer))
    _check_special_tokens(tokenizer, config)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config = _generation_config(recipe, model)
    say(f"model: {model.num_parameters():,} parameters, {model.config.num_parameters(active=True):,} active per token")

    trainer = SparseqTrainer(
        model=model,
        args=_training_arguments(recipe, output_dir, progress),
        train_dataset=pairs[data.train],
        eval_dataset=pairs[data.validation],
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    with watch.part("training"):
        steps = _train_or_resume(trainer, recipe, output_dir / _CHECKPOINTS)
    with watch.part("averaging"):
        validation_loss = _load_average(trainer, recipe, output_dir / _CHECKPOINTS)
    state.wait_for_everyone()
    with watch.part("decoding"):
        shows = progress and state.is_main_process
        translations = _translate(model, tokenizer, scored, recipe, data, progress=shows)
    scores = translation_scores(translations, scored.targets, bootstrap=bootstrap)
    result = TrainResult(
        output_dir, scores, validation_loss, steps, watch.finish(), scored.sources, scored.targets, translations
    )
    if state.is_main_process:
        _save(result, recipe, data, reports, model, tokenizer, trainer)
    state.wait_for_everyone()
    return result


def locate_data(recipe: Recipe, output_dir: Path) -> DataRecipe:
    """The data section with its folder; writes the generated corpus into `output_dir` where the recipe asks for it.

    Raises:
        ValueError: The recipe names neither a folder nor a generated corpus, or no languages.
    """
    data = recipe.data
    if data.folder is None and data.generated_pairs:
        from sparseq.data.grammar import generate_corpus, write_corpus

        folder = output_dir / _GENERATED_DATA
        # The complete corpus appears at once: a run killed while writing must not leave half of it behind.
        if not folder.is_dir():
            partial = output_dir / f"{_GENERATED_DATA}.partial"
            write_corpus(generate_corpus(train_size=data.generated_pairs, seed=recipe.seed), partial)
            partial.rename(folder)
        return replace(data, folder=str(folder))
    missing = [f"data.{name}" for name in ("folder", "source", "target") if getattr(data, name) is None]
    if missing:
        raise ValueError(
            f"recipe {recipe.name} needs {', '.join(missing)}: add, for instance, data.folder=DIR data.source=en "
            "data.target=de for files DIR/train.en, DIR/train.de, DIR/val.en, DIR/val.de."
        )
    return data


def read_splits(data: DataRecipe) -> dict[str, ParallelText]:
    """The training, validation and test text of a located data section, by the name of the split."""
    assert data.folder is not None
    assert data.source is not None
    assert data.target is not None
    splits = dict.fromkeys([data.train, data.validation, *([data.test] if data.test else [])])
    return {
        split: read_parallel(data.folder, split, data.source, data.target, drop_empty=split == data.train)
        for split in splits
    }


def _prepare_output(recipe: Recipe, output_dir: Path, *, resume: bool) -> None:
    """Check or clear what an earlier run left, and note the recipe."""
    note = output_dir / _RECIPE_FILE
    wanted = recipe.to_dict()
    if resume and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        different = _differences(_decisive(found), _decisive(wanted))
        if different and complete_checkpoints(output_dir / _CHECKPOINTS):
            raise ValueError(
                f"{output_dir} holds a run of another recipe: {', '.join(different)}. Give another output folder, or "
                "start over with --no-resume, which deletes that run's checkpoints."
            )
        if different:
            # Killed before its first checkpoint; its tokenizer and corpus are not this recipe's.
            _delete_run(output_dir)
    elif note.is_file():
        _delete_run(output_dir)
    elif output_dir.is_dir() and any((output_dir / name).exists() for name in (_CHECKPOINTS, _TOKENIZER)):
        raise ValueError(
            f"{output_dir} holds checkpoints or a tokenizer of another program. Give another output folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _delete_run(output_dir: Path) -> None:
    for name in (_CHECKPOINTS, _TOKENIZER, _GENERATED_DATA):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / _TEXT_FILE).unlink(missing_ok=True)


def _check_same_text(output_dir: Path, texts: dict[str, ParallelText], data: DataRecipe) -> None:
    """Refuse to continue on other text than the tokenizer and the checkpoints were made from; else note its hashes."""
    note = output_dir / _TEXT_FILE
    wanted = {split: texts[split].report.files for split in (data.train, data.validation)}
    has_work = (output_dir / _TOKENIZER).is_dir() or bool(complete_checkpoints(output_dir / _CHECKPOINTS))
    if has_work and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        # By hash alone: the same text may lie elsewhere now.
        changed = [
            split for split in wanted if sorted(found.get(split, {}).values()) != sorted(wanted[split].values())
        ]
        if changed:
            raise ValueError(
                f"{output_dir} holds a run on other text: the files of {', '.join(changed)} in {data.folder} have "
                "changed or are others. Give another output folder, or start over with --no-resume."
            )
    _write_json(note, wanted)


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse a tokenizer whose special tokens are not the model's; only one given by `tokenizer.path` can differ."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"`tokenizer.path` names a tokenizer whose `{name}` is {getattr(tokenizer, name)}, but a recipe's "
                f"model has {getattr(config, name)}. Train one with `sparseq train-tokenizer`, or leave the path out."
            )
    ends = tokenizer("a")["input_ids"]
    if not ends or ends[-1] != config.eos_token_id:
        raise ValueError(
            "`tokenizer.path` names a tokenizer that does not put its end-of-sentence token behind a text, so the "
            "model would never learn to stop. Train one with `sparseq train-tokenizer`, or leave the path out."
        )


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """What must not change between a run and its continuation, flat."""
    free = {"logging_steps", "save_steps", "eval_steps", "max_steps", "average_checkpoints"}
    if recipe["training"]["lr_scheduler"] in ("linear", "cosine"):
        free.remove("max_steps")
    flat = {"seed": recipe["seed"]}
    for section in ("model", "tokenizer", "data", "training"):
        flat |= {f"{section}.{key}": value for key, value in recipe[section].items() if key not in free}
    # The folder may have moved; its files are what counts, and they are hashed in the manifest.
    return {key: value for key, value in flat.items() if key not in ("data.folder", "data.test")}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    keys = sorted(found.keys() | wanted.keys())
    return [f"{key} was {found.get(key)}, is {wanted.get(key)}" for key in keys if found.get(key) != wanted.get(key)]


def _load_or_train_tokenizer(
    recipe: Recipe, data: DataRecipe, text: ParallelText, output_dir: Path, progress: bool
) -> PreTrainedTokenizerBase:
    section = recipe.tokenizer
    if section.path is not None:
        return AutoTokenizer.from_pretrained(section.path)
    folder = output_dir / _TOKENIZER
    if not folder.is_dir():
        from sparseq.training.tokenizer import train_tokenizer

        assert data.target is not None
        tokenizer = train_tokenizer(
            [*text.sources, *text.targets],
            vocab_size=section.vocab_size,
            algorithm=section.algorithm,
            language_tags=[data.target],
            lowercase=section.lowercase,
            min_frequency=section.min_frequency,
            character_coverage=section.character_coverage,
            model_max_length=data.max_length,
            show_progress=progress,
        )
        partial = output_dir / f"{_TOKENIZER}.partial"
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def _tokenize(
    recipe: Recipe, data: DataRecipe, texts: dict[str, ParallelText], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, TokenizedPairs], dict[str, ParallelReport]]:
    assert data.target is not None
    limit = min(data.max_length, recipe.training.tokens_per_batch // 2)
    pairs, reports = {}, {name: text.report for name, text in texts.items()}
    for split in dict.fromkeys([data.train, data.validation]):
        pairs[split], reports[split] = tokenize_pairs(
            tokenizer,
            texts[split],
            max_length=limit,
            drop_long=split == data.train,
            source_prefix=source_prefix(tokenizer, data.target),
        )
    return pairs, reports


def _generation_config(recipe: Recipe, model: PreTrainedModel) -> GenerationConfig:
    decoding = recipe.decoding
    beams = {"num_beams": decoding.num_beams, "length_penalty": float(decoding.length_penalty), "early_stopping": True}
    return GenerationConfig(
        max_length=decoding.max_length,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        **(beams if decoding.num_beams > 1 else {}),
    )


def _training_arguments(recipe: Recipe, output_dir: Path, progress: bool) -> SparseqTrainingArguments:
    section = recipe.training
    return SparseqTrainingArguments(
        output_dir=str(output_dir / _CHECKPOINTS),
        tokens_per_batch=section.tokens_per_batch,
        budget_counts=section.budget_counts,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        max_steps=section.max_steps,
        learning_rate=float(section.learning_rate),
        lr_scheduler_type=section.lr_scheduler,
        warmup_steps=section.warmup_steps,
        adam_beta1=float(section.adam_beta1),
        adam_beta2=float(section.adam_beta2),
        adam_epsilon=section.adam_epsilon,
        weight_decay=float(section.weight_decay),
        max_grad_norm=float(section.max_grad_norm),
        bf16=section.bf16,
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps or None,
        save_strategy="steps",
        save_steps=section.save_steps,
        save_total_limit=max(2, section.average_checkpoints),
        logging_steps=section.logging_steps,
        disable_tqdm=not progress,
        report_to="none",
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        # Not the library's: its label names come from a signature that also has `decoder_...` arguments.
        label_names=["labels"],
        remove_unused_columns=False,
        # Experts are stacked in one parameter, so a step reaches every parameter even if it skips an expert.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _train_or_resume(trainer: SparseqTrainer, recipe: Recipe, checkpoints: Path) -> int:
    """Train to the last step, from the last complete checkpoint if there is one; returns the steps made."""
    done = complete_checkpoints(checkpoints)
    last_step = int(done[-1].name.rpartition("-")[2]) if done else 0
    # A finished run must not be resumed: Trainer would make one more step before it notices.
    if last_step < recipe.training.max_steps:
        last_step = trainer.train(resume_from_checkpoint=str(done[-1]) if done else None).global_step
    return last_step


def _load_average(trainer: SparseqTrainer, recipe: Recipe, checkpoints: Path) -> float:
    """Put the mean of the last checkpoints into the model; returns its validation loss."""
    chosen = complete_checkpoints(checkpoints)[-recipe.training.average_checkpoints :]
    weights = average_checkpoints(chosen)
    model = trainer.accelerator.unwrap_model(trainer.model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Tied weights are stored once; anything else that is absent would silently keep its last value.
    tied = set(model.all_tied_weights_keys)
    lacking = [name for name in missing if name not in tied]
    if lacking or unexpected:
        raise ValueError(f"The checkpoints in {checkpoints} do not fit the model: {(lacking + unexpected)[:5]}.")
    return trainer.evaluate()["eval_loss"]


def _translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: ParallelText,
    recipe: Recipe,
    data: DataRecipe,
    *,
    progress: bool,
) -> list[str]:
    assert data.target is not None
    return translate_batchwise(
        model,
        tokenizer,
        text.sources,
        prefix=source_prefix(tokenizer, data.target),
        batch_tokens=recipe.decoding.batch_tokens,
        max_source_length=data.max_length,
        progress=progress,
    )


def _save(
    result: TrainResult,
    recipe: Recipe,
    data: DataRecipe,
    reports: dict[str, ParallelReport],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trainer: SparseqTrainer,
) -> None:
    folder = result.output_dir
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    split = data.test or data.validation
    (folder / f"{split}.{data.target}.translated").write_text(
        "".join(line.replace("\n", " ") + "\n" for line in result.translations), encoding="utf-8"
    )
    results = {
        "recipe": recipe.name,
        "split": split,
        "source": data.source,
        "target": data.target,
        "scores": result.scores,
        "validation_loss": result.validation_loss,
        "steps": result.steps,
        "parameters": model.num_parameters(),
        "active_parameters": model.config.num_parameters(active=True),
        "seconds": result.seconds,
        "log": trainer.state.log_history,
    }
    _write_json(folder / RESULTS_FILE, results)
    _write_json(folder / MANIFEST_FILE, manifest(recipe, list(reports.values()), vocab_size=len(tokenizer)))


def manifest(recipe: Recipe, reports: Sequence[ParallelReport], *, vocab_size: int) -> dict[str, Any]:
    """What is needed to repeat a run: versions, commit, seed, hashes of the data, and the recipe."""
    return {
        "recipe": {"name": recipe.name, **recipe.to_dict()},
        "seed": recipe.seed,
        "vocab_size": vocab_size,
        "data": {
            report.split: {
                "pairs": report.pairs,
                "kept": report.kept,
                "empty_source": report.empty_source,
                "empty_target": report.empty_target,
                "too_long": report.too_long,
                "sha256": report.files,
            }
            for report in reports
        },
        "versions": {
            "sparseq": sparseq.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONED},
        },
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def _commit() -> str | None:
    """Commit of the clone that this package runs from, with "-dirty" for local changes; None outside a clone."""
    root = Path(sparseq.__file__).resolve().parent.parent
    # In site-packages a repository found further up would be someone else's.
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silent(*args: object) -> None:
    pass
