"""Recipes: one YAML file that says everything about a training run, checked before anything is loaded."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml
from huggingface_hub.dataclasses import strict, type_validator
from huggingface_hub.errors import StrictDataclassError

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.data.cleaning import Policy
from sparseq.data.sources import PairPlace, parse_pair
from sparseq.resources import resource_path

# Decided by the tokenizer, whose special tokens have fixed ids.
_TOKENIZER_DECIDES = {
    "vocab_size": "tokenizer.vocab_size",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "decoder_start_token_id": None,
    "is_encoder_decoder": None,
}

# All that may differ from a checkpoint that a run starts from: what acts in training only.
_CHANGEABLE = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "expert_dropout",
    "expert_output_masking",
    "router_jitter_noise",
    "router_balancing",
    "router_balancing_scope",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_rate",
    "label_smoothing",
)

T = TypeVar("T")


def _positive(section: object, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ValueError(f"`{name}` must be above 0, but is {getattr(section, name)}")


def _not_negative(section: object, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 0:
            raise ValueError(f"`{name}` must not be negative, but is {getattr(section, name)}")


@strict
@dataclass(frozen=True)
class StartRecipe:
    """A checkpoint to go on from: fine-tuning. Architecture and tokenizer are the checkpoint's.

    Attributes:
        checkpoint: Folder or Hub id of a Sparseq model with its tokenizer.
        revision: Branch, tag or commit of a Hub id.
        add_language_tags: Give the checkpoint tags, and embeddings for them, of target languages that it does not
            know. Otherwise such a language is refused.
    """

    checkpoint: str | None = None
    revision: str | None = None
    add_language_tags: bool = False


@strict
@dataclass(frozen=True)
class LoraRecipe:
    """Train an adapter (LoRA) of the checkpoint instead of all its weights.

    Attributes:
        preset: What is adapted: "attention", "experts" (routed and shared) or "all" (both, and dense feed-forward).
        rank: Rank of each update.
        alpha: The update is scaled by alpha / rank; None means 2 * rank.
        dropout: Dropout of the adapter's input; stacked experts cannot have it.
        train_routers: Train the routers whole, and save them in the adapter.
        save_merged: Write the model with the adapter merged into its weights, to the folder "merged".
    """

    preset: Literal["attention", "experts", "all"] = "all"
    rank: int = 8
    alpha: float | int | None = None
    dropout: float | int = 0.0
    train_routers: bool = False
    save_merged: bool = True

    def validate_values(self) -> None:
        """Refuse values out of range."""
        _positive(self, "rank", *(["alpha"] if self.alpha is not None else []))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, but is {self.dropout}")
        if self.dropout and self.preset == "experts":
            raise ValueError(
                f'`dropout` is {self.dropout}, but preset "experts" adapts stacked weights, which have no input of '
                "their own to drop; leave it out"
            )


@strict
@dataclass(frozen=True)
class TokenizerRecipe:
    """The joint tokenizer: trained on both sides of the training text, or loaded.

    Attributes:
        path: Folder or Hub id of a tokenizer to load; the other fields then have no effect.
        vocab_size: Size of the joint vocabulary.
        algorithm: "bpe-bytes" (no unknown tokens), "bpe" or "unigram".
        lowercase: Lower-case every text.
        min_frequency: How often a pair must occur to be merged.
        character_coverage: Share of the running text whose characters get a token of their own.
    """

    path: str | None = None
    vocab_size: int = 10_000
    algorithm: Literal["bpe-bytes", "bpe", "unigram"] = "bpe-bytes"
    lowercase: bool = False
    min_frequency: int = 2
    character_coverage: float | int = 1.0

    def validate_values(self) -> None:
        """Refuse values out of range."""
        _positive(self, "vocab_size", "min_frequency")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"`character_coverage` must be above 0 and at most 1, but is {self.character_coverage}")


@strict
@dataclass(frozen=True)
class DataRecipe:
    """Parallel text: a folder of aligned files, a dataset, or named files; of one language pair or of several.

    Attributes:
        folder: Folder with files `{split}.{language}`, plain or gzip-compressed, one sentence a line.
        dataset: Instead of a folder: id of a dataset of the Hub, a folder that `save_to_disk` or `datasets` can read,
            or a table (.json, .jsonl, .csv, .tsv, .parquet, .arrow, each also .gz).
        dataset_config: Configuration of the dataset, where it has several.
        source: Language to translate from: the suffix of the files, or the column.
        target: Language to translate into; its tag is put before the sources. A table may go without.
        source_column: Column with the sources; `translation.en` is a field. Default: the one named `source` says,
            or `translation.{source}`, or "source".
        target_column: Column with the targets; likewise.
        pairs: Several language pairs in one run, such as [en-de, en-fr, de-en]. An entry may be a mapping with the
            keys of this section that say where the text lies, where a pair's differ from the others'.
        temperature: How often pairs of several are drawn: in proportion to their size to the power 1 / temperature. At
            1 every sentence comes once an epoch; above, sentences of the smaller pairs come several times.
        train: Name of the training split.
        validation: Name of the validation split.
        test: Name of the split that is translated and scored at the end; None scores the validation split.
        train_files, validation_files, test_files: Files of a split, before folder and dataset: two aligned text files,
            source first, or one table or more.
        streaming: Read a dataset of the Hub over the network, without downloading all of it first.
        max_pairs: The first so many training pairs of each language pair are used; 0 uses all.
        tokenizer_sentences: The tokenizer is trained on at most so many sentences, evenly spaced; it holds them in
            memory.
        max_length: Longest side in tokens, end of sentence included.
        max_length_ratio: A pair one side of which has more than this many times the tokens of the other is unbalanced.
        if_empty, if_not_utf8, if_replacement_character, if_identical, if_duplicate, if_too_long, if_unbalanced: What
            happens to training pairs with this defect: "skip", "keep", "refuse" (stop with a message), "truncate".
            Validation and test keep every line.
        generated_pairs: Above 0, and with no other text: train on that many pairs of the generated grammar corpus.
    """

    folder: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    source: str | None = None
    target: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    pairs: list[str | dict[str, Any]] | None = None
    temperature: float | int = 1.0
    train: str = "train"
    validation: str = "val"
    test: str | None = None
    train_files: str | list[str] | None = None
    validation_files: str | list[str] | None = None
    test_files: str | list[str] | None = None
    streaming: bool = False
    max_pairs: int = 0
    tokenizer_sentences: int = 5_000_000
    max_length: int = 256
    max_length_ratio: float | int = 9.0
    if_empty: Literal["skip", "keep", "refuse"] = "skip"
    if_not_utf8: Literal["skip", "refuse"] = "refuse"
    if_replacement_character: Literal["skip", "keep", "refuse"] = "keep"
    if_identical: Literal["skip", "keep", "refuse"] = "keep"
    if_duplicate: Literal["skip", "keep", "refuse"] = "keep"
    if_too_long: Literal["skip", "truncate", "refuse"] = "skip"
    if_unbalanced: Literal["skip", "keep", "refuse"] = "keep"
    generated_pairs: int = 0

    def validate_values(self) -> None:
        """Refuse values out of range, and places that exclude each other."""
        _positive(self, "max_length", "tokenizer_sentences")
        _not_negative(self, "generated_pairs", "max_pairs")
        for name in ("temperature", "max_length_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}")
        if self.folder is not None and self.dataset is not None:
            raise ValueError(f"give `folder` ({self.folder}) or `dataset` ({self.dataset}), not both")
        if self.pairs is not None and (self.source is not None or self.target is not None):
            raise ValueError("give `pairs`, or `source` and `target`, not both")
        self.places()

    def policy(self) -> Policy:
        """What happens to defective training pairs."""
        actions = {name.removeprefix("if_"): getattr(self, name) for name in vars(self) if name.startswith("if_")}
        return Policy(**actions, max_length_ratio=float(self.max_length_ratio))

    def places(self) -> list[PairPlace]:
        """Where each language pair lies; one, without languages, where none are named.

        Raises:
            ValueError: An entry of `pairs` is no language pair, or occurs twice.
        """
        if self.pairs is None:
            return [self._place({})]
        if not self.pairs:
            raise ValueError("`pairs` is empty; give language pairs such as [en-de, de-en], or leave it out")
        places = [self._place(_pair_entry(entry)) for entry in self.pairs]
        names = [place.name for place in places]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"`pairs` has {', '.join(repeated)} more than once")
        return places

    def _place(self, entry: Mapping[str, Any]) -> PairPlace:
        values = {name: getattr(self, name) for name in _PLACE_KEYS} | dict(entry)
        # What an entry says takes the place of what the section says.
        if "folder" in entry or "dataset" in entry:
            for name in ("folder", "dataset", "dataset_config"):
                values[name] = entry.get(name)
        files = []
        for key, split in _FILE_KEYS.items():
            named = values.pop(key)
            if named:
                files.append((getattr(self, split) or split, (named,) if isinstance(named, str) else tuple(named)))
        return PairPlace(**values, files=tuple(files), streaming=self.streaming)


_FILE_KEYS = {"train_files": "train", "validation_files": "validation", "test_files": "test"}
_PLACE_KEYS = (
    *("source", "target", "folder", "dataset", "dataset_config", "source_column", "target_column"),
    *_FILE_KEYS,
)


def _pair_entry(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `pairs` as the keys it sets."""
    if isinstance(entry, str):
        source, target = parse_pair(entry)
        return {"source": source, "target": target}
    _refuse_unknown(entry, _PLACE_KEYS, f"an entry of `pairs`, {dict(entry)},")
    if not (isinstance(entry.get("source"), str) and isinstance(entry.get("target"), str)):
        raise ValueError(f"an entry of `pairs` needs `source` and `target`, but is {dict(entry)}")
    for key, value in entry.items():
        if not isinstance(value, str) and not (key in _FILE_KEYS and isinstance(value, list)):
            raise ValueError(f"`{key}` of an entry of `pairs` must be a name, but is {value!r}")
    return dict(entry)


