import itertools
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseq.data.batching import TokenBatchSampler
from sparseq.data.collation import PairCollator
from sparseq.data.denoising import (
    DenoisingPairs,
    Noise,
    SpanCorruption,
    TextInfilling,
    add_denoising_tokens,
    denoising_tokens,
)
from sparseq.training.tokenizer import train_tokenizer

SENTINELS = tuple(range(900, 1000))
MASK, END = 899, 2

seeds = st.integers(0, 2**32)
# Ids that no special token has, each once, so that a test sees which token went where.
lengths = st.integers(2, 200)


def text(length: int) -> np.ndarray:
    return np.arange(3, 3 + length)


@given(length=lengths, density=st.floats(0.05, 0.6), mean_span=st.floats(1.0, 6.0), seed=seeds)
def test_span_corruption_loses_nothing(length: int, density: float, mean_span: float, seed: int) -> None:
    noise = SpanCorruption(tuple(range(900, 1200)), density, mean_span)
    source, target = noise(text(length), np.random.default_rng(seed))
    # Each sentinel of the target begins the span that it stands for in the source.
    spans: dict[int, list[int]] = {}
    for token in target.tolist():
        if token >= 900:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    restored: list[int] = []
    for token in source.tolist():
        restored += spans.pop(token) if token >= 900 else [token]
    assert restored == text(length).tolist()
    assert not spans
    assert (len(source), len(target)) == noise.longest(length)


@given(seed=seeds)
def test_span_corruption_takes_what_the_paper_takes(seed: int) -> None:
    # 15% of 512 tokens in spans of 3 on average: 77 tokens in 26 spans.
    source, target = SpanCorruption(SENTINELS)(text(512), np.random.default_rng(seed))
    assert [token for token in source.tolist() if token >= 900] == list(SENTINELS[:26])
    assert len(target) == 77 + 26
    # A sentinel stands for at least one token, and between two there is at least one that stays.
    assert source[0] < 900
    assert all(a < 900 or b < 900 for tokens in (source, target) for a, b in pairwise(tokens.tolist()))


@given(length=st.integers(1, 200), density=st.floats(0.05, 0.9), mean_span=st.floats(1.0, 6.0), seed=seeds)
def test_text_infilling_masks_spans_of_the_text(length: int, density: float, mean_span: float, seed: int) -> None:
    noise = TextInfilling(MASK, density, mean_span)
    source, target = noise(text(length), np.random.default_rng(seed))
    assert target.tolist() == text(length).tolist()
    assert len(source) <= noise.longest(length)[0]
    stays = [token for token in source.tolist() if token != MASK]
    assert len(stays) == length - max(round(length * density), 1)
    # The source, with any text in place of a mask, is the target.
    pattern = "".join(".*" if token == MASK else _letter(token) for token in source.tolist())
    # One after another they mean the same as one, which takes less than for ever to match.
    assert re.fullmatch(re.sub(r"(\.\*)+", ".*", pattern), "".join(map(_letter, target.tolist())))


def _letter(token: int) -> str:
    return chr(0x4E00 + token)


def test_text_infilling_draws_poisson_spans() -> None:
    # The texts are long, so that few spans are cut short, and the draw is fixed.
    noise, generator = TextInfilling(MASK, 0.3, 3.0), np.random.default_rng(0)
    found = Counter(int(span) for _ in range(200) for span in noise._spans(3000, generator))
    total = sum(found.values())
    for length in range(8):
        expected = 3.0**length * np.exp(-3.0) / np.prod(np.arange(1, length + 1), initial=1.0)
        assert found[length] / total == pytest.approx(expected, abs=0.005)


def test_every_way_to_corrupt_is_equally_likely() -> None:
    # 6 tokens of which 3 go in 2 spans: 2 ways to cut what goes, 2 to cut what stays.
    noise, generator = SpanCorruption(SENTINELS, density=0.5, mean_span=1.5), np.random.default_rng(0)
    found = Counter(tuple(noise(text(6), generator)[0].tolist()) for _ in range(4000))
    assert len(found) == 4
    assert all(abs(count - 1000) < 100 for count in found.values())


def test_every_place_of_the_masks_is_equally_likely() -> None:
    # Given how many spans there are, every way to put them between the tokens that stay, counted by trying all.
    noise, generator = TextInfilling(MASK, density=0.5, mean_span=1.0), np.random.default_rng(0)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(20_000):
        source = noise(text(4), generator)[0]
        found[tuple((source == MASK).tolist())] += 1
    for length, masks in {(len(shape), sum(shape)) for shape in found}:
        counts = [found[shape] for shape in itertools.product([False, True], repeat=length) if sum(shape) == masks]
        mean = sum(counts) / len(counts)
        # Five standard deviations.
        assert all(abs(count - mean) <= 5 * mean**0.5 for count in counts), (length, masks, counts)


