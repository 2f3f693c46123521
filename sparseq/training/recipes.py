"""Recipes: one YAML file that says everything about a training run, checked before anything is loaded."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.resources import resource_path
from sparseq.training.sections import (
    METRIC_FIGURES,
    DataRecipe,
    DecodingRecipe,
    DenoisingRecipe,
    HubRecipe,
    LoraRecipe,
    ScoringRecipe,
    StartRecipe,
    TextRecipe,
    TokenizerRecipe,
    TrainingRecipe,
    nearest,
    refuse_unknown,
)

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


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: Name of the file without its ending.
        description: One line for `sparseq train --list`.
        model: Arguments of `SparseqConfig`, the vocabulary and its special tokens excepted. With `start` only those
            that act in training alone.
        tokenizer, data, training, decoding, scoring: The other sections.
        start: A checkpoint to fine-tune; None trains from scratch.
        lora: The adapter to train instead of all weights; None trains them all.
        text: Plain text to pre-train on (`sparseq pretrain`), instead of the parallel text of section data.
        denoising: What is learned from it.
        hub: Where the run is pushed to; None pushes nothing.
        seed: Seed of the weights, the order of the data and dropout.
    """

    name: str
    description: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    decoding: DecodingRecipe = field(default_factory=DecodingRecipe)
    scoring: ScoringRecipe = field(default_factory=ScoringRecipe)
    start: StartRecipe | None = None
    lora: LoraRecipe | None = None
    text: TextRecipe | None = None
    denoising: DenoisingRecipe | None = None
    hub: HubRecipe | None = None
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
        longest = max(self.data.max_length, self.data.longest_target, self.decoding.max_length)
        if self.text is not None and self.denoising is not None:
            # The tag, and the end of the text.
            longest = max(longest, self.denoising.length + 2)
        if config.position_embedding_type == "learned" and limit is not None and longest > limit:
            of_target = f", `data.max_target_length` {self.data.max_target_length}"
            piece = (
                "" if self.denoising is None else f", and a piece of `denoising.length` {self.denoising.length + 2}"
            )
            raise ValueError(
                f"recipe {self.name}: learned positions end at `model.max_position_embeddings` ({limit}), but "
                f"`data.max_length` is {self.data.max_length}{of_target if self.data.max_target_length else ''} and "
                f"`decoding.max_length` {self.decoding.max_length}{piece}"
            )


_SECTIONS: dict[str, type] = {
    "tokenizer": TokenizerRecipe,
    "data": DataRecipe,
    "training": TrainingRecipe,
    "decoding": DecodingRecipe,
    "scoring": ScoringRecipe,
    "start": StartRecipe,
    "lora": LoraRecipe,
    "text": TextRecipe,
    "denoising": DenoisingRecipe,
    "hub": HubRecipe,
}
# A run without them is another run than one with their defaults.
_OPTIONAL = ("start", "lora", "text", "denoising", "hub")


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
    if not path.stem.strip("."):
        # The folder of its runs would be the current one.
        raise ValueError(f"The recipe file {path} has no name before its ending; give it one.")
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
    refuse_unknown(tree, ["description", "seed", "model", *_SECTIONS], where)
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
    _check_metric(recipe, where)
    _check_budget(recipe, where)
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
            f"There is no recipe named {str(name_or_path)!r}{nearest(str(name_or_path), known)}. Recipes: "
            f"{', '.join(known)}. A file of your own is given by its path, ending in .yaml."
        )
    return known[str(name_or_path)]


def _section(values: Any, kind: type[T], where: str) -> T:
    values = _mapping(values, where)
    refuse_unknown(values, [f.name for f in dataclasses.fields(kind)], where)  # type: ignore[arg-type]
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
    refuse_unknown(model, [key for key in SparseqConfig.__annotations__ if key not in _TOKENIZER_DECIDES], where)


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


def _check_metric(recipe: Recipe, where: str) -> None:
    """Refuse to judge validation by what is not measured."""
    figure, metrics = recipe.training.metric, recipe.scoring.metrics
    if figure == "loss" or any(figure in METRIC_FIGURES[metric] for metric in metrics):
        return
    needed = next(metric for metric in METRIC_FIGURES if figure in METRIC_FIGURES[metric])
    raise ValueError(
        f"{where}: `training.metric` is {figure}, but `scoring.metrics` has no {needed}; set "
        f'"scoring.metrics=[{", ".join([*metrics, needed])}]"'
    )


def _check_budget(recipe: Recipe, where: str) -> None:
    """Refuse a budget that a pair could exceed, which no batch could hold."""
    if recipe.text is not None:
        # Pre-training has pieces in place of pairs.
        return
    data, budget, counts = recipe.data, recipe.training.tokens_per_batch, recipe.training.budget_counts
    longest = data.longest_target + (data.max_length if counts == "source+target" else 0)
    if longest > budget:
        raise ValueError(
            f"{where}: a batch holds `training.tokens_per_batch` ({budget}) {counts} tokens, but a pair may have "
            f"{longest}: `data.max_length` is {data.max_length}, and the longest target has {data.longest_target}; "
            "raise the budget, or lower `data.max_length` or `data.max_target_length`"
        )


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
