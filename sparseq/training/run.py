"""One training run from a recipe: tokenizer, model, training, averaging, scores, and a folder ready to load."""

import importlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)

import sparseq
from sparseq.data.collation import PairCollator
from sparseq.data.parallel import ParallelReport, ParallelText
from sparseq.data.store import Store
from sparseq.training.allocator import keep_freed_memory
from sparseq.training.averaging import average_checkpoints
from sparseq.training.checkpoints import (
    INCOMPLETE,
    checkpoint_step,
    complete_checkpoints,
    last_complete_checkpoint,
    publish_files,
    remove_leftovers,
    write_json,
)
from sparseq.training.precision import uses_bf16
from sparseq.training.recipes import Recipe
from sparseq.training.sections import DataRecipe, TrainingRecipe
from sparseq.training.start import (
    Checkpoint,
    add_adapter,
    check_special_tokens,
    load_adapter_weights,
    load_model,
    open_checkpoint,
)
from sparseq.training.text import (
    GENERATED_DATA,
    describe_tokens,
    language_pairs,
    languages,
    locate_data,
    read_splits,
    score_text,
    sentences,
    tokenize_splits,
    translate_text,
    write_translations,
)
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments

RESULTS_FILE = "results.json"
MANIFEST_FILE = "manifest.json"
_RECIPE_FILE = "recipe.json"
_TEXT_FILE = "text.json"
_START_FILE = "start.json"
_VERSIONED = ("torch", "transformers", "accelerate", "tokenizers", "sacrebleu")
_CHECKPOINTS = "checkpoints"
_TOKENIZER = "tokenizer"
_MERGED = "merged"
_CACHE = "cache"
# Where the text lies may change between a run and its continuation: its files are hashed.
_PLACES = ("folder", "dataset", "train_files", "validation_files", "test_files", "streaming")


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        output_dir: Folder with the averaged weights, configuration, tokenizer, `results.json` and `manifest.json`.
        scores: BLEU and chrF of the scored split, as `translation_scores` returns them.
        validation_loss: Cross-entropy per target token of the saved weights on the validation split.
        steps: Optimizer updates made in all.
        seconds: Wall-clock time of each part of this call ("tokenizer", "training", "decoding", "total", ...).
        sources, references, translations: The scored split, one language pair after the other.
        language_pairs: "scores" and "validation_loss" of each language pair where the run has several; `scores` has
            their means then.
    """

    output_dir: Path
    scores: dict[str, Any]
    validation_loss: float
    steps: int
    seconds: dict[str, float]
    sources: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    translations: list[str] = field(repr=False)
    language_pairs: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)


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
    """Run a recipe, or go on where an interrupted run of it stopped.

    Args:
        recipe: What to do.
        output_dir: Where everything goes; checkpoints into its folder "checkpoints".
        resume: Continue from the last complete checkpoint in `output_dir`. False deletes what an earlier run left.
        progress: Show progress bars and what was read.
        bootstrap: Resamples for confidence intervals of the scores; 0 leaves them out.

    Raises:
        ModuleNotFoundError: `training.report_to` names a package that is not installed.
        ValueError: The recipe names no data, the data is defective, the checkpoint to start from does not fit, or
            `output_dir` holds a run of another recipe.
        FileNotFoundError: A data file is missing.
    """
    output_dir = Path(output_dir)
    _check_reporter(recipe.training.report_to)
    keep_freed_memory()
    # One bar for the training is enough: the library would add one for every file it writes.
    transformers.utils.logging.disable_progress_bar()
    watch = _Stopwatch()
    # Said outright: otherwise several processes on a machine without accelerators do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first(), watch.part("data"):
        checkpoint = None if recipe.start is None else open_checkpoint(recipe, output_dir)
        start_sha256: dict[str, str] = {}
        if state.is_main_process:
            _prepare_output(recipe, output_dir, resume=resume)
            if checkpoint is not None:
                start_sha256 = _check_same_checkpoint(output_dir, checkpoint)
        data = locate_data(recipe, output_dir)
        store = Store(output_dir / _CACHE)
        texts = read_splits(data, store, progress=progress and state.is_main_process)
        if state.is_main_process:
            _check_same_text(output_dir, texts, data)
    scored = texts[data.test or data.validation]
    say = print if progress and state.is_main_process else _silent
    for text in texts.values():
        say(text.report)

    with state.main_process_first(), watch.part("tokenizer"):
        if checkpoint is not None:
            tokenizer = checkpoint.tokenizer
        else:
            tokenizer = _load_or_train_tokenizer(recipe, data, texts[data.train], output_dir, progress)
    with state.main_process_first(), watch.part("tokenization"):
        shows = progress and state.is_main_process
        pairs, reports = tokenize_splits(recipe, data, texts, tokenizer, store, progress=shows)
        if state.is_main_process:
            store.prune()
    for line in describe_tokens(reports):
        say(line)
    set_seed(recipe.seed)
    model = _make_model(recipe, tokenizer, checkpoint)
    say(
        f"model: {model.num_parameters():,} parameters, {model.config.num_parameters(active=True):,} active per token,"
        f" {model.num_parameters(only_trainable=True):,} trained"
    )

    trainer = SparseqTrainer(
        model=model,
        args=_training_arguments(recipe, output_dir, model.config.d_model, progress),
        train_dataset=pairs[data.train],
        eval_dataset=pairs[data.validation],
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    _judge_checkpoints(trainer, recipe, data, texts[data.validation], tokenizer)
    with watch.part("training"):
        steps = _train_or_resume(trainer, recipe, output_dir / _CHECKPOINTS)
    with watch.part("averaging"):
        validation_loss = _load_average(trainer, recipe, output_dir / _CHECKPOINTS)
        losses = _losses_by_pair(trainer, texts[data.validation])
    if recipe.lora is not None:
        # Otherwise the adapter would be added to the weights anew for every token.
        model.merge_adapter()
    state.wait_for_everyone()
    with watch.part("decoding"):
        shows = progress and state.is_main_process
        translations = translate_text(model, tokenizer, scored, recipe, data, progress=shows)
    scores, scores_by_pair = score_text(translations, scored, bootstrap=bootstrap)
    result = TrainResult(
        output_dir,
        scores,
        validation_loss,
        steps,
        watch.finish(),
        list(scored.sources),
        list(scored.targets),
        translations,
        {name: {"scores": one, "validation_loss": losses[name]} for name, one in scores_by_pair.items()},
    )
    if state.is_main_process:
        _save(result, recipe, data, scored, reports, model, tokenizer, trainer, start_sha256)
    state.wait_for_everyone()
    return result


def _check_reporter(name: str) -> None:
    """Notice a reporter that is not installed before anything is read."""
    if name != "none":
        importlib.import_module(name)


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
    remove_leftovers(output_dir)
    write_json(note, wanted)


def _delete_run(output_dir: Path) -> None:
    for name in (_CHECKPOINTS, _TOKENIZER, GENERATED_DATA):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    # Results must not stand beside the checkpoints of another run.
    for name in (RESULTS_FILE, MANIFEST_FILE, _TEXT_FILE, _START_FILE):
        (output_dir / name).unlink(missing_ok=True)


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
                f"{output_dir} holds a run on other text: the files of {', '.join(changed)} have changed or are "
                "others. Give another output folder, or start over with --no-resume."
            )
    write_json(note, wanted)


def _check_same_checkpoint(output_dir: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Refuse to go on from another checkpoint than the run began with; returns the hashes of its files."""
    note = output_dir / _START_FILE
    wanted = checkpoint.sha256()
    if complete_checkpoints(output_dir / _CHECKPOINTS) and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != wanted:
            changed = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise ValueError(
                f"{output_dir} holds a run that began with another checkpoint: {', '.join(changed)} of "
                f"{checkpoint.name} have changed or are others. Give another output folder, or start over with "
                "--no-resume."
            )
    write_json(note, wanted)
    return wanted


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """What must not change between a run and its continuation, flat."""
    free = {
        "logging_steps",
        "save_steps",
        "eval_steps",
        "max_steps",
        "average_checkpoints",
        "save_merged",
        "final_weights",
        "report_to",
    }
    # The checkpoint may have moved: its files are hashed.
    free |= {"checkpoint", "revision"}
    if recipe["training"]["lr_scheduler"] in ("linear", "cosine"):
        free.remove("max_steps")
    flat = {"seed": recipe["seed"]}
    for section in ("model", "tokenizer", "data", "training", "start", "lora"):
        flat |= {f"{section}.{key}": value for key, value in recipe.get(section, {}).items() if key not in free}
    flat |= {section: "used" if section in recipe else "not used" for section in ("start", "lora")}
    # What a recipe of an earlier version does not say had the value that is now the default.
    now = {"data": asdict(DataRecipe()), "training": asdict(TrainingRecipe())}
    defaults = {f"{section}.{key}": now[section][key] for section in now for key in now[section] if key not in free}
    flat = defaults | flat
    flat["data.pairs"] = [place.name for place in DataRecipe(pairs=recipe["data"].get("pairs")).places()]
    return {key: value for key, value in flat.items() if key not in {"data.test", *(f"data.{n}" for n in _PLACES)}}


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

        tokenizer = train_tokenizer(
            sentences(text, data.tokenizer_sentences),
            vocab_size=section.vocab_size,
            algorithm=section.algorithm,
            language_tags=languages(text),
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


def _make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint | None) -> Any:
    """The model to train: new, from a checkpoint, or an adapter around one."""
    if checkpoint is None:
        config = recipe.model_config(len(tokenizer))
        way_out = "Train one with `sparseq train-tokenizer`, or leave the path out"
        check_special_tokens(tokenizer, config, "`tokenizer.path` names a tokenizer", way_out)
        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = load_model(checkpoint)
    model.generation_config = _generation_config(recipe, model)
    return model if checkpoint is None or recipe.lora is None else add_adapter(model, checkpoint, recipe)


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


