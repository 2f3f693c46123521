"""What forward returns, takes and refuses."""

from typing import Any

import pytest
import torch

from sparseq import SparseqEncoderModel, SparseqModel
from tests.tiny import label_batch, source_batch, tiny_config, tiny_model
from tests.tolerances import assert_close

TIES = ("share_encoder_decoder_embeddings", "tie_word_embeddings")


def test_attentions_hidden_states_and_router_logits_have_the_conventional_shapes() -> None:
    model = tiny_model(encoder_layers=3, encoder_sparse_step=2)
    model.set_attn_implementation("eager")
    output = model(
        input_ids=source_batch(),
        labels=label_batch(),
        output_attentions=True,
        output_hidden_states=True,
        output_router_logits=True,
    )
    assert [tuple(x.shape) for x in output.encoder_attentions] == [(3, 4, 9, 9)] * 3
    assert [tuple(x.shape) for x in output.decoder_attentions] == [(3, 4, 7, 7)] * 2
    assert [tuple(x.shape) for x in output.cross_attentions] == [(3, 4, 7, 9)] * 2
    assert [tuple(x.shape) for x in output.encoder_hidden_states] == [(3, 9, 32)] * 4
    assert [tuple(x.shape) for x in output.decoder_hidden_states] == [(3, 7, 32)] * 3
    assert [tuple(x.shape) for x in output.encoder_router_logits] == [(27, 4)], "one sparse layer of three"
    assert [tuple(x.shape) for x in output.decoder_router_logits] == [(21, 4)] * 2
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    for weights in (*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions):
        assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), torch.float32)
    assert not output.encoder_attentions[0][1, :, :, 6:].any(), "padding is not attended to"
    assert not output.decoder_attentions[0].triu(1).any(), "nor is the future"


def test_nothing_is_returned_that_was_not_asked_for() -> None:
    output = tiny_model()(input_ids=source_batch(), labels=label_batch())
    assert set(output.keys()) == {"loss", "logits", "encoder_last_hidden_state"}


def test_a_tuple_is_returned_on_request() -> None:
    model = tiny_model()
    expected = model(input_ids=source_batch(), labels=label_batch())
    loss, logits, *_ = model(input_ids=source_batch(), labels=label_batch(), return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_embeddings_may_be_given_in_place_of_ids() -> None:
    model, ids = tiny_model(), source_batch((6, 6))
    target = source_batch((5, 5), seed=2)
    embed = model.get_input_embeddings()
    expected = model(input_ids=ids, decoder_input_ids=target).logits
    given = model(inputs_embeds=embed(ids), decoder_inputs_embeds=embed(target)).logits
    assert torch.equal(given, expected)


@pytest.mark.parametrize("arguments", [{}, {"input_ids": source_batch(), "inputs_embeds": torch.zeros(3, 9, 32)}])
def test_neither_or_both_kinds_of_source_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        tiny_model()(**arguments, decoder_input_ids=source_batch())


def test_a_missing_target_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
        tiny_model()(input_ids=source_batch())


@pytest.mark.parametrize("side", ["source", "target"])
def test_learned_positions_refuse_an_input_that_is_too_long(side: str) -> None:
    model = tiny_model(position_embedding_type="learned", max_position_embeddings=8)
    inputs = {"input_ids": source_batch((8, 8)), "decoder_input_ids": source_batch((8, 8))}
    model(**inputs)
    inputs["input_ids" if side == "source" else "decoder_input_ids"] = source_batch((9, 9))
    with pytest.raises(ValueError, match=r"has 9 tokens.*`max_position_embeddings` = 8.*truncate"):
        model(**inputs)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_learned_positions_refuse_to_generate_past_their_table(cache: dict[str, Any]) -> None:
    model = tiny_model(position_embedding_type="learned", max_position_embeddings=8)
    model.generation_config.eos_token_id = None
    assert model.generate(source_batch((4, 4)), max_new_tokens=8, **cache).shape == (2, 9)
    with pytest.raises(ValueError, match=r"has \d+ tokens.*`max_position_embeddings` = 8"):
        model.generate(source_batch((4, 4)), max_new_tokens=20, **cache)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prepared_mask_hides_what_a_flat_one_hides(implementation: str) -> None:
    model, ids = tiny_model(position_embedding_type="rotary", num_experts=0), source_batch()
    model.set_attn_implementation(implementation)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    for mask in (ids.ne(0)[:, None, None], (ids.eq(0)[:, None, None] * -1e9)):
        assert_close(model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits, expected, torch.float32)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "none"])
def test_other_positions_have_no_limit(position: str) -> None:
    model = tiny_model(position_embedding_type=position, max_position_embeddings=8)
    logits = model(input_ids=source_batch((30, 30)), decoder_input_ids=source_batch((20, 20))).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary", "none"])
def test_positions_tell_word_orders_apart_and_none_does_not(position: str) -> None:
    torch.manual_seed(0)
    model = SparseqEncoderModel(tiny_config(position_embedding_type=position)).eval()
    ids = source_batch((6,))
    forward = model(ids).last_hidden_state
    backward = model(ids.flip(1)).last_hidden_state.flip(1)
    assert torch.allclose(forward, backward, atol=1e-4) == (position == "none")


def test_encoder_model_gives_the_encoder_of_the_whole() -> None:
    whole = tiny_model()
    alone = SparseqEncoderModel(whole.config).eval()
    alone.load_state_dict(
        {k.removeprefix("model."): v for k, v in whole.state_dict().items() if "encoder." in k or "shared" in k}
    )
    output = alone(source_batch(), output_router_logits=True)
    assert torch.equal(output.last_hidden_state, whole.get_encoder()(source_batch()).last_hidden_state)
    assert len(output.router_logits) == 2


def test_the_bare_model_returns_states_and_cache() -> None:
    torch.manual_seed(0)
    model = SparseqModel(tiny_config()).eval()
    output = model(input_ids=source_batch(), decoder_input_ids=source_batch(), use_cache=True)
    assert output.last_hidden_state.shape == (3, 9, 32)
    assert output.past_key_values.get_seq_length() == 9
    keys = output.past_key_values.cross_attention_cache.layers[0].keys
    assert keys.shape == (3, 1, 9, 8), "one key-value head is kept, not four"


@pytest.mark.parametrize(
    "overrides", [{}, {"share_encoder_decoder_embeddings": False}, {"tie_word_embeddings": False}]
)
@pytest.mark.parametrize("size", [70, 50])
def test_resized_embeddings_keep_old_tokens_and_ties(overrides: dict[str, Any], size: int) -> None:
    model = tiny_model(final_logits_bias=True, **overrides)
    ids = source_batch() % 50
    expected = model(input_ids=ids, decoder_input_ids=ids).logits[..., :50]
    model.resize_token_embeddings(size)
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    assert logits.shape[-1] == model.config.vocab_size == size
    assert_close(logits[..., :50], expected, torch.float32)
    decoder, shared = model.model.decoder.embed_tokens.weight, model.model.shared.weight
    assert model.model.encoder.embed_tokens.weight is shared
    assert (decoder is shared) == model.config.share_encoder_decoder_embeddings
    assert (model.lm_head.weight is decoder) == model.config.tie_word_embeddings


def test_autocast_trains_in_bfloat16_with_the_router_in_float32() -> None:
    model = tiny_model(initializer_range=None, router_balancing="loss_free").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=source_batch(), labels=label_batch(), output_router_logits=True)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.encoder_router_logits[0].dtype == torch.float32
    full = model(input_ids=source_batch(), labels=label_batch())
    assert_close(output.loss, full.loss, torch.bfloat16)