@pytest.mark.parametrize("noise", [SpanCorruption(SENTINELS), TextInfilling(MASK)], ids=["spans", "infilling"])
def test_pieces_cover_the_text_and_repeat(noise: Noise) -> None:
    ids = text(100)
    first, second, third = (DenoisingPairs(ids, noise, length=32, end=END, prefix=[7], seed=5) for _ in range(3))
    # 100 = 3 * 32 + 4: four tokens are too few for a piece.
    assert len(first) == 3
    assert DenoisingPairs(text(104), noise, length=32, end=END).target_lengths[-1] < first.target_lengths[0]
    seen = []
    for index in range(3):
        item = first[index]
        assert item["input_ids"][0] == 7
        assert item["input_ids"][-1] == item["labels"][-1] == END
        assert len(item["input_ids"]) <= first.source_lengths[index]
        assert len(item["labels"]) <= first.target_lengths[index]
        seen += [token for token in {*item["input_ids"], *item["labels"]} if 8 <= token < 899]
    assert set(seen) == set(text(96).tolist()) - set(range(8))
    second.set_epoch(3)
    assert second[1] != first[1]
    first[0], first[2]
    first.set_epoch(3)
    # What was drawn before does not matter.
    assert second[1] == first[1]
    second.set_epoch(0)
    assert second[1] == third[1]


def test_a_piece_that_comes_again_has_other_noise() -> None:
    data = DenoisingPairs(text(96), TextInfilling(MASK), length=32, end=END)
    items = data.__getitems__([1, 4, 7, 1])
    assert items[0] == data[1] == items[3]
    assert [item["labels"] for item in items] == [items[0]["labels"]] * 4
    assert items[0]["input_ids"] != items[1]["input_ids"] != items[2]["input_ids"] != items[0]["input_ids"]


def test_batches_of_pieces_keep_the_budget() -> None:
    pairs = DenoisingPairs(text(800), TextInfilling(MASK), length=40, end=END)
    sampler = TokenBatchSampler(pairs.source_lengths, pairs.target_lengths, budget=400, counts="source+target")
    collate = PairCollator(0)
    batches = [collate([pairs[index] for index in batch]) for batch in sampler]
    assert all(batch["input_ids"].numel() + batch["labels"].numel() <= 400 for batch in batches)
    assert sum(len(batch["labels"]) for batch in batches) == 20


def test_tokens_are_added_once_and_found() -> None:
    tokenizer = train_tokenizer(["a b c d e"], vocab_size=266, show_progress=False)
    assert denoising_tokens(tokenizer) == (None, ())
    size = len(tokenizer)
    assert add_denoising_tokens(tokenizer) == 1
    assert add_denoising_tokens(tokenizer, sentinels=3) == 3
    assert add_denoising_tokens(tokenizer, sentinels=3) == 0
    assert denoising_tokens(tokenizer) == (size, (size + 1, size + 2, size + 3))
    # One token wherever it stands, and left out of decoded text.
    ids = tokenizer("a<extra_id_1> b <mask>")["input_ids"]
    assert {size, size + 2} < set(ids)
    assert "<" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(()), "sentinel"),
        (lambda: SpanCorruption(SENTINELS, density=1.0), "`density` must be above 0 and below 1, but is 1.0"),
        (lambda: TextInfilling(MASK, mean_span=0.5), "`mean_span` must be at least 1 token, but is 0.5"),
        (lambda: SpanCorruption((900,))(text(100), np.random.default_rng(0)), "5 corrupted spans.*only 1 sentinel"),
        (lambda: SpanCorruption((900,))(text(1), np.random.default_rng(0)), "needs 2, but got 1"),
        (lambda: TextInfilling(MASK)(text(0), np.random.default_rng(0)), "needs a token"),
        (lambda: DenoisingPairs(text(7), TextInfilling(MASK), length=8, end=END), "The text has 7 tokens"),
        (lambda: DenoisingPairs(text(70), TextInfilling(MASK), length=7, end=END), "at least 8 tokens, but is 7"),
        (lambda: DenoisingPairs(text(70), TextInfilling(MASK), length=8, end=END)[9], "no piece 9"),
    ],
)
def test_mistakes(make: object, message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        make()  # type: ignore[operator]