@strict
@dataclass(frozen=True)
class TrainingRecipe:
    """Optimisation.

    Attributes:
        max_steps: Optimizer updates.
        tokens_per_batch: Tokens a batch holds on each device, padding included; `budget_counts` says which.
        budget_counts: "target" or "source+target".
        gradient_accumulation_steps: Batches per update and device.
        learning_rate: Peak learning rate.
        lr_scheduler: Name of a schedule of transformers. "inverse_sqrt" with the peak `(d_model * warmup)^-0.5` is
            that of Vaswani et al. 2017, equation 3.
        warmup_steps: Updates with linearly growing rate.
        adam_beta1, adam_beta2, adam_epsilon: AdamW.
        weight_decay: Decoupled weight decay of matrices; 0 makes AdamW Adam.
        max_grad_norm: Largest gradient norm; 0 does not clip.
        save_steps: Updates between checkpoints.
        eval_steps: Updates between measurements of the validation loss; 0 measures it at the end only.
        logging_steps: Updates between log lines.
        average_checkpoints: The final weights are the mean of that many last checkpoints; 1 takes the last one.
        final_weights: "average", as said, or "best": the checkpoint with the best `metric`.
        metric: What validation is judged by: "loss", or "bleu" or "chrf" of greedy translations of the validation
            split, which are then made at every evaluation.
        early_stopping_patience: Evaluations without a better `metric` after which training ends; 0 goes on.
        report_to: Where logs go besides results.json: "none", "tensorboard" (into the output folder) or "wandb".
        bf16: Mixed precision in bfloat16; "auto" uses it where the hardware multiplies it faster than float32.
    """

    max_steps: int = 100_000
    tokens_per_batch: int = 4096
    budget_counts: Literal["target", "source+target"] = "target"
    gradient_accumulation_steps: int = 1
    learning_rate: float | int = 5e-4
    lr_scheduler: Literal["inverse_sqrt", "linear", "cosine", "constant_with_warmup"] = "inverse_sqrt"
    warmup_steps: int = 4000
    adam_beta1: float | int = 0.9
    adam_beta2: float | int = 0.98
    adam_epsilon: float = 1e-9
    weight_decay: float | int = 0.0
    max_grad_norm: float | int = 1.0
    save_steps: int = 1000
    eval_steps: int = 1000
    logging_steps: int = 50
    average_checkpoints: int = 5
    final_weights: Literal["average", "best"] = "average"
    metric: Literal["loss", "bleu", "chrf"] = "loss"
    early_stopping_patience: int = 0
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    bf16: bool | Literal["auto"] = "auto"

    @property
    def selects(self) -> bool:
        """Whether evaluations decide which weights are kept, or when training ends."""
        return self.final_weights == "best" or self.early_stopping_patience > 0

    def validate_values(self) -> None:
        """Refuse values out of range."""
        _positive(self, "max_steps", "tokens_per_batch", "gradient_accumulation_steps", "learning_rate", "save_steps")
        _positive(self, "logging_steps", "average_checkpoints", "adam_epsilon")
        _not_negative(self, "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "early_stopping_patience")
        if self.selects and (self.eval_steps == 0 or self.eval_steps % self.save_steps):
            # What is evaluated must have been saved, or the best weights would be gone.
            raise ValueError(
                f"`final_weights` ({self.final_weights}) and `early_stopping_patience` "
                f"({self.early_stopping_patience}) compare checkpoints, so `eval_steps` must be a multiple of "
                f"`save_steps` ({self.save_steps}), but is {self.eval_steps}"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, but is {getattr(self, name)}")


@strict
@dataclass(frozen=True)
class DecodingRecipe:
    """How the test split is translated; saved as the model's generation_config.

    Attributes:
        num_beams: Beams; 1 is greedy.
        length_penalty: Exponent of the length that a beam's log-probability is divided by.
        max_length: Longest output in tokens.
        batch_tokens: Source tokens translated at once, padding included, beams not counted.
    """

    num_beams: int = 4
    length_penalty: float | int = 1.0
    max_length: int = 256
    batch_tokens: int = 2048

    def validate_values(self) -> None:
        """Refuse values out of range."""
        _positive(self, "num_beams", "max_length", "batch_tokens")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: Name of the file without its ending.
        description: One line for `sparseq train --list`.
        model: Arguments of `SparseqConfig`, the vocabulary and its special tokens excepted. With `start` only those
            that act in training alone.
        tokenizer, data, training, decoding: The other sections.
        start: A checkpoint to fine-tune; None trains from scratch.
        lora: The adapter to train instead of all weights; None trains them all.
        seed: Seed of the weights, the order of the data and dropout.
    """

    name: str
    description: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    decoding: DecodingRecipe = field(default_factory=DecodingRecipe)
    start: StartRecipe | None = None
    lora: LoraRecipe | None = None
    seed: int = 1

    def model_config(self, vocab_size: int | None = None) -> SparseqConfig:
        """The architecture, for `vocab_size` tokens (default: as many as the recipe asks for), or the checkpoint's.

        Raises:
            ValueError: The model section contradicts itself; the message names the fields and values. Or the
                checkpoint to start from is not named, not there, or does not fit the recipe.
        """
        if self.start is not None:
            from sparseq.training.start import open_checkpoint

            return open_checkpoint(self).config
        try:
            return SparseqConfig(vocab_size=vocab_size or self.tokenizer.vocab_size, **self.model)
        except StrictDataclassError as error:
            raise ValueError(f"recipe {self.name}, section model: {_cause(error)}") from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, in the form of its YAML file."""
        return {
            "description": self.description,
            "seed": self.seed,
            "model": dict(self.model),
            **{
                name: dataclasses.asdict(getattr(self, name))
                for name in _SECTIONS
                if getattr(self, name) is not None and not (name == "tokenizer" and self.start is not None)
            },
        }

    def check_lengths(self, config: SparseqConfig) -> None:
        """Refuse texts longer than the learned positions of `config`.

        Raises:
            ValueError: The message names the lengths.
        """
        limit = config.max_position_embeddings
        longest = max(self.data.max_length, self.decoding.max_length)
        if config.position_embedding_type == "learned" and limit is not None and longest > limit:
            raise ValueError(
                f"recipe {self.name}: learned positions end at `model.max_position_embeddings` ({limit}), but "
                f"`data.max_length` is {self.data.max_length} and `decoding.max_length` {self.decoding.max_length}"
            )


_SECTIONS: dict[str, type] = {
    "tokenizer": TokenizerRecipe,
    "data": DataRecipe,
    "training": TrainingRecipe,
    "decoding": DecodingRecipe,
    "start": StartRecipe,
    "lora": LoraRecipe,
}
# A run without them is another run than one with their defaults.
_OPTIONAL = ("start", "lora")


def list_recipes() -> dict[str, Path]:
    """The recipes that come with Sparseq: name to file."""
    return {path.stem: path for path in sorted(resource_path("recipes").glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: Name of a recipe that comes with Sparseq, such as "base-sparse", or the path of a YAML file.
        overrides: Changes such as "training.max_steps=100" or "seed=2"; values are read as YAML.

    Raises:
        FileNotFoundError: There is no such recipe; the message names the nearest.
        ValueError: A key is unknown (the message names the nearest), or a value has a wrong type or is out of range.
    """
    path = _find(name_or_path)
    tree = _parse(path.read_text(encoding="utf-8"), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections such as `model:` and `training:`, but holds {tree!r}.")
    for override in overrides:
        _apply(tree, override)
    return build_recipe(path.stem, tree)


def build_recipe(name: str, tree: Mapping[str, Any]) -> Recipe:
    """Make a checked `Recipe` of nested mappings, as `Recipe.to_dict` gives and YAML files hold.

    Raises:
        ValueError: As `load_recipe`.
    """
    where = f"recipe {name}"
    _refuse_unknown(tree, ["description", "seed", "model", *_SECTIONS], where)
    sections: dict[str, Any] = {
        key: _section(tree.get(key), kind, f"{where}, section {key}")
        for key, kind in _SECTIONS.items()
        if key not in _OPTIONAL or key in tree
    }
    model = _mapping(tree.get("model"), f"{where}, section model")
    _check_model_keys(model, f"{where}, section model")
    _check_start(tree, model, where)
    seed = tree.get("seed", 1)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{where}: `seed` must be an integer of at least 0, but is {seed!r}")
    recipe = Recipe(
        name=name,
        description=str(tree.get("description", "")),
        model=MappingProxyType(dict(model)),
        seed=seed,
        **sections,
    )
    if recipe.start is None:
        recipe.check_lengths(recipe.model_config())
    return recipe


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise FileNotFoundError(f"There is no recipe file {path}. `sparseq train --list` shows the recipes by name.")
    known = list_recipes()
    if str(name_or_path) not in known:
        raise FileNotFoundError(
            f"There is no recipe named {str(name_or_path)!r}{_nearest(str(name_or_path), known)}. Recipes: "
            f"{', '.join(known)}. A file of your own is given by its path, ending in .yaml."
        )
    return known[str(name_or_path)]


def _section(values: Any, kind: type[T], where: str) -> T:
    values = _mapping(values, where)
    _refuse_unknown(values, [f.name for f in dataclasses.fields(kind)], where)  # type: ignore[arg-type]
    annotations = typing.get_type_hints(kind)
    try:
        # `strict` checks types on assignment, which a frozen dataclass bypasses.
        for key, value in values.items():
            type_validator(key, value, annotations[key])
        return kind(**values)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{where}: {_cause(error)}") from error


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold `key: value` lines, but is {values!r}")
    return dict(values)


def _check_model_keys(model: Mapping[str, Any], where: str) -> None:
    for key, instead in _TOKENIZER_DECIDES.items():
        if key in model:
            way_out = f"set `{instead}`" if instead else "leave it out"
            raise ValueError(f"{where}: `{key}` follows from the tokenizer; {way_out}")
    _refuse_unknown(model, [key for key in SparseqConfig.__annotations__ if key not in _TOKENIZER_DECIDES], where)


def _check_start(tree: Mapping[str, Any], model: Mapping[str, Any], where: str) -> None:
    """Refuse what contradicts, or lacks, a checkpoint to start from."""
    if "start" not in tree:
        if "lora" in tree:
            raise ValueError(
                f"{where}: section lora adapts a trained model, so it needs a section start, such as "
                "start.checkpoint=FOLDER"
            )
        return
    if tree.get("tokenizer"):
        named = ", ".join(f"tokenizer.{key}" for key in tree["tokenizer"])
        raise ValueError(
            f"{where}: the tokenizer is that of start.checkpoint; leave out {named}, or take recipe finetune or lora"
        )
    for key, value in model.items():
        if key not in _CHANGEABLE:
            raise ValueError(
                f"{where}, section model: `{key}` ({value}) is part of the architecture, which is that of "
                f"start.checkpoint; leave it out. What may be changed: {', '.join(_CHANGEABLE)}"
            )
    try:
        SparseqConfig(**model)
    except StrictDataclassError as error:
        raise ValueError(f"{where}, section model: {_cause(error)}") from error


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where} has no key `{key}`{_nearest(str(key), known)}. Keys: {', '.join(known)}.")


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean `{matches[0]}`?)" if matches else ""


def _cause(error: Exception) -> str:
    """What is wrong, without the wrapping that names the validator."""
    return str(error.__cause__ or error)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ValueError(f"An override must look like training.max_steps=100, but is {override!r}.")
    if len(path) == 1 and path[0] in ("model", *_SECTIONS):
        raise ValueError(f"`{path[0]}` is a section; override one of its keys, as in {path[0]}.key=value.")
    if len(path) > 2:
        raise ValueError(f"An override names one section and one key, but {override!r} has {len(path)} parts.")
    if len(path) == 2 and tree.get(path[0]) is None:
        tree[path[0]] = {}
    parent = tree if len(path) == 1 else tree[path[0]]
    if not isinstance(parent, dict):
        raise ValueError(f"`{path[0]}` has no keys of its own, so {override!r} cannot be applied.")
    parent[path[-1]] = _parse(value, f"override {override!r}")


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `no` is a language, `1e-9` a number; repeated keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error
