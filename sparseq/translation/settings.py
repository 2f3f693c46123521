"""Generation settings of a `Translator`: the model's own with the caller's changes, checked before work begins."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from sparseq.conversion.sources import check_numbers, idle_settings
from sparseq.data.lines import near_name
from sparseq.modeling_sparseq import DEFAULT_MAX_LENGTH
from sparseq.translation.decoding_plan import check_values

_logger = logging.getLogger(__name__)

# Of a generation configuration: what it returns, where it comes from, and what concerns other kinds of models.
_NO_SETTINGS = {
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("_from_model_config", "transformers_version", "is_assistant", "use_mtp", "continuous_batching_config"),
    *("token_healing", "stop_strings", "use_cache"),
}
_SEEDS = 2**63
_OTHER_NAMES = ("source_language", "target_language", "target_prefix", "batch_tokens", "too_long", "return_attention")

SETTINGS = {*(name for name in vars(GenerationConfig()) if name not in _NO_SETTINGS), "seed"}
"""Names of settings that a caller may change: those of generate(), and `seed` for sampling."""


def check_setting_names(names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: A name is no setting; the message has the nearest one.
    """
    for name in names:
        if name == "stop_strings":
            raise ValueError(
                "`stop_strings` is followed by no runtime of the translator: cut the translations yourself, or call "
                "the model's own generate() with `stop_strings` and `tokenizer`."
            )
        if name not in SETTINGS:
            near = near_name(name, sorted({*SETTINGS, *_OTHER_NAMES}))
            raise ValueError(f"`{name}` is no setting of translation.{near} Settings bear the names of generate().")


def usable_settings(own: GenerationConfig, positions: int | None) -> GenerationConfig:
    """A model's settings as a translator starts from them.

    They have a maximum length: `DEFAULT_MAX_LENGTH` where the model sets none, and what it has positions for where it
    sets more. Stop strings, which need a tokenizer at each step, are passed over with a warning in the log.

    Args:
        own: The model's; they are left alone.
        positions: Target positions that the model has; None where there is no limit.
    """
    settings = copy.deepcopy(own)
    if own.stop_strings is not None:
        _logger.warning(f"The model's own `stop_strings` = {own.stop_strings!r} are passed over by the translator.")
        settings.stop_strings = None
    if own.max_length is None and own.max_new_tokens is None:
        settings.max_length = DEFAULT_MAX_LENGTH
    if positions is not None:
        # The start token takes a position and the last token none.
        for name, most in (("max_length", positions + 1), ("max_new_tokens", positions)):
            if getattr(settings, name) is not None:
                setattr(settings, name, min(getattr(settings, name), most))
    return settings


def merge_settings(own: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """The settings of a model with a caller's changes.

    A maximum or minimum that is given takes the place of the model's, whether it counts new tokens or all of them.

    Args:
        own: The model's; it is left alone.
        changes: Settings by name; None for generate()'s default.

    Raises:
        ValueError: A name or a value is none that a setting can have, or settings contradict each other.
    """
    check_setting_names(changes)
    check_numbers({name: value for name, value in changes.items() if value is not None})
    settings: Any = copy.deepcopy(own)
    changes = dict(changes)
    settings.seed = changes.pop("seed", None)
    if settings.seed is not None and (type(settings.seed) is not int or not 0 <= settings.seed < _SEEDS):
        raise ValueError(f"`seed` must be a whole number from 0 to {_SEEDS - 1}, but is {settings.seed!r}.")
    for one, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if changes.get(one) is not None and changes.get(other) is not None:
            raise ValueError(f"`{one}` and `{other}` say the same in two ways: give one of them.")
        for given, replaced in ((one, other), (other, one)):
            if changes.get(given) is not None:
                setattr(settings, replaced, None)
    # Scores have lengths with one beam, too; the library would warn that it does nothing.
    settings.length_penalty = changes.pop("length_penalty", settings.length_penalty)
    settings.update(**changes)
    # What the model has for another way of searching is passed over; generate() would warn of it.
    for name in set(idle_settings(settings)) - changes.keys() - {"length_penalty"}:
        setattr(settings, name, None)
    check_values(settings)
    merged: GenerationConfig = settings
    return merged


def seeded_apart(settings: GenerationConfig, number: int) -> GenerationConfig:
    """The settings of one of several batches, which must not all draw the same; without a seed they draw anyway."""
    if getattr(settings, "seed", None) is None:
        return settings
    changed: Any = copy.copy(settings)
    changed.seed += number
    result: GenerationConfig = changed
    return result


def forced_prefix(settings: GenerationConfig, prefix: Sequence[int]) -> list[int]:
    """Tokens that a hypothesis begins with so that it has `prefix` where its text begins.

    A token that generate() forces to be first, such as a language code, it forces behind the start token alone.
    """
    first = settings.forced_bos_token_id
    return [*([] if first is None else [first]), *prefix] if prefix else []


def check_lengths(settings: GenerationConfig, prefix: Sequence[int], positions: int | None) -> None:
    """Check that there is room for a prefix and for what is to be generated.

    Args:
        settings: With the maximum.
        prefix: Tokens that hypotheses begin with.
        positions: Target positions that the model has; None where there is no limit.

    Raises:
        ValueError: There is none.
    """
    # The start token counts.
    given = 1 + len(prefix)
    limit = settings.max_length if settings.max_new_tokens is None else None
    if limit is not None and given >= limit and not prefix:
        raise ValueError(
            f"`max_length` is {limit}, but it counts the start token: give 2 or more, or `max_new_tokens`."
        )
    if limit is not None and given >= limit:
        raise ValueError(
            f"`target_prefix` has {len(prefix)} tokens, but a translation has {limit} at most, start token included: "
            "give a shorter prefix, or `max_new_tokens`."
        )
    # The last token is written and not read.
    needed = (given + settings.max_new_tokens if settings.max_new_tokens is not None else limit or 0) - 1
    if positions is not None and needed > positions:
        name = "max_length" if settings.max_new_tokens is None else "max_new_tokens"
        taken = f", of which start token and `target_prefix` take {given}" if prefix else ""
        if given > positions:
            raise ValueError(f"The model has {positions} target positions{taken}: give a shorter prefix.")
        raise ValueError(
            f"`{name}` is {getattr(settings, name)}, but the model has {positions} target positions{taken}: give "
            f"`max_new_tokens` of {positions + 1 - given} or less."
        )
