"""Sampling over an engine: the distribution of `generate()`, by seeds."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparseq.translation import search
from tests.translation.decoding import VOCAB, decode, ending_model, settings_of, sources
from tests.translation.torch_engine import TorchEngine

MODEL = ending_model()
IDS, MASK = sources()

# What is set, and what generate() makes of it.
WAYS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "all tokens": ({"top_k": 0}, []),
    "fifty tokens": ({}, []),
    "few tokens": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "warm": (
        {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)],
    ),
    "hot, all tokens": (
        {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
    "some suppressed": (
        {"suppress_tokens": [0, 9], "top_k": 6},
        [SuppressTokensLogitsProcessor([0, 9]), TopKLogitsWarper(6)],
    ),
    "penalised": (
        {"repetition_penalty": 1.5, "top_k": 8},
        [RepetitionPenaltyLogitsProcessor(1.5), TopKLogitsWarper(8)],
    ),
}


def probabilities(processors: list[Any], prefix: list[int]) -> torch.Tensor:
    """Of the token behind a prefix for the first source, `(V,)`."""
    inputs = torch.tensor([[1, *prefix]])
    with torch.no_grad():
        logits = MODEL(IDS[:1], attention_mask=MASK[:1], decoder_input_ids=inputs).logits[:, -1]
    return LogitsProcessorList(processors)(inputs, logits).softmax(dim=-1)[0]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_drawn_from_the_distribution_of_generate(way: str) -> None:
    changes, processors = WAYS[way]
    prefix, number = [9, 14], 4000
    settings = settings_of(MODEL, do_sample=True, max_new_tokens=1, num_return_sequences=number, **changes)
    settings.eos_token_id = None
    settings.seed = 1
    (found,) = decode(TorchEngine(MODEL), settings, IDS[:1], MASK[:1], [prefix])
    expected = probabilities(processors, prefix)
    counts = np.bincount([one.token_ids[-1] for one in found], minlength=VOCAB)
    assert not counts[expected.numpy() == 0].any()
    kept = expected.numpy() * number >= 1
    wanted = expected.numpy()[kept] * number
    # Chi-squared: its mean is the number of cells, its variance twice that.
    distance = ((counts[kept] - wanted) ** 2 / wanted).sum()
    assert distance < kept.sum() + 4 * np.sqrt(2 * kept.sum())
    for one in found[:: number // 20]:
        probability = float(expected[one.token_ids[-1]])
        np.testing.assert_allclose(np.exp(one.token_log_probs[-1]), probability, rtol=1e-3)


def test_the_likeliest_of_one_is_greedy() -> None:
    sampled = decode(TorchEngine(MODEL), settings_of(MODEL, do_sample=True, top_k=1), IDS, MASK)
    greedy = decode(TorchEngine(MODEL), settings_of(MODEL), IDS, MASK)
    assert [found[0].token_ids for found in sampled] == [found[0].token_ids for found in greedy]


def seeded(seed: int | None, **changes: Any) -> list[list[list[int]]]:
    settings = settings_of(MODEL, do_sample=True, num_return_sequences=3, **changes)
    settings.seed = seed
    found = decode(TorchEngine(MODEL), settings, IDS, MASK)
    return [[one.token_ids for one in hypotheses] for hypotheses in found]


def test_a_seed_gives_the_same_samples_and_another_others() -> None:
    assert seeded(1) == seeded(1)
    assert seeded(1) != seeded(2)


def test_without_a_seed_that_of_torch_decides() -> None:
    torch.manual_seed(5)
    first = seeded(None)
    assert seeded(None) != first
    torch.manual_seed(5)
    assert seeded(None) == first


@pytest.mark.parametrize("changes", [{}, {"top_k": 0}, {"repetition_penalty": 1.2}])
def test_samples_do_not_depend_on_who_leaves_the_batch(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for share in (0, 2):
        monkeypatch.setattr(search, "_LEAVING_SHARE", share)
        found.append(seeded(3, **changes))
    assert found[0] == found[1]


@pytest.mark.parametrize("length_penalty", [1.0, -2])
def test_samples_come_best_first(length_penalty: float) -> None:
    settings = settings_of(MODEL, do_sample=True, num_return_sequences=6, length_penalty=length_penalty)
    settings.seed = 1
    for hypotheses in decode(TorchEngine(MODEL), settings, IDS, MASK):
        scores = [one.score for one in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1
        for one in hypotheses:
            number = len(one.token_log_probs)
            np.testing.assert_allclose(
                one.score, sum(one.token_log_probs) / float(number) ** length_penalty, rtol=1e-4
            )
