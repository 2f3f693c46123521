"""What a generation configuration means for one batch: `generate()`'s defaults, special tokens and lengths."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, LogitsProcessorList

from .backend import Batch
from .engine import Engine

NO_TOKEN = -1

HONOURED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "length_penalty"),
    *("num_beams", "early_stopping", "num_return_sequences"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *(
        "repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
    ),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "renormalize_logits", "remove_invalid_values"),
    *("bos_token_id", "eos_token_id", "decoder_start_token_id"),
}
"""Settings that a search over an engine follows as `generate()` does."""

WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("pad_token_id", "transformers_version"),
}
"""Settings that do not change which tokens are chosen, or only together with one that is refused."""

# Of the settings that are refused, the values that ask for nothing, beside None and False.
_NEUTRAL = {"guidance_scale": 1, "encoder_repetition_penalty": 1, "num_beam_groups": 1, "diversity_penalty": 0}

_WAY_OUT = 'open the translator with `runtime="torch"`, which decodes with generate()'


def check_settings(settings: GenerationConfig) -> None:
    """
    Raises:
        ValueError: A setting asks for what a search over an engine does not do, or for what contradicts another.
    """
    # A field that a later transformers adds is refused until it is known here; a caller's own fields are his.
    for name in vars(GenerationConfig()):
        if name in HONOURED or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        value = getattr(settings, name, None)
        if not (value is None or value is False or value == _NEUTRAL.get(name)):
            raise ValueError(f"`{name}` = {value!r} is not supported by this runtime: {_WAY_OUT}.")
    beams, best = settings.num_beams or 1, settings.num_return_sequences or 1
    if beams > 1 and settings.do_sample:
        raise ValueError(f"`do_sample` with `num_beams` = {beams} is not supported by this runtime: {_WAY_OUT}.")
    if best > beams and not settings.do_sample:
        raise ValueError(
            f"`num_return_sequences` is {best}, but a search with `num_beams` = {beams} ends with {beams}: raise "
            "`num_beams`, or sample with `do_sample`."
        )


@dataclass(frozen=True)
class Targets:
    """What is known of each target before it is decoded; lengths count the start token.

    Attributes:
        prompts: Start token and prefix of each source, `(B, P)` int64, `NO_TOKEN` behind them.
        prompt_lengths: `(B,)`.
        minimum: Length below which no end may be chosen, `(B,)`.
        maximum: Length at which decoding stops, `(B,)`.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray

    @cached_property
    def longest_prompt(self) -> int:
        """Of all sources."""
        return int(self.prompt_lengths.max())

    def select(self, sources: np.ndarray) -> "Targets":
        """Those of some sources."""
        return Targets(*(values[sources] for values in vars(self).values() if isinstance(values, np.ndarray)))


@dataclass(frozen=True)
class Plan:
    """A generation configuration as it applies to one batch.

    Attributes:
        settings: With `generate()`'s defaults where nothing was set.
        targets: Prompts and limits of the sources.
        ends: Tokens that end a sentence, `(E,)` int64; often one, perhaps none.
    """

    settings: GenerationConfig
    targets: Targets
    ends: np.ndarray

    @property
    def beams(self) -> int:
        """Width of a beam search; 1 for greedy search and sampling."""
        return int(self.settings.num_beams)

    @property
    def rows(self) -> int:
        """Rows that are decoded for each source: its beams, or its samples."""
        return max(self.beams, int(self.settings.num_return_sequences))

    def processors(self, prompt_length: int, input_ids: Any) -> LogitsProcessorList:
        """`generate()`'s logits processors for sources `(B, S)` whose prompts have one length."""
        of_this_length = self.targets.prompt_lengths == prompt_length
        settings: Any = copy.copy(self.settings)
        settings.max_length = int(self.targets.maximum[of_this_length][0])
        settings.min_length = int(self.targets.minimum[of_this_length][0])
        return _GENERATION._get_logits_processor(
            settings, input_ids_seq_length=prompt_length, encoder_input_ids=input_ids, device="cpu"
        )

    def warpers(self) -> LogitsProcessorList:
        """Of these processors, those that only sampling has: temperature, top-k and so on."""
        names = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
        alone = GenerationConfig(do_sample=True, **{name: getattr(self.settings, name) for name in names})
        return _GENERATION._get_logits_processor(alone, input_ids_seq_length=1, device="cpu")

    def select(self, sources: np.ndarray) -> "Plan":
        """That of some sources."""
        return replace(self, targets=self.targets.select(sources))


class _Generation(GenerationMixin):
    """What `generate()` makes of settings, without a model: its own code, so that nothing can come to differ."""

    config = SimpleNamespace(is_encoder_decoder=True)


_GENERATION: Any = _Generation()


