"""Batches filled to a budget of tokens, with sentences of like length on both sides."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

BudgetCounts = Literal["target", "source+target"]

# Room in the number of batches of an epoch, so that an unlucky shuffle still fits the count announced by `__len__`.
_HEADROOM = 0.01


class TokenBatchSampler(BatchRebalanceSampler):
    """Batch sampler whose batches hold at most `budget` tokens, padding included.

    Sentence pairs are ordered by target length and, within one target length, by source length, alternately upwards
    and downwards, so that neighbours are alike on both sides everywhere; consecutive pairs then fill a batch. Every
    epoch breaks ties anew, moves each pair by up to `jitter` source tokens, and shuffles the batches. The order
    depends on `seed + epoch` alone: call `set_epoch` and it can be repeated or resumed anywhere.

    The number of batches is the same in every epoch (`Trainer` derives the number of steps from it) and a multiple of
    `world_size`. To reach it, the largest batches are cut in two; no batch ever exceeds the budget and no pair is
    lost or repeated.

    It derives from `BatchRebalanceSampler` because `Trainer` passes only instances of that class as a batch sampler
    and leaves their sharding to them; nothing else is inherited.

    Args:
        source_lengths: Tokens of each source, end of sentence included.
        target_lengths: Tokens of each target (label positions), end of sentence included.
        budget: Tokens a batch may hold on each process, after padding.
        counts: "target" counts the padded target side, "source+target" both padded sides.
        jitter: How far a pair may move among pairs of the same target length, in source tokens. 0 only breaks ties.
        shuffle: False gives one fixed order, longest batches first (for evaluation: memory peaks at once).
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes; process `r` gets batches `r, r + world_size, ...`.

    Raises:
        ValueError: A pair alone exceeds the budget, or there are too few pairs for the processes.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        *,
        budget: int,
        counts: BudgetCounts = "target",
        jitter: float = 1.0,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        Sampler.__init__(self)
        if counts not in ("target", "source+target"):
            raise ValueError(f'`counts` must be "target" or "source+target", but is {counts!r}.')
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be at least 0 and below `world_size` ({world_size}), but is {rank}.")
        self.source_lengths = np.asarray(source_lengths, dtype=np.int64)
        self.target_lengths = np.asarray(target_lengths, dtype=np.int64)
        if self.source_lengths.shape != self.target_lengths.shape:
            raise ValueError(
                f"There are {len(self.source_lengths)} source lengths and {len(self.target_lengths)} target lengths."
            )
        self.budget = budget
        self.counts = counts
        self.jitter = jitter
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        # Read by accelerate's wrappers.
        self.batch_size = None
        self.drop_last = False
        self._check_lengths()
        self.num_batches = self._count_batches()
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; the same epoch always gives the same batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch of one process; the same for every epoch and process."""
        return self.num_batches // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.global_batches()[self.rank :: self.world_size]

    def global_batches(self) -> list[list[int]]:
        """The batches of the current epoch for all processes, in order."""
        if self._cached is not None and self._cached[0] == self.epoch:
            return self._cached[1]
        generator = np.random.default_rng([self.seed, self.epoch])
        jitter = self.jitter if self.shuffle else 0.0
        batches = self._fill(self._order(generator, jitter))
        while len(batches) > self.num_batches:
            # Without jitter the shapes, and so the count, are those `_count_batches` has allowed for.
            jitter = jitter / 2 if jitter > 0.25 else 0.0
            batches = self._fill(self._order(generator, jitter))
        batches = _split_to(batches, self.num_batches)
        if self.shuffle:
            generator.shuffle(batches)
        else:
            batches.reverse()
        self._cached = (self.epoch, batches)
        return batches

    def _check_lengths(self) -> None:
        if len(self.source_lengths) < self.world_size:
            raise ValueError(
                f"{len(self.source_lengths)} sentence pairs cannot fill a batch on {self.world_size} processes."
            )
        costs = self.target_lengths + (self.source_lengths if self.counts == "source+target" else 0)
        longest = int(costs.argmax())
        if costs[longest] > self.budget:
            raise ValueError(
                f"Sentence pair {longest} has {self.source_lengths[longest]} source and "
                f"{self.target_lengths[longest]} target tokens, more than the budget of {self.budget} {self.counts} "
                "tokens a batch. Raise the budget, or drop pairs that long (`data.max_length` in a recipe)."
            )

    def _count_batches(self) -> int:
        generator = np.random.default_rng([self.seed])
        count = len(self._fill(self._order(generator, 0.0)))
        if self.shuffle and self.jitter:
            jittered = len(self._fill(self._order(generator, self.jitter)))
            if jittered != count:
                count = min(max(count, jittered) + int(np.ceil(_HEADROOM * count)), len(self.source_lengths))
        count += -count % self.world_size
        if count > len(self.source_lengths):
            raise ValueError(
                f"{len(self.source_lengths)} sentence pairs do not make {count} batches, the number that "
                f"{self.world_size} processes can share evenly. Use fewer processes."
            )
        return count

    def _order(self, generator: np.random.Generator, jitter: float) -> np.ndarray:
        """Indices by target length, then serpentine by source length moved by up to `jitter` tokens."""
        size = len(self.source_lengths)
        noise = generator.uniform(-jitter, jitter, size) if jitter else 0.0
        ties = generator.permutation(size) if self.shuffle else np.arange(size)
        # Alternate by rank of the target length, not by its parity, so that absent lengths do not break the line.
        rank_of_length = np.unique(self.target_lengths, return_inverse=True)[1]
        direction = np.where(rank_of_length % 2 == 0, 1.0, -1.0)
        return np.lexsort((ties, direction * (self.source_lengths + noise), self.target_lengths))

    def _fill(self, order: np.ndarray) -> list[list[int]]:
        """Cut `order` into batches as long as the budget allows."""
        both = self.counts == "source+target"
        batches: list[list[int]] = []
        batch: list[int] = []
        longest_source = longest_target = 0
        sources, targets = self.source_lengths.tolist(), self.target_lengths.tolist()
        for index in order.tolist():
            wider_source = max(longest_source, sources[index])
            wider_target = max(longest_target, targets[index])
            width = wider_target + (wider_source if both else 0)
            if batch and (len(batch) + 1) * width > self.budget:
                batches.append(batch)
                batch, wider_source, wider_target = [], sources[index], targets[index]
            batch.append(index)
            longest_source, longest_target = wider_source, wider_target
        if batch:
            batches.append(batch)
        return batches


def _split_to(batches: list[list[int]], count: int) -> list[list[int]]:
    """Halve the largest batches until there are `count`."""
    while len(batches) < count:
        position = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[position]
        batches[position : position + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def padding_share(
    batches: Sequence[Sequence[int]], source_lengths: Sequence[int], target_lengths: Sequence[int]
) -> float:
    """Share of padding among all tokens of both sides when each batch is padded to its own longest sentences."""
    sources, targets = np.asarray(source_lengths), np.asarray(target_lengths)
    real = padded = 0
    for batch in batches:
        indices = np.asarray(batch, dtype=np.int64)
        real += int(sources[indices].sum() + targets[indices].sum())
        padded += len(indices) * int(sources[indices].max() + targets[indices].max())
    return 1.0 - real / padded