def _training_arguments(recipe: Recipe, output_dir: Path, d_model: int, progress: bool) -> SparseqTrainingArguments:
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
        bf16=uses_bf16(section.bf16, d_model),
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps or None,
        save_strategy="steps",
        save_steps=section.save_steps,
        save_total_limit=max(2, section.average_checkpoints),
        logging_steps=section.logging_steps,
        disable_tqdm=not progress,
        report_to=section.report_to,
        # The best checkpoint is spared when old ones are deleted.
        metric_for_best_model=f"eval_{section.metric}" if section.selects else None,
        greater_is_better=section.metric != "loss" if section.selects else None,
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        # Not the library's: its label names come from a signature that also has `decoder_...` arguments.
        label_names=["labels"],
        remove_unused_columns=False,
        # Experts are stacked in one parameter, so a step reaches every parameter even if it skips an expert.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _judge_checkpoints(
    trainer: SparseqTrainer, recipe: Recipe, data: DataRecipe, text: ParallelText, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Have validation judged as the recipe asks for, and training ended by it."""
    metric = recipe.training.metric
    if metric != "loss":
        # Greedy: beams would say little more about which checkpoint is better, at many times the cost.
        greedy = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}

        def score(model: Any) -> dict[str, float]:
            scores, _ = score_text(
                translate_text(model, tokenizer, text, recipe, data, progress=False, **greedy), text
            )
            return {name: scores[name] for name in ("bleu", "chrf")}

        trainer.score_generations = score
    if recipe.training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.training.early_stopping_patience))


def _train_or_resume(trainer: SparseqTrainer, recipe: Recipe, checkpoints: Path) -> int:
    """Train to the last step, from the last complete checkpoint if there is one; returns the steps made."""
    trainer.resume_hint = "Give the same command again to go on."
    last = last_complete_checkpoint(checkpoints, warn=trainer.is_world_process_zero())
    if last is not None and checkpoint_step(last) >= recipe.training.max_steps:
        # A finished run must not be resumed: Trainer would make one more step before it notices.
        trainer.state.log_history = TrainerState.load_from_json(str(last / "trainer_state.json")).log_history
        return checkpoint_step(last)
    return trainer.train(resume_from_checkpoint=None if last is None else str(last)).global_step


def _load_average(trainer: SparseqTrainer, recipe: Recipe, checkpoints: Path) -> float:
    """Put the mean of the last checkpoints, or the best one, into the model; returns its validation loss."""
    # One from an interruption is no part of the run: the mean must be that of a run never interrupted.
    complete = complete_checkpoints(checkpoints, scheduled=True)
    chosen = complete[-recipe.training.average_checkpoints :]
    if recipe.training.final_weights == "best":
        best = TrainerState.load_from_json(str(complete[-1] / "trainer_state.json")).best_global_step
        chosen = [path for path in complete if checkpoint_step(path) == best]
    weights = average_checkpoints(chosen)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.lora is not None:
        load_adapter_weights(model, weights)
        return trainer.evaluate()["eval_loss"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Tied weights are stored once; anything else that is absent would silently keep its last value.
    tied = set(model.all_tied_weights_keys)
    lacking = [name for name in missing if name not in tied]
    if lacking or unexpected:
        raise ValueError(f"The checkpoints in {checkpoints} do not fit the model: {(lacking + unexpected)[:5]}.")
    return trainer.evaluate()["eval_loss"]


def _losses_by_pair(trainer: SparseqTrainer, text: ParallelText) -> dict[str, float]:
    """Validation loss of each language pair, where there are several."""
    names = [name for name, _, _ in language_pairs(text)]
    parts = getattr(trainer.eval_dataset, "parts", [])
    return {
        name: trainer.evaluate(part, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
        for name, part in zip(names, parts, strict=True)
    }


def _save(
    result: TrainResult,
    recipe: Recipe,
    data: DataRecipe,
    scored: ParallelText,
    reports: dict[str, ParallelReport],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    trainer: SparseqTrainer,
    start_sha256: dict[str, str],
) -> None:
    # Written aside and moved at the end, the results last: a folder that has them has everything.
    folder = result.output_dir / INCOMPLETE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    split = data.test or data.validation
    write_translations(folder, split, scored, result.translations)
    results = {
        "recipe": recipe.name,
        "split": split,
        "source": data.source,
        "target": data.target,
        "scores": result.scores,
        "validation_loss": result.validation_loss,
        "language_pairs": result.language_pairs,
        "steps": result.steps,
        "parameters": model.num_parameters(),
        "active_parameters": model.config.num_parameters(active=True),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "bf16": trainer.args.bf16,
        "seconds": result.seconds,
        "log": trainer.state.log_history,
    }
    write_json(folder / RESULTS_FILE, results)
    made = manifest(recipe, list(reports.values()), vocab_size=len(tokenizer), start_sha256=start_sha256)
    write_json(folder / MANIFEST_FILE, made)
    if recipe.lora is not None and recipe.lora.save_merged:
        model.unload().save_pretrained(folder / _MERGED)
        tokenizer.save_pretrained(folder / _MERGED)
    publish_files(
        folder,
        result.output_dir,
        last=(f"{_MERGED}/config.json", "config.json", "adapter_config.json", MANIFEST_FILE, RESULTS_FILE),
        replaced="*.safetensors*",
    )


def manifest(
    recipe: Recipe,
    reports: Sequence[ParallelReport],
    *,
    vocab_size: int,
    start_sha256: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What is needed to repeat a run: versions, commit, seed, the recipe, hashes of the data and of the checkpoint."""
    versioned = (*_VERSIONED, "peft") if recipe.lora is not None else _VERSIONED
    return {
        "recipe": {"name": recipe.name, **recipe.to_dict()},
        "seed": recipe.seed,
        "vocab_size": vocab_size,
        "data": {report.split: report.to_dict() for report in reports},
        **({"start": {"sha256": dict(start_sha256)}} if start_sha256 else {}),
        "versions": {
            "sparseq": sparseq.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in versioned},
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


def _silent(*args: object) -> None:
    pass
