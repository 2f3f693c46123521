"""The attention implementations agree, and a row without any key is harmless."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers.integrations.flex_attention import WrappedFlexAttention

from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.modeling_sparseq import SparseqAttention
from tests.parity.weights import randomize
from tests.tolerances import assert_close

# Query and key-value heads of the encoder, then of the decoder.
HEADS = [(4, 4, 4, 4), (4, 2, 4, 1), (6, 3, 6, 2), (6, 1, 3, 3), (8, 2, 2, 1)]
POSITIONS = ["sinusoidal", "learned", "rotary", "none"]


def make_model(
    heads: tuple[int, int, int, int] = (4, 2, 4, 1), d_model: int = 48, **fields: Any
) -> SparseqForConditionalGeneration:
    config = SparseqConfig(
        vocab_size=41,
        d_model=d_model,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=heads[0],
        encoder_num_key_value_heads=heads[1],
        decoder_attention_heads=heads[2],
        decoder_num_key_value_heads=heads[3],
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_experts=fields.pop("num_experts", 4),
        max_position_embeddings=32,
        attention_bias=True,
        **fields,
    )
    model = SparseqForConditionalGeneration(config).eval()
    randomize(model)
    return model


def make_batch(padding: str) -> dict[str, torch.Tensor]:
    source, labels = torch.randint(3, 41, (3, 9)), torch.randint(3, 41, (3, 7))
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(labels)
    if padding == "right":
        source_mask[0, 6:] = source_mask[1, 1:] = target_mask[2, 4:] = 0
    elif padding == "left":
        source_mask[0, :6] = source_mask[1, :1] = target_mask[2, :4] = 0
    labels[target_mask == 0] = -100
    return {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": torch.randint(3, 41, (3, 7)),
        "decoder_attention_mask": target_mask,
        "labels": labels,
    }


def run(model: SparseqForConditionalGeneration, attention: str, batch: dict[str, torch.Tensor]) -> Any:
    """Logits of target tokens, loss, and gradients of the summed loss."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    outputs = model(**batch)
    (outputs.loss * (batch["labels"] != -100).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs.logits[batch["decoder_attention_mask"].bool()], outputs.loss, gradients


def check_equal(model: SparseqForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    logits, loss, gradients = run(model, "sdpa", batch)
    expected_logits, expected_loss, expected_gradients = run(model, "eager", batch)
    assert_close(logits, expected_logits, torch.float32, "logits")
    assert_close(loss, expected_loss, torch.float32, "loss")
    for name, expected in expected_gradients.items():
        # Finite, and by default no parameter is left without a gradient: all three attentions are part of it.
        assert expected is not None
        assert_close(gradients[name], expected, torch.float32, name)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("heads", HEADS)
def test_sdpa_equals_eager(heads: tuple[int, int, int, int], padding: str) -> None:
    check_equal(make_model(heads), make_batch(padding))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_sdpa_equals_eager_with_all_positions(positions: str, norm_position: str) -> None:
    model = make_model(position_embedding_type=positions, norm_position=norm_position)
    check_equal(model, make_batch("left"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
def test_grouped_heads_equal_repeated_key_value_heads(heads: tuple[int, int, int, int], attention: str) -> None:
    # Grouped-query attention is multi-head attention whose groups share keys and values (arXiv 2305.13245).
    model, batch = make_model(heads), make_batch("right")
    config = model.config.to_dict() | {"encoder_num_key_value_heads": None, "decoder_num_key_value_heads": None}
    multi_head = SparseqForConditionalGeneration(SparseqConfig(**config)).eval()
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SparseqAttention):
            for projection in ("k_proj", "v_proj"):
                for kind in ("weight", "bias"):
                    key = f"{name}.{projection}.{kind}"
                    per_head = weights[key].unflatten(0, (-1, module.head_dim))
                    weights[key] = per_head.repeat_interleave(module.num_key_value_groups, dim=0).flatten(0, 1)
    multi_head.load_state_dict(weights)
    logits, loss, _ = run(model, attention, batch)
    expected_logits, expected_loss, _ = run(multi_head, attention, batch)
    assert_close(logits, expected_logits, torch.float32, "logits")
    assert_close(loss, expected_loss, torch.float32, "loss")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_a_row_without_any_token_is_finite(num_experts: int, attention: str) -> None:
    model, batch = make_model(num_experts=num_experts), make_batch("right")
    # No source token in one row, no target token in another.
    batch["attention_mask"][1] = 0
    batch["decoder_attention_mask"][2] = 0
    model.set_attn_implementation(attention)
    outputs = model(**batch)
    assert torch.isfinite(outputs.logits).all()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_any_token_leaves_the_other_rows_alone(attention: str) -> None:
    model, batch = make_model(), make_batch("right")
    model.set_attn_implementation(attention)
    whole = model(**batch).logits
    batch["attention_mask"][1] = 0
    kept = model(**batch).logits
    assert_close(kept[[0, 2]], whole[[0, 2]], torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", ["right", "left"])
def test_flex_equals_eager_in_the_forward(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library compiles flex attention and its masks, which needs a C++ compiler and a minute; what they are given
    # (masks, scale, groups) is the same without. There is no backward pass on CPU.
    def uncompiled_mask(*args: Any, **kwargs: Any) -> Any:
        return create_block_mask(*args, **(kwargs | {"_compile": False}))

    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_mask)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    model, batch = make_model((4, 2, 4, 1), d_model=64, num_experts=0), make_batch(padding)
    is_target = batch["decoder_attention_mask"].bool()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**batch)
        model.set_attn_implementation("flex_attention")
        actual = model(**batch)
    assert_close(actual.logits[is_target], expected.logits[is_target], torch.float32, "logits")
    assert_close(actual.loss, expected.loss, torch.float32, "loss")
