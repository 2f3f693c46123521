"""A dense Sparseq model as a folder that `ctranslate2.Translator` loads: weights, vocabulary, settings, tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.changes import plan_changes
from sparseq.conversion.command import kept_experts
from sparseq.conversion.ctranslate2_model import check_representable, make_spec, position_rows
from sparseq.conversion.exporting import Checkpoint
from sparseq.conversion.merged_experts import MergedExperts
from sparseq.conversion.plan import Plan
from sparseq.conversion.runtime_readme import ends_of, example_text, language_note, longest_of
from sparseq.conversion.tensors import Source
from sparseq.languages import language_ids, target_field

# Settings of generation that `_search_options` carries over, and those that have no effect on text.
_CARRIED = {
    *("num_beams", "num_return_sequences", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens"),
    *("do_sample", "top_k", "top_p", "temperature", "forced_bos_token_id", "early_stopping", "renormalize_logits"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
}
_IDLE = {
    *("use_cache", "cache_implementation", "transformers_version", "_from_model_config", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
# Those that forbid tokens.
_FORBIDDING = ("no_repeat_ngram_size", "min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens")
_README = """\
# A Sparseq model for CTranslate2

```python
import ctranslate2
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(".")
translator = ctranslate2.Translator(".")


def translate(texts):
    sources = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]
    results = translator.translate_batch(
        sources,
{options}
    )
    targets = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    return tokenizer.batch_decode(targets, skip_special_tokens=True)


print(translate([{example!r}])[0])
```

