"""LoRA (arXiv 2106.09685) for Sparseq models: what an adapter reaches, and a stop where it forgets the experts.

Experts are stacked in parameters, not in linear layers, so PEFT reaches them by `target_parameters` alone:
`target_modules="all-linear"` skips them without a word.
"""

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

Preset = Literal["attention", "experts", "all"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# What PEFT 0.21 cannot do for parameters: it fails with a message about its own classes, or, for initial weights,
# because a stack of experts has no `weight`.
_ALSO_REFUSED = ("lora_bias", "fan_in_fan_out", "velora_config", "kasa_config", "layers_to_transform")
_INITIAL_WEIGHTS = (True, False, "gaussian")
_SAY_SO = 'exclude_modules=["experts"]'


def lora_config(
    model: Any,
    preset: Preset = "all",
    *,
    rank: int = 8,
    alpha: float | None = None,
    train_routers: bool = False,
    **overrides: Any,
) -> "LoraConfig":
    """A PEFT configuration for a Sparseq model: `peft.get_peft_model(model, lora_config(model, "all"))`.

    - "attention": query, key, value and output projections of self- and cross-attention. Experts stay as they are, and
      the configuration says so with `exclude_modules=["experts"]`.
    - "experts": the routed experts, each with a low-rank update of its own, and the shared experts.
    - "all": both of these, and the dense feed-forward layers.

    Embeddings, norms, biases and the output projection are never adapted. Routers stay as they are unless
    `train_routers` is set, so tokens keep going to the experts that were trained on them.

    Args:
        model: A Sparseq sequence-to-sequence model, a PEFT model around one, or the configuration of one.
        preset: What to adapt.
        rank: Rank of each update, r of the paper, for every expert alike.
        alpha: The update is scaled by `alpha / rank`. `None` means `2 * rank`.
        train_routers: Train the routers whole and save them in the adapter: they have few parameters.
        overrides: Other fields of `peft.LoraConfig`, such as `lora_dropout` with "attention".

    Raises:
        ValueError: The model is not a Sparseq model, `preset` is unknown or there is nothing of its kind in the model,
            a number is out of range, or an override cannot work with stacked experts.
        ModuleNotFoundError: PEFT is not installed.
    """
    from peft import LoraConfig

    config = getattr(model, "config", model)
    if getattr(config, "model_type", None) != "sparseq":
        raise ValueError(f"lora_config() is for Sparseq models, but got {type(model).__name__}.")
    alpha = 2 * rank if alpha is None else alpha
    _check(config, preset, rank, alpha, overrides)
    modules, parameters = _targets(config, preset)
    if train_routers:
        if not _has_experts(config):
            raise ValueError("`train_routers` needs a model with experts, but this one is dense (`num_experts` is 0).")
        overrides["modules_to_save"] = [*(overrides.get("modules_to_save") or []), "router"]
    if not parameters and _has_experts(config):
        overrides["exclude_modules"] = ["experts"]
    return LoraConfig(
        **{
            "task_type": "SEQ_2_SEQ_LM",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": modules,
            "target_parameters": parameters or None,
            **overrides,
        }
    )


def refuse_frozen_experts(model: nn.Module) -> None:
    """Refuse to train an adapter that leaves every routed expert frozen without saying so.

    `SparseqCallback` and `SparseqTrainer` call this when they are made and when training begins; a loop of your own
    may call it before its first step. An adapter that is not meant to reach the experts says so in its configuration,
    `exclude_modules=["experts"]`, as the preset "attention" does. Models without an adapter, without experts, or with
    nothing to train pass.

    Args:
        model: A model with PEFT adapters, in whatever wraps it.

    Raises:
        ValueError: No routed expert has a trained parameter and no adapter excludes them, or an adapter wraps a
            router's weight, whose scores could then be neither counted nor balanced.
    """
    # PEFT keeps its configurations on its tuner and on the model inside; the innermost knows the modules' own names.
    adapted = [module for module in model.modules() if isinstance(vars(module).get("peft_config"), dict)]
    if not adapted or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    modules = dict(adapted[-1].named_modules())
    for name, module in modules.items():
        if name.endswith(".mlp.router") and not hasattr(module, "scores"):
            raise ValueError(
                f"An adapter wraps the weight of {name}, so the model cannot count what the router chooses. Train "
                'routers whole: leave them out of `target_parameters` and set `modules_to_save=["router"]`.'
            )
    experts = {name: module for name, module in modules.items() if name.endswith(".mlp.experts")}
    if not experts or any(p.requires_grad for module in experts.values() for p in module.parameters()):
        return
    configs = vars(adapted[-1])["peft_config"].values()
    if any(_excludes(config, name) for config in configs for name in experts):
        return
    raise ValueError(
        f"The adapter trains no routed expert: PEFT reaches the stacked weights of {len(experts)} expert layers only "
        'by `target_parameters`, and `target_modules="all-linear"` skips them. Use '
        '`sparseq.training.lora.lora_config(model, "all")`, or, to leave the experts as they are, say so with '
        f"`{_SAY_SO}` in the adapter's configuration."
    )


def _has_experts(config: Any) -> bool:
    return bool(config.sparse_layers("encoder") or config.sparse_layers("decoder"))


def _targets(config: Any, preset: Preset) -> tuple[list[str], list[str]]:
    """Endings of the names of the linear layers, and of the stacked parameters, that `preset` adapts."""
    inner = ("gate_proj", "up_proj", "down_proj") if config.gated_ffn else ("up_proj", "down_proj")
    modules: list[str] = []
    parameters: list[str] = []
    if preset in ("attention", "all"):
        modules += _ATTENTION
    if preset == "all":
        modules += [f"mlp.{name}" for name in inner]
    if preset in ("experts", "all") and _has_experts(config):
        if config.num_shared_experts:
            modules += [f"shared_experts.{name}" for name in inner]
        first = "gate_up_proj" if config.gated_ffn else "up_proj"
        parameters = [f"mlp.experts.{first}", "mlp.experts.down_proj"]
    return modules, parameters


def _check(config: Any, preset: str, rank: int, alpha: float, overrides: dict[str, Any]) -> None:
    if preset not in get_args(Preset):
        raise ValueError(f"`preset` must be one of {', '.join(get_args(Preset))}, but is {preset!r}.")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, but is {rank}.")
    if alpha <= 0:
        raise ValueError(f"`alpha` must be above 0, but is {alpha}.")
    decided = {"target_modules", "target_parameters", "exclude_modules", "r", "lora_alpha"} & overrides.keys()
    if decided:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in sorted(decided))}: decided by `preset`, `rank` and `alpha`. Write a "
            "`peft.LoraConfig` by hand for other targets."
        )
    if preset == "experts" and not _has_experts(config):
        raise ValueError(
            'preset "experts" needs a model with experts, but this one is dense (`num_experts` is 0, or no layer is '
            'sparse): use "attention", or "all" for the feed-forward layers as well.'
        )
    if preset != "attention" and _has_experts(config):
        _check_for_experts(preset, overrides)


