"""Cutting a text that is too long for a model where it hurts least, without knowing its language."""

# ruff: noqa: RUF001 (marks of other scripts look like ours, and are not the same)

import re
import unicodedata
from collections.abc import Callable, Sequence

# Quotation marks and brackets that end with the sentence in front of them.
_CLOSING = r"[\"'”’»›)\]}」』）】〉》]*"
# Scripts that put blanks between words need one after the mark; the others have marks of their own.
_SENTENCE_END = re.compile(rf"[.!?…؟۔।॥։]+{_CLOSING}\s+|[。！？｡…]+{_CLOSING}\s*")
_CLAUSE_END = re.compile(rf"[,;:،؛–—]{_CLOSING}\s+|[，、；：]{_CLOSING}\s*")
_WORD_END = re.compile(r"\s+")
# "J. Smith", and the "z." of "z. B.": a letter by itself is no sentence.
_INITIAL = re.compile(r"(?:^|[\s.(])\w\.$")


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut a text into pieces that fit, in order and as long as whole sentences allow.

    A sentence that is too long by itself is cut behind a comma or the like, or else between words; a word that is too
    long is cut anywhere.

    Args:
        text: The text, blanks around it do not count.
        fits: Whether a piece is short enough.

    Returns:
        Pieces without blanks around them. All of them fit, unless not even one character does.
    """
    return _split(text.strip(), fits, (sentences, _clauses, _words))


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the blanks behind it.

    A sentence ends with one of . ! ? … and their like in other scripts, and quotation marks and brackets that close
    behind them. A mark is none where a lower-case letter follows, or a single letter stands before a full stop.
    """
    return _cut(text, _SENTENCE_END, _ends_sentence)


def _clauses(text: str) -> list[str]:
    return _cut(text, _CLAUSE_END)


def _words(text: str) -> list[str]:
    return _cut(text, _WORD_END)


def _ends_sentence(before: str, after: str) -> bool:
    return not after.islower() and not _INITIAL.search(before)


def _cut(text: str, end: re.Pattern[str], is_end: Callable[[str, str], bool] | None = None) -> list[str]:
    """Cut behind each match of `end` that `is_end` does not reject.

    It is given what was matched with two characters in front of it, or fewer where the part begins, and the character
    behind it.
    """
    parts, start = [], 0
    for match in end.finditer(text):
        # Only so much of both sides: a text may be megabytes.
        before = text[max(start, match.start() - 2) : match.end()].rstrip()
        if is_end is None or is_end(before, text[match.end() : match.end() + 1]):
            parts.append(text[start : match.end()])
            start = match.end()
    return [*parts, text[start:]] if start < len(text) else parts


def _split(text: str, fits: Callable[[str], bool], cuts: Sequence[Callable[[str], list[str]]]) -> list[str]:
    if fits(text) or len(text) < 2:
        return [text]
    if not cuts:
        middle = _character_start(text, len(text) // 2)
        return [*_split(text[:middle], fits, ()), *_split(text[middle:], fits, ())]
    pieces: list[str] = []
    current = ""
    for part in cuts[0](text):
        if fits((current + part).strip()):
            current += part
            continue
        if current:
            pieces.append(current.strip())
        if fits(part.strip()):
            current = part
        else:
            # Its end may go on with what follows.
            *whole, current = _split(part.strip(), fits, cuts[1:])
            pieces += whole
            current += part[len(part.rstrip()) :]
    return [*pieces, current.strip()] if current.strip() else pieces


def _character_start(text: str, index: int) -> int:
    """The nearest place from `index` on that does not part a letter from its accents; never an end of the text."""
    for place in range(max(index, 1), len(text)):
        if not unicodedata.combining(text[place]):
            return place
    return max(index, 1)
