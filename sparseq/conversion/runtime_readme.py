"""What the README.md files of exports for runtimes have in common: greedy search in a few lines, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

# No sentence of anybody's data.
EXAMPLE = "A man is walking in the park."
_FAST = """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(pad_id={pad})
"""
_FAST_CALL = """

def translate(texts):
    batch = tokenizer.encode_batch(texts)
    rows = generate([one.ids for one in batch], [one.attention_mask for one in batch])
    return tokenizer.decode_batch(rows, skip_special_tokens=True)


print(translate([{text!r}])[0])
"""
_OTHER = """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
"""
_OTHER_CALL = """

def translate(texts):
    batch = tokenizer(texts, padding=True)
    rows = generate(batch["input_ids"], batch["attention_mask"])
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


print(translate([{text!r}])[0])
"""


@dataclass(frozen=True)
class GreedyProgram:
    """The parts of a program that are the same for every runtime.

    Attributes:
        tokenizer: Python that loads the tokenizer; empty where there is none.
        constants: Python that names special tokens and the longest translation.
        call: Python that translates a text with a function `generate`; empty where there is no tokenizer.
    """

    tokenizer: str
    constants: str
    call: str

    @classmethod
    def of(
        cls, folder: Path, settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> "GreedyProgram":
        """
        Args:
            folder: Of the model.
            settings: How it generates.
            tokenizer: Its tokenizer.
        """
        pad = settings.pad_token_id if settings.pad_token_id is not None else ends_of(settings)[0]
        first = [settings.decoder_start_token_id]
        if settings.forced_bos_token_id is not None:
            first.append(settings.forced_bos_token_id)
        constants = (
            f"FIRST = {first}\nENDS = {ends_of(settings)}\nPAD = {pad}\nMAX_NEW_TOKENS = {longest_of(settings)}\n"
        )
        if tokenizer is None:
            return cls("", constants, "")
        load, call = (_FAST, _FAST_CALL) if (folder / "tokenizer.json").is_file() else (_OTHER, _OTHER_CALL)
        return cls(load.format(pad=pad), constants, call.format(text=example_text(tokenizer)))


def ends_of(settings: GenerationConfig) -> list[int]:
    """The tokens that end a target."""
    ends = settings.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def longest_of(settings: GenerationConfig) -> int:
    """The number of tokens after which a translation ends in any case."""
    if settings.max_new_tokens is not None:
        return int(settings.max_new_tokens)
    # The start token counts there.
    return max((settings.max_length or 1) - 1, 1)


def example_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A source text as the model expects it, with the tag of a target language where it takes tags."""
    return " ".join([*_tags(tokenizer)[:1], EXAMPLE])


def language_note(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """How a source text says which language it is to be translated into; empty where it says nothing."""
    listed = ", ".join(f"`{tag}`" for tag in (_tags(tokenizer) if tokenizer else ()))
    return f"Each text begins with the tag of the language to translate into: {listed}.\n\n" if listed else ""


def _tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return list(getattr(tokenizer, "language_tags", ()))
