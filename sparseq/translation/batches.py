"""Batches of sentences of like length, filled to a budget of tokens, and windows on an endless stream."""

from collections.abc import Iterable, Iterator, Sequence

WINDOW_LINES = 2048
"""Most lines that are read, sorted by length and translated before the next ones are read."""

FIRST_LINES = 256
"""As many lines has the first window, and each has twice as many as the one before: so translations come soon, and a
run that is stopped early leaves some."""

WINDOW_CHARACTERS = 2**22
"""A window is closed before `WINDOW_LINES` where its lines have so many characters, which bounds its memory."""


def fill_batches(
    lengths: Sequence[int], budget: int, *, rows: int = 1, most: int | None = None
) -> Iterator[list[int]]:
    """Cut sentences into batches of like length, the longest first, so that memory peaks at once.

    Args:
        lengths: Tokens of each sentence.
        budget: Tokens that a batch holds at most, padding included. One sentence alone may have more.
        rows: How often each sentence takes part, as with `rows` beams.
        most: Sentences that a batch holds at most; None where there is no limit.

    Yields:
        Indices into `lengths`; each occurs once.

    Raises:
        ValueError: `budget` is not positive.
    """
    if budget < 1:
        raise ValueError(f"`batch_tokens` must be at least 1, but is {budget}.")
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and ((len(batch) + 1) * rows * lengths[batch[0]] > budget or len(batch) == most):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def windows(
    lines: Iterable[str],
    *,
    size: int = WINDOW_LINES,
    first: int = FIRST_LINES,
    characters: int = WINDOW_CHARACTERS,
) -> Iterator[list[str]]:
    """Cut a stream of lines, which may have no end, into lists of `first` lines, then twice as many, up to `size`.

    A list is also full when its lines have `characters` characters in all; only its last line may go beyond.
    """
    window: list[str] = []
    room, limit = characters, min(first, size)
    for line in lines:
        window.append(line)
        room -= len(line)
        if len(window) == limit or room <= 0:
            yield window
            window, room, limit = [], characters, min(2 * limit, size)
    if window:
        yield window