def token_list(tokens: int | list[int] | None) -> list[int]:
    """A setting that is one token, several or none."""
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def make_plan(batch: Batch, settings: GenerationConfig, engine: Engine) -> Plan:
    """Complete settings as `generate()` does, and work out the lengths of each sentence.

    Raises:
        ValueError: A setting is not supported, or a sentence has no room for a token or would outgrow the engine.
    """
    check_settings(settings)
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        for token in token_list(getattr(settings, name)):
            if not 0 <= token < engine.vocab_size:
                raise ValueError(f"`{name}` is {token}, but the vocabulary has {engine.vocab_size} tokens.")
    # generate() counts a maximum of its own as new tokens, and one that was set as all tokens.
    has_maximum = settings.max_length is not None
    sentences = len(batch.prefixes)
    completed = _complete(settings, sentences)
    start = completed._decoder_start_token_tensor.numpy()
    if start.ndim and len(start) != sentences:
        raise ValueError(f"`decoder_start_token_id` has {len(start)} tokens, but the batch {sentences} sentences.")
    prompts, lengths = _pad_prompts(np.broadcast_to(start, sentences), batch.prefixes)
    ends = completed._eos_token_tensor
    targets = Targets(
        prompts, lengths, _minimum(completed, lengths), _maximum(completed, lengths, has_maximum, engine)
    )
    _check_lengths(targets, completed, engine)
    return Plan(completed, targets, np.zeros(0, dtype=np.int64) if ends is None else ends.numpy())


def check_values(settings: GenerationConfig) -> None:
    """Have the logits processors of `generate()` check the values that they are made of, such as `top_p`.

    Raises:
        ValueError: One cannot be.
    """
    for name in ("top_p", "typical_p"):
        # They leave out what does nothing.
        if (value := getattr(settings, name)) is not None and value > 1:
            raise ValueError(f"`{name}` must be at most 1, but is {value}.")
    completed = _complete(settings, 1)
    # It wants to know the vocabulary; the values are checked where it is set.
    completed.watermarking_config = None
    source = torch.zeros(1, 1, dtype=torch.int64)
    _GENERATION._get_logits_processor(completed, input_ids_seq_length=1, encoder_input_ids=source, device="cpu")


def _complete(settings: GenerationConfig, sentences: int) -> Any:
    """A copy with `generate()`'s defaults where nothing was set, and with special tokens as tensors."""
    completed: Any = copy.deepcopy(settings)
    # Not by `update`, which would warn of what was given for nothing, as `length_penalty` seems to be with one beam.
    for name, value in GenerationConfig._get_default_generation_params().items():
        if getattr(completed, name) is None:
            setattr(completed, name, value)
    _GENERATION._prepare_special_tokens(completed, device="cpu", batch_size=sentences)
    return completed


def _pad_prompts(starts: np.ndarray, prefixes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([1 + len(prefix) for prefix in prefixes], dtype=np.int64)
    prompts = np.full((len(prefixes), lengths.max()), NO_TOKEN, dtype=np.int64)
    for row, (start, prefix) in enumerate(zip(starts, prefixes, strict=True)):
        prompts[row, : lengths[row]] = [start, *prefix]
    return prompts, lengths


def _minimum(settings: GenerationConfig, prompt_lengths: np.ndarray) -> np.ndarray:
    if settings.min_new_tokens is not None:
        return prompt_lengths + settings.min_new_tokens
    return np.full_like(prompt_lengths, settings.min_length)


def _maximum(settings: GenerationConfig, prompt_lengths: np.ndarray, has_maximum: bool, engine: Engine) -> np.ndarray:
    if settings.max_new_tokens is not None:
        return prompt_lengths + settings.max_new_tokens
    if has_maximum:
        return np.full_like(prompt_lengths, settings.max_length)
    maximum: np.ndarray = prompt_lengths + settings.max_length
    return maximum if engine.max_target_length is None else np.minimum(maximum, engine.max_target_length)


def _check_lengths(targets: Targets, settings: GenerationConfig, engine: Engine) -> None:
    full = np.flatnonzero(targets.prompt_lengths >= targets.maximum)
    if len(full):
        raise ValueError(
            f"Sentence {full[0]} begins with {targets.prompt_lengths[full[0]]} tokens, start token included, but "
            f"decoding stops at {targets.maximum[full[0]]}: give a shorter prefix, or `max_new_tokens`."
        )
    # The last token is chosen, but not fed.
    longest = int(targets.maximum.argmax())
    positions, fed = engine.max_target_length, int(targets.maximum[longest]) - 1
    if positions is not None and fed > positions:
        name = "max_length" if settings.max_new_tokens is None else "max_new_tokens"
        prompt = int(targets.prompt_lengths[longest])
        raise ValueError(
            f"`{name}` is {getattr(settings, name)}, but the model has {positions} target positions, of which start "
            f"token and prefix take {prompt}: give `max_new_tokens` of {max(positions + 1 - prompt, 1)} or less."
        )
