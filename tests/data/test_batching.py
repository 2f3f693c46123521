"""Token-budget batches: complete, within budget, repeatable, shareable and tight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq.data.batching import TokenBatchSampler, padding_share

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=120)


def _corpus(size: int = 6000) -> tuple[list[int], list[int]]:
    """Lengths like those of Multi30k: mean 15.7 and deviation 4 to 5 tokens a side, correlation 0.8."""
    generator = np.random.default_rng(0)
    sources = np.clip(generator.gamma(14.0, 1.12, size), 4, 56).round().astype(int)
    targets = np.clip(sources * generator.normal(1.0, 0.18, size), 4, 56).round().astype(int)
    return sources.tolist(), targets.tolist()


def _padded_size(batch: list[int], sources: list[int], targets: list[int], counts: str) -> int:
    width = max(targets[i] for i in batch)
    if counts == "source+target":
        width += max(sources[i] for i in batch)
    return len(batch) * width


@pytest.mark.parametrize("counts", ["target", "source+target"])
@given(lengths=LENGTHS, budget=st.integers(60, 400), epoch=st.integers(0, 3), jitter=st.sampled_from([0.0, 1.0, 8.0]))
def test_every_pair_is_in_exactly_one_batch_within_the_budget(
    counts: str, lengths: list[tuple[int, int]], budget: int, epoch: int, jitter: float
) -> None:
    sources, targets = [s for s, _ in lengths], [t for _, t in lengths]
    sampler = TokenBatchSampler(sources, targets, budget=budget, counts=counts, jitter=jitter)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(_padded_size(batch, sources, targets, counts) <= budget for batch in batches)
    assert len(batches) == len(sampler)


def test_an_epoch_is_repeatable_and_differs_from_the_next() -> None:
    sources, targets = _corpus()
    first = TokenBatchSampler(sources, targets, budget=1024, seed=3)
    second = TokenBatchSampler(sources, targets, budget=1024, seed=3)
    epochs = []
    for epoch in (0, 1, 2):
        first.set_epoch(epoch)
        epochs.append(list(first))
    second.set_epoch(2)
    assert list(second) == epochs[2]
    assert epochs[0] != epochs[1]
    # Not only the order of the batches changes, but also who meets whom.
    assert {tuple(sorted(batch)) for batch in epochs[0]} != {tuple(sorted(batch)) for batch in epochs[1]}
    other_seed = TokenBatchSampler(sources, targets, budget=1024, seed=4)
    assert list(other_seed) != epochs[0]


@pytest.mark.parametrize("counts", ["target", "source+target"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch_evenly(counts: str, world_size: int) -> None:
    sources, targets = _corpus()
    ranks = [
        TokenBatchSampler(sources, targets, budget=1024, counts=counts, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])}
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(sources)))


def test_the_number_of_batches_never_depends_on_the_epoch() -> None:
    sources, targets = _corpus()
    sampler = TokenBatchSampler(sources, targets, budget=700, counts="source+target", jitter=3.0)
    for epoch in range(25):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)


@pytest.mark.parametrize(("counts", "limit"), [("target", 0.08), ("source+target", 0.06)])
def test_padding_is_low_and_batches_are_full(counts: str, limit: float) -> None:
    sources, targets = _corpus(29_000)
    sampler = TokenBatchSampler(sources, targets, budget=4096, counts=counts)
    batches = list(sampler)
    assert padding_share(batches, sources, targets) < limit
    tokens = sum(targets) + (sum(sources) if counts == "source+target" else 0)
    assert tokens / (len(batches) * 4096) > 0.9
    order = np.random.default_rng(0).permutation(len(sources))
    random_batches = [order[start : start + 64].tolist() for start in range(0, len(order), 64)]
    assert padding_share(random_batches, sources, targets) > 4 * limit


def test_padding_share_of_a_worked_example() -> None:
    # First batch: 2 x (4 + 3) positions for 2 + 4 + 3 + 1 tokens; second: no padding in 1 x (5 + 2).
    assert padding_share([[0, 1], [2]], [2, 4, 5], [3, 1, 2]) == pytest.approx(1 - (10 + 7) / (14 + 7))


def test_without_shuffling_the_longest_come_first() -> None:
    sources, targets = _corpus(500)
    batches = list(TokenBatchSampler(sources, targets, budget=512, shuffle=False))
    widths = [max(targets[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"pair 1 has 3 source and 90 target tokens.*budget of 64.*max_length"):
        TokenBatchSampler([3, 3], [5, 90], budget=64)
    with pytest.raises(ValueError, match="2 source lengths and 1 target"):
        TokenBatchSampler([3, 3], [5], budget=64)
    with pytest.raises(ValueError, match='"target" or "source\\+target"'):
        TokenBatchSampler([3], [5], budget=64, counts="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot fill a batch on 4 processes"):
        TokenBatchSampler([3, 3], [5, 5], budget=64, world_size=4)
    with pytest.raises(ValueError, match="do not make 6 batches"):
        TokenBatchSampler([3] * 5, [60] * 5, budget=64, world_size=2)
    with pytest.raises(ValueError, match="`rank` must be"):
        TokenBatchSampler([3], [5], budget=64, rank=1)
