"""generate(): every way of decoding gives the tokens that decoding without a cache gives."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from sparseq import SparseqForConditionalGeneration
from tests.tiny import PAD, source_batch, tiny_model

POSITIONS = ["sinusoidal", "learned", "rotary", "none"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def endless(**overrides: Any) -> SparseqForConditionalGeneration:
    """A model that never stops early, and whose untied random weights do not repeat the last token for ever."""
    model = tiny_model(tie_word_embeddings=False, **overrides)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=POSITIONS)
def model(request: pytest.FixtureRequest) -> SparseqForConditionalGeneration:
    return endless(position_embedding_type=request.param)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_decoding_equals_uncached_in_a_padded_batch(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    ids = source_batch()
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert len(expected[:, 1:].unique()) > 5, "a test of equal constants would show nothing"
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("kind", ["bare", "pair"])
def test_a_cache_that_is_handed_in_is_used(model: Any, kind: str) -> None:
    ids = source_batch()
    expected = model.generate(ids, **GREEDY)
    given = DynamicCache() if kind == "bare" else EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [model.config.decoder_start_token_id]
    tokens = torch.full((3, 1), steps[0])
    cache = given
    for _ in range(GREEDY["max_new_tokens"]):
        output = model(input_ids=ids, decoder_input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(tokens, expected)


def test_beam_search_cached_equals_uncached(model: Any) -> None:
    ids = source_batch()
    expected = model.generate(ids, use_cache=False, num_beams=3, **GREEDY)
    assert torch.equal(model.generate(ids, num_beams=3, **GREEDY), expected)
    assert torch.equal(model.generate(ids, num_beams=3, cache_implementation="static", **GREEDY), expected)


def test_a_sentence_decodes_the_same_alone_and_in_a_batch(model: Any) -> None:
    ids = source_batch()
    together = model.generate(ids, **GREEDY)
    for row, expected in zip(ids, together, strict=True):
        assert torch.equal(model.generate(row[row != PAD][None], **GREEDY)[0], expected)


def test_greedy_follows_the_argmax_of_the_logits(model: Any) -> None:
    ids = source_batch()
    tokens = model.generate(ids, **GREEDY)
    logits = model(input_ids=ids, decoder_input_ids=tokens[:, :-1]).logits
    assert torch.equal(logits.argmax(dim=-1), tokens[:, 1:])


def test_given_encoder_outputs_are_reused_and_padding_stays_masked(model: Any) -> None:
    ids = source_batch()
    expected = model.generate(ids, **GREEDY)
    states = model.get_encoder()(ids)
    mask = ids.ne(PAD).long()
    assert torch.equal(model.generate(ids, encoder_outputs=states, **GREEDY), expected)
    assert torch.equal(model.generate(encoder_outputs=states, attention_mask=mask, **GREEDY), expected)


def test_assisted_and_prompt_lookup_decoding_equal_greedy(model: Any) -> None:
    ids = source_batch((6,))
    assistant = endless(position_embedding_type=model.config.position_embedding_type, decoder_layers=1)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_sampling_cached_equals_uncached_under_one_seed(model: Any) -> None:
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(model.generate(source_batch(), do_sample=True, max_new_tokens=12, use_cache=use_cache))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_left_padding_of_a_decoder_prefix_changes_nothing(model: Any, cache: dict[str, Any]) -> None:
    ids = source_batch((6, 8))
    prefix = torch.tensor([[PAD, PAD, 1, 5, 7], [1, 9, 8, 7, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = model.generate(ids, decoder_input_ids=prefix, decoder_attention_mask=mask, **GREEDY, **cache)
    alone = model.generate(ids[:1], decoder_input_ids=prefix[:1, 2:], **GREEDY)
    assert torch.equal(padded[0, 2:], alone[0])


def test_several_sequences_and_scores_are_returned(model: Any) -> None:
    output = model.generate(
        source_batch(),
        num_beams=4,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    assert output.sequences.shape == (6, 13)
    assert torch.isfinite(output.sequences_scores).all()


def test_generation_stops_at_a_sensible_length_by_itself(tmp_path: Any) -> None:
    model = endless()
    assert model.generate(source_batch((4,))).shape[1] == 64, "`max_position_embeddings` of the tiny model"
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_length == 64


def test_a_float_mask_of_ones_and_zeros_is_taken_as_a_mask() -> None:
    model, ids = endless(), source_batch()
    float_mask = ids.ne(PAD).float()
    assert torch.equal(model.generate(ids, attention_mask=float_mask, **GREEDY), model.generate(ids, **GREEDY))
