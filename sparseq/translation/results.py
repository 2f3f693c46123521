"""What a `Translator` returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TranslatedHypothesis:
    """One translation of a text.

    Attributes:
        text: The translation, with the prefix that it was made to begin with.
        score: Sum of the log-probabilities of its tokens (the end of the sentence among them, the prefix not), divided
            by their number to the power of `length_penalty`.
        tokens: Its target tokens, T of them, as the tokenizer writes them.
        attention: Cross-attention `(T, S)`, how much each target token looks at each source token; of the last decoder
            layer but one, averaged over its heads. None unless asked for.
    """

    text: str
    score: float
    tokens: list[str]
    attention: np.ndarray | None = None


@dataclass(frozen=True)
class Translation:
    """What became of one text.

    Attributes:
        text, score: Those of the best hypothesis. An empty text, or one of blanks alone, has the translation "" with
            the score 0.
        hypotheses: The `num_return_sequences` best, best first.
        source_tokens: The S tokens that the model has read, language tag and end of the sentence included. Those of a
            text that was split follow one another.
    """

    text: str
    score: float
    hypotheses: list[TranslatedHypothesis]
    source_tokens: list[str]


@dataclass(frozen=True)
class PieceHypothesis:
    """One translation of a piece of a text.

    Attributes:
        text, tokens, attention: As those of `TranslatedHypothesis`.
        log_prob: Sum of the log-probabilities of what was chosen.
        length: Tokens that were chosen.
    """

    text: str
    tokens: list[str]
    attention: np.ndarray | None
    log_prob: float
    length: int


def blank_translation(number: int) -> Translation:
    """The translation of a text with nothing in it, with `number` hypotheses."""
    return Translation("", 0.0, [TranslatedHypothesis("", 0.0, []) for _ in range(number)], [])


def join_pieces(pieces: Sequence[tuple[list[str], Sequence[PieceHypothesis]]], length_penalty: float) -> Translation:
    """The translation of a text, made of those of its pieces.

    The hypothesis of rank i has the one of rank i of each piece; its score is what it would be if they were one.

    Args:
        pieces: Source tokens and hypotheses of each.
        length_penalty: Exponent of the length in scores.
    """
    ranks = zip(*(hypotheses for _, hypotheses in pieces), strict=True)
    hypotheses = [_join(parts, length_penalty) for parts in ranks]
    source_tokens = [token for tokens, _ in pieces for token in tokens]
    return Translation(hypotheses[0].text, hypotheses[0].score, hypotheses, source_tokens)


def _join(parts: Sequence[PieceHypothesis], length_penalty: float) -> TranslatedHypothesis:
    length = sum(part.length for part in parts)
    weights = [part.attention for part in parts if part.attention is not None]
    return TranslatedHypothesis(
        text=" ".join(part.text for part in parts if part.text),
        score=sum(part.log_prob for part in parts) / max(length, 1) ** length_penalty,
        tokens=[token for part in parts for token in part.tokens],
        attention=_block_diagonal(weights) if weights else None,
    )


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices from corner to corner; a token of one piece has not looked at the others."""
    if len(blocks) == 1:
        return blocks[0]
    result = np.zeros(np.sum([block.shape for block in blocks], axis=0), dtype=blocks[0].dtype)
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return result
