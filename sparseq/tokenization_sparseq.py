"""The tokenizer of Sparseq: `tokenizer.json` says how text becomes ids, the class only adds conveniences.

`sparseq.training.tokenizer.train_tokenizer` makes one. Because nothing here takes part in encoding, the saved folder
gives the same ids where this package is not installed: `AutoTokenizer` then loads it as `TokenizersBackend`.
"""

import re
from collections.abc import Iterable

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*")
_LANGUAGE_TAG = re.compile(rf"<2({_LANGUAGE.pattern})>")


def language_tag(language: str) -> str:
    """Return the token that asks for a target language: `"de"` gives `"<2de>"`, and so does `"<2de>"` itself.

    Args:
        language: A language code of letters and digits, its parts joined by `-` or `_`, such as `de`, `pt-BR` or
            `zho_Hans`.

    Raises:
        ValueError: If `language` is no such code.
    """
    if _LANGUAGE_TAG.fullmatch(language):
        return language
    if not _LANGUAGE.fullmatch(language):
        raise ValueError(
            f"{language!r} is not a language code: use letters and digits, parts joined by '-' or '_', beginning with "
            "a letter, such as 'de', 'pt-BR' or 'zho_Hans' (the tag is then '<2de>', '<2pt-BR>', '<2zho_Hans>')."
        )
    return f"<2{language}>"


def source_prefix(tokenizer: PreTrainedTokenizerBase, language: str) -> str:
    """What a source text to be translated into `language` begins with: the tag and a blank, or nothing where the
    tokenizer has no such tag."""
    tag = language_tag(language)
    return f"{tag} " if tag in tokenizer.get_vocab() else ""


def language_tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The language tags in a tokenizer's vocabulary, in the order of their ids; its class does not matter."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [token.content for _, token in added if token.special and _LANGUAGE_TAG.fullmatch(token.content)]


class SparseqTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with one vocabulary for source and target.

    Source and target both end in `</s>`; nothing is put in front of them. A language tag such as `<2de>` is an
    ordinary special token that the caller writes before the source text, so a tag never appears by itself and
    `text_target=` gives labels under the same template:

    ```python
    batch = tokenizer("<2de> A man walks.", text_target="Ein Mann geht.", return_tensors="pt")
    ```

    A tag swallows the white space after it: the ids after the tag are those of the text alone. (`tokenize` therefore
    shows the tag together with that white space; `convert_ids_to_tokens` shows the tag itself.) The class defines no
    `__init__` on purpose: with one, transformers would rebuild the backend from the vocabulary and drop the
    normalizer, pre-tokenizer, post-processor and decoder of `tokenizer.json`.
    """

    @property
    def language_tags(self) -> list[str]:
        """The language tags in the vocabulary, in the order of their ids."""
        return language_tags(self)

    def add_language_tags(self, languages: Iterable[str]) -> int:
        """Add tags for languages the tokenizer was not trained with; return how many were new.

        The vocabulary grows by that number: call `model.resize_token_embeddings(len(tokenizer))` afterwards.

        Args:
            languages: Language codes (`"de"`) or tags (`"<2de>"`).

        Raises:
            ValueError: If one of them is no language code, or if `languages` is a single string.
        """
        if isinstance(languages, str):
            raise ValueError(f"`languages` must be a list of language codes, got the string {languages!r}.")
        tags = [AddedToken(language_tag(code), special=True, normalized=False, rstrip=True) for code in languages]
        return self.add_special_tokens({"extra_special_tokens": tags}, replace_extra_special_tokens=False)


__all__ = ["SparseqTokenizer", "language_tag"]
