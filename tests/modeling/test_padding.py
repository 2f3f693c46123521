"""Padding, on either side and of any amount, changes no result, loss or gradient; neither do other sentences."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import PAD, label_batch, source_batch, tiny_model
from tests.tolerances import assert_close

POSITIONS = ["sinusoidal", "learned", "rotary", "none"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sides", [(0, 3), (3, 0), (2, 2)])
def test_padding_of_source_and_target(position: str, implementation: str, sides: tuple[int, int]) -> None:
    model = tiny_model(position_embedding_type=position)
    model.set_attn_implementation(implementation)
    source, target = source_batch((6, 6)), source_batch((5, 5), seed=2)
    expected = model(input_ids=source, decoder_input_ids=target).logits
    padded = model(
        input_ids=F.pad(source, sides, value=PAD),
        decoder_input_ids=F.pad(target, sides, value=PAD),
        decoder_attention_mask=F.pad(torch.ones_like(target), sides),
    ).logits[:, sides[0] : sides[0] + 5]
    assert_close(padded, expected, torch.float32)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_mask_is_derived_from_padding_when_none_is_given(position: str) -> None:
    model, ids, labels = tiny_model(position_embedding_type=position), source_batch(), label_batch()
    given = model(input_ids=ids, attention_mask=ids.ne(PAD), labels=labels).logits
    assert torch.equal(model(input_ids=ids, labels=labels).logits, given)
    unmasked = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
    assert not torch.allclose(unmasked, given, atol=1e-3), "the mask has no effect, so the test shows nothing"
    # Cross-attention sees the mask also when the encoder has run before.
    states = model.get_encoder()(ids)
    assert torch.equal(model(input_ids=ids, encoder_outputs=states, labels=labels).logits, given)
    assert_close(model(input_ids=ids, encoder_outputs=(states[0],), labels=labels).logits, given, torch.float32)


def test_no_mask_is_derived_where_the_pad_token_ends_sentences() -> None:
    model = tiny_model(pad_token_id=2, eos_token_id=2)
    ids = source_batch((6, 6))
    ids[0, -2:] = 2
    ones = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=ones, decoder_input_ids=ids).logits
    assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected, torch.float32)


def test_decoder_ids_are_never_taken_for_padding() -> None:
    # Marian starts the decoder with the pad token.
    model = tiny_model(decoder_start_token_id=PAD)
    target = source_batch((5, 5), seed=2)
    target[:, 0] = PAD
    ones = torch.ones_like(target)
    expected = model(input_ids=source_batch((6, 6)), decoder_input_ids=target, decoder_attention_mask=ones).logits
    assert_close(model(input_ids=source_batch((6, 6)), decoder_input_ids=target).logits, expected, torch.float32)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_source_of_padding_only_gives_finite_numbers_and_gradients(implementation: str) -> None:
    model = tiny_model().train()
    model.set_attn_implementation(implementation)
    ids = source_batch()
    ids[1] = PAD
    output = model(input_ids=ids, labels=label_batch())
    output.loss.backward()
    assert torch.isfinite(output.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_row_depends_on_no_other_row_of_its_batch() -> None:
    model = tiny_model()
    ids, labels = source_batch(), label_batch()
    expected = model(input_ids=ids, labels=labels).logits[0]
    crowd = torch.cat([ids[:1], source_batch((9,) * 40, seed=7)])
    crowd_labels = torch.cat([labels[:1], label_batch((7,) * 40, seed=8)])
    assert_close(model(input_ids=crowd, labels=crowd_labels).logits[0], expected, torch.float32)


@pytest.mark.parametrize("experts", ["sparseq", "eager", "grouped_mm", "batched_mm"])
def test_padding_reaches_no_expert_and_no_gradient(experts: str) -> None:
    gradients: list[dict[str, Any]] = []
    for extra in (0, 5):
        model = tiny_model(label_smoothing=0.1).train()
        model.set_experts_implementation(experts)
        ids = F.pad(source_batch(), (0, extra), value=PAD)
        labels = F.pad(label_batch(), (0, extra), value=-100)
        output = model(input_ids=ids, labels=labels, output_router_logits=True)
        output.loss.backward()
        gradients.append({"loss": output.loss, **{n: p.grad for n, p in model.named_parameters()}})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, torch.float32, name)