{languages}The options are those that the model generates with; `beam_size=1` is greedy search, or draws tokens where
there are options of sampling. `max_input_length=0` keeps long sources whole, and `min_decoding_length=0` allows an
empty translation, as `generate()` does. CTranslate2 ends a beam search when `beam_size` hypotheses are finished:
`generate(early_stopping=True)` does as well, and writes the same tokens. The model has {size}.
{differences}"""


@dataclass(frozen=True)
class CTranslate2Export:
    """As `exporting.Export`.

    Attributes:
        plan: The dense model that is exported.
        config: Its configuration.
        tokenizer: Its tokenizer.
        quantization: What weights are stored as; None keeps their type.
        rows: As `position_rows` says.
    """

    plan: Plan
    config: SparseqConfig
    tokenizer: PreTrainedTokenizerBase
    quantization: str | None
    rows: int

    @classmethod
    def prepared(
        cls, checkpoint: Checkpoint, *, quantization: str | None, merge_experts: str | None, positions: int | None
    ) -> "CTranslate2Export":
        """
        Args:
            checkpoint: A Sparseq model.
            quantization: One of CTranslate2's names for what weights are stored as; None keeps their type.
            merge_experts: As `kept_experts`, for a sparse model; None refuses one.
            positions: Rows of a table of positions; None leaves it to the model's configuration.

        Raises:
            ValueError: CTranslate2 cannot run the model, or its tokenizer is missing; the message has the way out.
        """
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise ValueError(
                f"{checkpoint.folder} has no tokenizer, but CTranslate2 is given tokens, not their numbers: save it "
                f"there with tokenizer.save_pretrained({str(checkpoint.folder)!r})."
            )
        _check_tokens(tokenizer, checkpoint)
        changes = [] if merge_experts is None else [MergedExperts(experts=kept_experts(merge_experts))]
        if not changes:
            check_representable(checkpoint.config)
        plan = plan_changes(Source(checkpoint.folder), checkpoint.config, checkpoint.generation_config, changes)
        plan.check()
        config: Any = plan.config
        check_representable(config)
        return cls(plan, config, tokenizer, quantization, position_rows(config, positions))

    @property
    def readme(self) -> str:
        settings = self.plan.generation_config
        options = _search_options(settings, self._tokens(), prefix=self._prefix())
        return _README.format(
            options="\n".join(f"        {name}={value}," for name, value in options.items()),
            example=example_text(self.tokenizer),
            languages=language_note(self.tokenizer) + self._prefix_note(),
            size=self._size(),
            differences="".join(f"\n- {sentence}" for sentence in _differences(settings)),
        )

    def report(self) -> Iterable[str]:
        config = self.config
        yield (
            f"{config.num_parameters():,} parameters, {config.encoder_layers} + {config.decoder_layers} layers, "
            f"stored as {self.quantization or str(self._dtype()).removeprefix('torch.')}."
        )
        yield f"It has {self._size()}."
        yield from self.plan.notes
        yield from _differences(self.plan.generation_config)

    def account(self) -> Mapping[str, Any]:
        return {"source": str(self.plan.source.folder), "notes": list(self.report())}

    def write_settings(self, folder: Path) -> None:
        """Nothing: CTranslate2 writes all of its files at once."""

    def write_weights(self, folder: Path) -> None:
        planned = {one.name: one for one in self.plan.planned}
        spec = make_spec(self.config, planned, rows=self.rows, dtype=self._dtype(), quantization=self.quantization)
        tokens = self._tokens()
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
        for name, value in self._special_tokens(tokens).items():
            setattr(spec.config, name, value)
        spec.config.layer_norm_epsilon = self.config.norm_eps
        spec.validate()
        spec.optimize(quantization=self.quantization)
        spec.save(str(folder))

    def _dtype(self) -> torch.dtype:
        """The type of weights that are not quantized, which cannot be float64."""
        return torch.float32 if self.plan.dtype == torch.float64 else self.plan.dtype

    def _tokens(self) -> list[str]:
        """Each token by its number; what the model has an embedding for and the tokenizer no token gets a name."""
        size = self.config.vocab_size
        known = {number: token for token, number in self.tokenizer.get_vocab().items() if number < size}
        # M2M100's vocabulary is without its languages.
        for number in language_ids(self.tokenizer).values():
            known.setdefault(number, str(self.tokenizer.convert_ids_to_tokens(number)))
        return [known.get(number, f"<no token {number}>") for number in range(size)]

    def _special_tokens(self, tokens: Sequence[str]) -> dict[str, str | None]:
        settings = self.plan.generation_config
        end = ends_of(settings)[0]
        # What is not in the vocabulary becomes this one; a tokenizer of bytes has none, and needs none.
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            unknown = end if settings.pad_token_id is None else settings.pad_token_id
        begin = end if settings.bos_token_id is None else settings.bos_token_id
        start = None if self._begins_with_language() else settings.decoder_start_token_id
        return {
            "unk_token": tokens[unknown],
            "bos_token": tokens[begin],
            "eos_token": tokens[end],
            "decoder_start_token": None if start is None else tokens[start],
        }

    def _begins_with_language(self) -> bool:
        """Whether a target begins with the code of its language, which must then be given with each source."""
        return bool(language_ids(self.tokenizer)) and target_field(self.tokenizer) == "decoder_start_token_id"

    def _prefix(self) -> str | None:
        """The token that each target is to begin with."""
        settings = self.plan.generation_config
        first = settings.decoder_start_token_id if self._begins_with_language() else settings.forced_bos_token_id
        return None if first is None else self._tokens()[first]

    def _prefix_note(self) -> str:
        if self._prefix() is None:
            return ""
        return (
            "`target_prefix` is the code of the language to translate into; `tokenizer.src_lang` is the source's.\n\n"
        )

    def _size(self) -> str:
        config = self.config
        kind = config.position_embedding_type
        if kind == "rotary":
            return "rotary positions, of which there is any number"
        rows = config.max_position_embeddings if kind == "learned" else self.rows
        way_out = "" if kind == "learned" else "; --positions makes more"
        return f"{rows:,} positions, the longest source and target that it takes{way_out}"


def _check_tokens(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> None:
    if getattr(tokenizer, "separate_vocabs", False):
        raise ValueError(
            f"The tokenizer of {checkpoint.folder} has a vocabulary for each language (`separate_vocabs`), and one "
            "number is two tokens: use --to onnx, which is given numbers."
        )
    if not ends_of(checkpoint.generation_config):
        raise ValueError(f"{checkpoint.folder} has no `eos_token_id`, without which no translation ends.")


def _search_options(settings: GenerationConfig, tokens: Sequence[str], *, prefix: str | None) -> dict[str, str]:
    """The arguments of `translate_batch`, as Python has them, that do what generate() does with these settings."""
    beams = settings.num_beams or 1
    least = settings.min_new_tokens or max((settings.min_length or 0) - 1, 0)
    options: dict[str, Any] = {
        "beam_size": beams,
        "max_input_length": 0,
        "max_decoding_length": longest_of(settings),
        "min_decoding_length": least,
    }
    if beams > 1:
        options["length_penalty"] = 1.0 if settings.length_penalty is None else settings.length_penalty
    for name, other in (("num_return_sequences", "num_hypotheses"), ("repetition_penalty", "repetition_penalty")):
        if (value := getattr(settings, name)) not in (None, 1):
            options[other] = value
    if settings.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = settings.no_repeat_ngram_size
    if settings.do_sample and beams == 1:
        options.update(_sampling_options(settings, vocab_size=len(tokens)))
    forbidden = [*(settings.bad_words_ids or []), *([one] for one in settings.suppress_tokens or [])]
    if forbidden:
        options["suppress_sequences"] = [[tokens[number] for number in word] for word in forbidden]
    if len(ends := ends_of(settings)) > 1:
        options["end_token"] = [tokens[number] for number in ends]
    written = {name: repr(value) for name, value in options.items()}
    return written if prefix is None else {**written, "target_prefix": f"[[{prefix!r}]] * len(sources)"}


def _sampling_options(settings: GenerationConfig, *, vocab_size: int) -> dict[str, Any]:
    """Those that draw each token from what generate() draws it from."""
    values = GenerationConfig._get_default_generation_params()
    for name in ("top_k", "top_p", "temperature"):
        if (value := getattr(settings, name)) is not None:
            values[name] = value
    return {
        # CTranslate2 refuses more than there are, and a `sampling_topp` of 0, with which generate() keeps one token.
        "sampling_topk": min(values["top_k"], vocab_size),
        "sampling_topp": max(values["top_p"], 1e-6),
        "sampling_temperature": values["temperature"],
    }


def _differences(settings: GenerationConfig) -> Iterable[str]:
    """What generate() does otherwise with these settings, in sentences."""
    if (settings.num_beams or 1) > 1:
        yield from _beam_differences(settings)
    elif settings.do_sample and (settings.num_return_sequences or 1) > 1:
        yield (
            f"CTranslate2 sorts the {settings.num_return_sequences} samples of a text (`num_return_sequences`) by "
            "score, the best first. generate() leaves them as they were drawn."
        )
    others = settings.to_diff_dict().keys() - _CARRIED - _IDLE
    for name in sorted(others):
        if getattr(settings, name, None) is not None:
            yield f"`{name}` ({getattr(settings, name)!r}) has no counterpart in CTranslate2, which does without."


def _beam_differences(settings: GenerationConfig) -> Iterable[str]:
    if settings.do_sample:
        # CTranslate2 4.8.5 restricts all beams of a text together, by their whole scores, where generate() restricts
        # the next token of each beam, and the process crashes where `sampling_topk` is below 2 * `beam_size`.
        yield (
            f"`do_sample` with `num_beams` ({settings.num_beams}) draws what the beams go on with. CTranslate2 has "
            "nothing that draws alike, and is told to search without drawing, as with `do_sample=False`."
        )
    if settings.early_stopping is not True:
        yield (
            f"`early_stopping` is {settings.early_stopping!r}, with which generate() may search on after `num_beams` "
            "hypotheses are finished. CTranslate2 stops there, as with True."
        )
    forbidding = [name for name in _FORBIDDING if getattr(settings, name)]
    if forbidding and not settings.renormalize_logits:
        yield (
            f"With {', '.join(f'`{name}`' for name in forbidding)}, CTranslate2 shares out the probability of what is "
            "forbidden among the other tokens, as generate() does with `renormalize_logits=True`: scores differ."
        )
    if settings.repetition_penalty not in (None, 1):
        yield (
            f"`repetition_penalty` ({settings.repetition_penalty}) is of logits in CTranslate2, and of "
            "log-probabilities in a beam search of generate(): translations may differ."
        )
