"""Languages of a translation: what a model's tokenizer calls them, and how the model is told of them."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sparseq.tokenization_sparseq import source_prefix

# NLLB keeps its codes among the special tokens only: "deu_Latn".
_NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


@dataclass(frozen=True)
class Cue:
    """What tells a model into which language to translate, besides the marks that its tokenizer gives texts.

    Attributes:
        prefix: Put before each source, such as the language tag "<2de> ".
        generation: Options of generate(): `decoder_start_token_id` or `forced_bos_token_id`.
    """

    prefix: str = ""
    generation: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Direction:
    """From which language a text is to be translated, and into which.

    Attributes:
        source, target: The languages as the text names them, such as "en"; None where it names none.
        source_codes, target_codes: What tokenizers with other names call them, such as "eng_Latn"; each tokenizer is
            given the first that it knows.
        option, code_option: With what a user names a language or a tokenizer's own code, for messages.
    """

    source: str | None = None
    target: str | None = None
    source_codes: Sequence[str] = ()
    target_codes: Sequence[str] = ()
    option: str = "--{side}"
    code_option: str = "--{side}-code CODE"

    def set_up(self, tokenizer: PreTrainedTokenizerBase, name: str) -> Cue:
        """Have a tokenizer mark texts with these languages, where it does that.

        Tokenizers of mBART, mBART-50, M2M100 and NLLB mark sources and labels with codes, and their models write a
        code before the text or begin with it. Others have a tag for the target, or nothing.

        Args:
            tokenizer: A model's; its `src_lang` and `tgt_lang` are set if it has language codes.
            name: Of the model, for messages.

        Raises:
            ValueError: The tokenizer has language codes, but not for both languages, or one of them was not named.
        """
        known = language_ids(tokenizer)
        if not known:
            names = [*self.target_codes, *([self.target] if self.target else [])]
            prefixes = (source_prefix(tokenizer, one) for one in names)
            return Cue(next((prefix for prefix in prefixes if prefix), ""))
        codes = [self._code(side, known, name) for side in ("source", "target")]
        marking: Any = tokenizer
        marking.src_lang, marking.tgt_lang = codes
        return Cue(generation={target_field(tokenizer): known[codes[1]]})

    def _code(self, side: Literal["source", "target"], known: Collection[str], name: str) -> str:
        """The code that a tokenizer has for one side."""
        codes, language = (self.source_codes, self.source) if side == "source" else (self.target_codes, self.target)
        asked = [*codes, *([language] if language else [])]
        code_option = self.code_option.format(side=side)
        if not asked:
            raise ValueError(
                f"{name} has codes for {len(known)} languages, and must be told the {side} language: give "
                f"{code_option}, one of {_listed(known)}."
            )
        for one in asked:
            if found := matching_code(one, known):
                return found
        option = f"--{side}-code {' '.join(codes)}" if codes else f"{self.option.format(side=side)} {language}"
        raise ValueError(
            f"{option}: the tokenizer of {name} {unknown_code(asked[0], known)} Give its own code with {code_option}, "
            "whatever the language is called elsewhere."
        )


def language_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The language codes that a tokenizer of mBART, mBART-50, M2M100 or NLLB knows, with their ids; none of others."""
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if codes is None:
        special = (token for token in tokenizer.all_special_tokens if _NLLB_CODE.fullmatch(token))
        codes = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    # The class knows all languages that there are, the vocabulary of a smaller model may not.
    return {code: number for code, number in codes.items() if number != tokenizer.unk_token_id}


def target_field(tokenizer: PreTrainedTokenizerBase) -> str:
    """The field of a generation configuration with the target's code, for a tokenizer that has language codes.

    mBART begins with the code, the later ones begin as always and are made to write it first.
    """
    is_mbart = type(tokenizer).__name__ == "MBartTokenizer"
    return "decoder_start_token_id" if is_mbart else "forced_bos_token_id"


def unknown_code(code: str, known: Collection[str]) -> str:
    """What a tokenizer lacks and has instead; the end of a sentence that begins with the tokenizer."""
    # "eng_Latn" for "en", before any code that has these letters somewhere.
    begun = sorted(one for one in known if one.startswith(code))
    near = begun[:5] or difflib.get_close_matches(code, known, n=5, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {_listed(known)}."
    return f"has {len(known)} codes, but not this one; {hint}"


def matching_code(language: str, known: Collection[str]) -> str | None:
    """The code itself, or the only one of that language: "de_DE" for "de", "deu_Latn" for "deu"."""
    if language in known:
        return language
    found = [code for code in known if code.split("_")[0] == language]
    return found[0] if len(found) == 1 else None


def _listed(known: Collection[str]) -> str:
    return ", ".join(sorted(known))
