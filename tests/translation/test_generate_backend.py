"""Decoding with generate(): the same tokens, scores without its memory, prefixes, streams, seeds."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from sparseq import SparseqForConditionalGeneration
from sparseq.translation import generate_backend
from sparseq.translation.backend import Batch, Hypothesis
from sparseq.translation.generate_backend import GenerateBackend
from tests.tiny import PAD, source_batch, tiny_model

# Found by trying: some hypotheses end with one of these, some go on to the maximum.
ENDS = [2, 7, 11, 19, 23, 31, 44]


@pytest.fixture(scope="module")
def model() -> SparseqForConditionalGeneration:
    model = tiny_model(tie_word_embeddings=False)
    model.generation_config.eos_token_id = ENDS
    return model


def settings(model: Any, **changes: Any) -> GenerationConfig:
    changed = copy.deepcopy(model.generation_config)
    changed.update(**{"max_length": None, "max_new_tokens": 9, **changes})
    return changed


def batch(prefixes: Sequence[Sequence[int]] = ((), (), ())) -> Batch:
    ids = source_batch()
    return Batch(ids.numpy(), ids.ne(PAD).long().numpy(), prefixes)


def finished(tokens: Sequence[int], ends: Sequence[int] = ENDS) -> list[int]:
    """Tokens of generate() up to the first end."""
    return list(tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))])


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "a length penalty": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3, "early_stopping": True},
    "processors": {"num_beams": 3, "no_repeat_ngram_size": 2, "forced_bos_token_id": 9, "repetition_penalty": 1.3},
    "greedy with processors": {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "suppress_tokens": [12, 13]},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "top_p": 0.9},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_scores_are_those_of_generate(model: Any, mode: str) -> None:
    chosen = settings(model, **MODES[mode])
    best = chosen.num_return_sequences or 1
    torch.manual_seed(5)
    found = GenerateBackend(model).decode(batch(), chosen)
    torch.manual_seed(5)
    given = batch()
    expected = model.generate(
        torch.from_numpy(given.input_ids),
        generation_config=chosen,
        max_length=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = getattr(expected, "beam_indices", None)
    steps = model.compute_transition_scores(
        expected.sequences, expected.scores, beams, normalize_logits=beams is None
    ).numpy()
    rows = [(finished(row[1:].tolist()), log_probs) for row, log_probs in zip(expected.sequences, steps, strict=True)]
    for source, hypotheses in enumerate(found):
        assert len(hypotheses) == best
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)
        # Samples are sorted here, and not by generate().
        for one in hypotheses:
            (row,) = [row for row in range(source * best, (source + 1) * best) if rows[row][0] == one.token_ids]
            chosen_steps = rows[row][1][: len(one.token_log_probs)]
            assert len(one.token_log_probs) - len(one.token_ids) in (0, 1)
            np.testing.assert_allclose(one.token_log_probs, chosen_steps, rtol=1e-5, atol=1e-6)
            assert beams is None or row == source * best + hypotheses.index(one)
            reference = np.mean(chosen_steps) if beams is None else expected.sequences_scores[row].item()
            assert one.score == pytest.approx(reference, rel=1e-5)


def test_ends_are_among_the_log_probs_and_not_among_the_tokens(model: Any) -> None:
    found = GenerateBackend(model).decode(batch(), settings(model, num_beams=4, num_return_sequences=4))
    flat = [one for hypotheses in found for one in hypotheses]
    ended = [one for one in flat if len(one.token_log_probs) == len(one.token_ids) + 1]
    assert 0 < len(ended) < len(flat), "the test needs hypotheses of both kinds"
    assert all(len(one.token_ids) == 9 for one in flat if one not in ended)


def test_prefixes_of_different_lengths(model: Any) -> None:
    prefixes = [[4, 5, 6], [], [8, 9, 10]]
    chosen = settings(model, num_beams=2)
    found = GenerateBackend(model).decode(batch(prefixes), chosen)
    start = model.generation_config.decoder_start_token_id
    for ids, prefix, (one,) in zip(source_batch(), prefixes, found, strict=True):
        alone = model.generate(
            ids[ids.ne(PAD)][None],
            decoder_input_ids=torch.tensor([[start, *prefix]]),
            generation_config=chosen,
            max_length=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert one.token_ids == [*prefix, *finished(alone.sequences[0, 1 + len(prefix) :].tolist())]
        assert one.score == pytest.approx(alone.sequences_scores.item(), rel=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_attention_is_that_of_each_step(layers: int) -> None:
    model: Any = tiny_model(tie_word_embeddings=False, decoder_layers=layers)
    model.generation_config.eos_token_id = ENDS
    chosen = settings(model)
    found = GenerateBackend(model).decode(batch([[], [5, 6], []]), chosen, attention=True)
    model.set_attn_implementation("eager")
    for ids, (one,) in zip(source_batch(), found, strict=True):
        ids = ids[ids.ne(PAD)]
        assert one.attention is not None
        assert one.attention.shape == (len(one.token_ids), len(ids))
        np.testing.assert_allclose(one.attention.sum(axis=1), 1, rtol=1e-5)
        tokens = [model.generation_config.decoder_start_token_id]
        for step, token in enumerate(one.token_ids):
            output = model(
                input_ids=ids[None], decoder_input_ids=torch.tensor([tokens]), output_attentions=True, use_cache=False
            )
            last = output.cross_attentions[-2 if layers > 1 else -1][0, :, -1].mean(dim=0)
            np.testing.assert_allclose(one.attention[step], last.detach().numpy(), rtol=1e-4, atol=1e-6)
            tokens.append(token)


def test_attention_of_beams_belongs_to_their_tokens(model: Any) -> None:
    chosen = settings(model, num_beams=3, num_return_sequences=3)
    found = GenerateBackend(model).decode(batch(), chosen, attention=True)
    for row, hypotheses in enumerate(found):
        for one in hypotheses:
            prefixes = [one.token_ids if place == row else [3] for place in range(3)]
            again = GenerateBackend(model).decode(batch(prefixes), settings(model, max_new_tokens=1), attention=True)
            assert one.attention is not None
            assert again[row][0].attention is not None
            np.testing.assert_allclose(
                one.attention, again[row][0].attention[: len(one.token_ids)], rtol=1e-3, atol=1e-5
            )


def test_tokens_are_streamed_row_by_row_until_each_ends(model: Any) -> None:
    told: list[tuple[int, int]] = []
    found = GenerateBackend(model).decode(
        batch([[], [5, 6], []]), settings(model), on_token=lambda row, token: told.append((row, token))
    )
    for row, (one,) in enumerate(found):
        prefix = 2 if row == 1 else 0
        assert [token for place, token in told if place == row] == one.token_ids[prefix:]
    assert [row for row, _ in told[:2]] == [0, 2], "one step after another, not one row after another"


@pytest.mark.parametrize("changes", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_only_one_hypothesis_can_be_streamed(model: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`num_beams=1` and `num_return_sequences=1` only"):
        GenerateBackend(model).decode(batch(), settings(model, **changes), on_token=lambda row, token: None)


def sampled(model: Any, seed: int | None) -> list[list[Hypothesis]]:
    chosen = settings(model, do_sample=True, num_return_sequences=3)
    chosen.seed = seed
    return GenerateBackend(model).decode(batch(), chosen)


def test_a_seed_decides_and_leaves_the_global_state_alone(model: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sampled(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sampled(model, 3) == first
    assert sampled(model, 4) != first
    assert sampled(model, None) != sampled(model, None)


def test_an_accelerator_gets_a_static_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings(model, num_beams=3)
    expected = GenerateBackend(model).decode(batch(), plain)
    caches = []
    generate = model.generate

    def spy(*args: Any, **options: Any) -> Any:
        caches.append(model.generation_config.cache_implementation)
        return generate(*args, **options)

    monkeypatch.setattr(model, "generate", spy)
    monkeypatch.setattr(generate_backend, "is_accelerator", lambda device: True)
    found = GenerateBackend(model).decode(batch(), plain)
    GenerateBackend(model).decode(batch(), settings(model, cache_implementation="dynamic"))
    assert caches == ["static", "dynamic"]
    assert [[one.token_ids for one in rows] for rows in found] == [
        [one.token_ids for one in rows] for rows in expected
    ]


def test_the_model_is_left_as_it_was(
    model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    own = model.generation_config
    assert own.max_length is not None
    model.train()
    try:
        GenerateBackend(model).decode(batch(), settings(model, max_new_tokens=3))
        assert model.training
    finally:
        model.eval()
    assert model.generation_config is own
    assert not caplog.records, "generate() warns of `max_length` where it sees both"