def _check_for_experts(preset: str, overrides: dict[str, Any]) -> None:
    """Refuse what PEFT cannot do with stacked parameters, before it has changed half of the model."""
    way_out = f'preset {preset!r} adapts stacked experts: leave it out, or use "attention"'
    if overrides.get("lora_dropout"):
        raise ValueError(
            f"`lora_dropout` is {overrides['lora_dropout']}, but {way_out}. An update of a weight has no input of its "
            "own to drop; `expert_dropout` and `dropout` of the model's configuration act under LoRA as well."
        )
    if overrides.get("use_dora"):
        raise ValueError(f"`use_dora` works on linear layers only, but {way_out}.")
    for name in _ALSO_REFUSED:
        if overrides.get(name):
            raise ValueError(f"`{name}` works on linear layers only, but {way_out}.")
    initial = overrides.get("init_lora_weights", True)
    if initial not in _INITIAL_WEIGHTS:
        raise ValueError(
            f"`init_lora_weights` is {initial!r}, but {way_out}. With experts it may be "
            f"{', '.join(map(repr, _INITIAL_WEIGHTS))}."
        )


def _excludes(config: Any, name: str) -> bool:
    """Whether an adapter's `exclude_modules` names a module, by PEFT's rules: a regular expression, or endings."""
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in excluded or ())
