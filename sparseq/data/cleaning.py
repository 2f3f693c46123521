"""Defects of parallel text: found, counted, and left out, kept or refused as the user asks."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Action = Literal["keep", "skip", "refuse", "truncate"]

# Kind of defect -> how a report calls pairs that have it.
DEFECTS = {
    "not_utf8": "that are not UTF-8",
    "empty_source": "with an empty source",
    "empty_target": "with an empty target",
    "replacement_character": "with U+FFFD, left by a broken conversion",
    "identical": "whose target is the source",
    "duplicate": "that repeat an earlier pair",
    "too_long": "too long",
    "unbalanced": "of very different lengths",
}
# Line numbers that a report shows of each kind.
SHOWN_LINES = 5
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Policy:
    """What happens to pairs with each kind of defect. Both empty sides count as one kind.

    "skip" leaves the pair out, "keep" only counts it, "refuse" stops with a message, "truncate" cuts long sides.
    """

    empty: Action = "skip"
    not_utf8: Action = "refuse"
    replacement_character: Action = "keep"
    identical: Action = "keep"
    duplicate: Action = "keep"
    too_long: Action = "skip"
    unbalanced: Action = "keep"
    max_length_ratio: float = 9.0

    def action(self, kind: str) -> Action:
        """The action for one of `DEFECTS`."""
        action: Action = getattr(self, "empty" if kind.startswith("empty_") else kind)
        return action

    def for_evaluation(self) -> "Policy":
        """The same for a split that is scored: every line stays, because a score on other lines compares to nothing.

        A line that is not UTF-8 cannot stay, so it is refused.
        """
        return Policy(
            empty="keep",
            not_utf8="refuse",
            too_long="truncate",
            max_length_ratio=self.max_length_ratio,
        )


@dataclass(frozen=True)
class Defect:
    """Pairs with one kind of defect.

    Attributes:
        count: How many there are.
        lines: The numbers, from 1, of the first of them.
        action: What was done with them.
    """

    count: int
    lines: tuple[int, ...] = ()
    action: Action = "keep"


@dataclass
class Inspector:
    """Looks at pairs one after another; `defects` and `pairs` grow as it goes.

    Attributes:
        policy: What to do with each kind.
        where: The text, as messages call it.
        unit: "line" or "row".
        pairs: Pairs seen.
        defects: What was found.
    """

    policy: Policy
    where: str
    unit: str = "line"
    pairs: int = 0
    defects: dict[str, Defect] = field(default_factory=dict)
    _hashes: "array[int]" = field(default_factory=lambda: array("q"))

    def inspect(
        self, sources: Sequence[str | bytes | None], targets: Sequence[str | bytes | None]
    ) -> tuple[list[str], list[str], list[int]]:
        """The pairs of a batch that stay, and their line numbers. None is an empty side, bytes are not UTF-8.

        What is refused waits for `finish`, which knows how much of it there is.
        """
        kept: tuple[list[str], list[str], list[int]] = ([], [], [])
        for source, target in zip(sources, targets, strict=True):
            self.pairs += 1
            source, target = source or "", target or ""
            kinds = self._kinds(source, target)
            for kind in kinds:
                count_defect(self.defects, kind, self.pairs, self.policy.action(kind))
            if any(self.policy.action(kind) == "skip" for kind in kinds) or "not_utf8" in kinds:
                continue
            self._hashes.append(hash((source, target)))
            assert isinstance(source, str)
            assert isinstance(target, str)
            kept[0].append(source)
            kept[1].append(target)
            kept[2].append(self.pairs)
        return kept

    def finish(self, lines: Sequence[int] | np.ndarray) -> np.ndarray:
        """Count repetitions; returns which of the pairs that `inspect` kept stay, as a mask.

        Repetitions are found by 64-bit hashes: 8 bytes a pair, and one false find in 3,700 corpora of 100 million.

        Args:
            lines: The line number of each pair that `inspect` kept.

        Raises:
            ValueError: There is something that is to be refused; the message counts all of it.
        """
        hashes = np.frombuffer(self._hashes, dtype=np.int64) if self._hashes else np.zeros(0, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        stays = np.ones(len(hashes), dtype=bool)
        action = self.policy.duplicate
        if len(again):
            first = tuple(int(lines[int(position)]) for position in np.sort(again)[:SHOWN_LINES])
            self.defects["duplicate"] = Defect(len(again), first, action)
            stays[again] = action != "skip"
        self.defects = {kind: self.defects[kind] for kind in DEFECTS if kind in self.defects}
        refuse_defects(self.defects, self.where, self.unit)
        return stays

    def _kinds(self, source: str | bytes, target: str | bytes) -> list[str]:
        if isinstance(source, bytes) or isinstance(target, bytes):
            return ["not_utf8"]
        # A pair without one side has no other defect worth counting.
        kinds = [
            kind for kind, side in (("empty_source", source), ("empty_target", target)) if not side or side.isspace()
        ]
        if kinds:
            return kinds
        if _REPLACEMENT in source or _REPLACEMENT in target:
            kinds.append("replacement_character")
        if source.strip() == target.strip():
            kinds.append("identical")
        return kinds


def count_defect(defects: dict[str, Defect], kind: str, line: int, action: Action) -> None:
    """Add the pair of line `line` to `defects`."""
    found = defects.get(kind, Defect(0, (), action))
    lines = (*found.lines, line) if len(found.lines) < SHOWN_LINES else found.lines
    defects[kind] = Defect(found.count + 1, lines, action)


def refuse_defects(defects: Mapping[str, Defect], where: str, unit: str) -> None:
    """Raise if something was found that is to be refused.

    Raises:
        ValueError: The message counts it and names the first lines.
    """
    refused = {kind: defect for kind, defect in defects.items() if defect.action == "refuse"}
    if refused:
        keys = ", ".join(f"data.if_{recipe_key(kind)}=skip" for kind in refused)
        raise ValueError(
            f"{where}: refused, because it has {'; '.join(describe_defects(refused, unit))}. Mend the text, or set "
            f"{keys}."
        )


def describe_defects(defects: Mapping[str, Defect], unit: str) -> Iterator[str]:
    """A few words about each kind, such as "2 pairs with an empty source (skipped): lines 3, 7"."""
    done = {"keep": "kept", "skip": "skipped", "refuse": "refused", "truncate": "truncated"}
    for kind, defect in defects.items():
        more = ", ..." if defect.count > len(defect.lines) else ""
        numbers = (
            f": {unit}{'s' * (defect.count > 1)} {', '.join(map(str, defect.lines))}{more}" if defect.lines else ""
        )
        pairs = "pair" if defect.count == 1 else "pairs"
        yield f"{defect.count:,} {pairs} {DEFECTS[kind]} ({done[defect.action]}){numbers}"


def recipe_key(kind: str) -> str:
    """The key of a recipe, less its "if_", that decides over a kind of defect."""
    return "empty" if kind.startswith("empty_") else kind


def add_up(several: Iterable[Mapping[str, Defect]]) -> dict[str, Defect]:
    """The defects of several texts together, without line numbers."""
    total: dict[str, Defect] = {}
    for defects in several:
        for kind, defect in defects.items():
            before = total[kind].count if kind in total else 0
            total[kind] = Defect(before + defect.count, (), defect.action)
    return {kind: total[kind] for kind in DEFECTS if kind in total}
