"""The worked examples of the Transformer, small enough to check by hand, on the real modules."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqModel
from sparseq.modeling_sparseq import SparseqAttention, SparseqSinusoidalPositions, make_norm
from tests.tolerances import assert_close, assert_rounds_to


def tiny_config(d_model: int = 4, heads: int = 1, **fields: Any) -> SparseqConfig:
    """A dense model of 2017 with hidden states of 4 numbers and one head."""
    defaults: dict[str, Any] = {
        "vocab_size": 16,
        "d_model": d_model,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_num_key_value_heads": None,
        "decoder_num_key_value_heads": None,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "num_experts": 0,
        "position_embedding_type": "sinusoidal",
        "norm_type": "layernorm",
        "norm_eps": 1e-5,
        "dropout": 0.0,
        "attn_implementation": "eager",
    }
    return SparseqConfig(**(defaults | fields))


def identity_attention(config: SparseqConfig, *, is_causal: bool = False) -> SparseqAttention:
    """Attention whose four projections change nothing."""
    attention = SparseqAttention(config, is_decoder=is_causal, is_causal=is_causal, layer_idx=0)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        nn.init.eye_(projection.weight)
    return attention


def test_1_scaled_dot_product_attention() -> None:
    states = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]])
    output, weights = identity_attention(tiny_config())(states[None])
    assert weights is not None
    assert_rounds_to(weights[0, 0], [[0.4223, 0.1554, 0.4223], [0.1554, 0.4223, 0.4223], [0.2119, 0.2119, 0.5761]])
    assert_rounds_to(
        output[0],
        [
            [0.8446, 0.5777, 0.8446, 0.5777],
            [0.5777, 0.8446, 0.5777, 0.8446],
            [0.7881, 0.7881, 0.7881, 0.7881],
        ],
    )


def test_2_scaling_keeps_the_softmax_soft() -> None:
    query = torch.tensor([[[2.0, 3, 4, 1]]])
    keys = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 0, 1]]])
    attention = identity_attention(tiny_config())
    _, scaled = attention(query, encoder_hidden_states=keys)
    attention.scaling = 1.0
    _, unscaled = attention(query, encoder_hidden_states=keys)
    assert_rounds_to(unscaled.flatten(), [0.8808, 0.1192])
    assert_rounds_to(scaled.flatten(), [0.7311, 0.2689])


def test_3_sinusoidal_positions() -> None:
    table = SparseqSinusoidalPositions(tiny_config())(torch.arange(3))
    assert_rounds_to(table, [[0, 1, 0, 1], [0.8415, 0.5403, 0.0100, 1.0000], [0.9093, -0.4161, 0.0200, 0.9998]])


def test_4_embedding_plus_position() -> None:
    model = SparseqModel(tiny_config(scale_embedding=False)).eval()
    words = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2]])
    with torch.no_grad():
        model.get_input_embeddings().weight[3:6] = words
    outputs = model.encoder(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True)
    expected = [[0.1, 1.2, 0.3, 1.4], [1.3415, 1.1403, 0.7100, 1.8000], [1.8093, 0.5839, 1.1200, 2.1998]]
    assert_rounds_to(outputs.hidden_states[0][0], expected)


def test_5_layer_norm() -> None:
    states = torch.tensor([2.0, 4, 6, 8])
    assert_rounds_to(make_norm(tiny_config())(states), [-1.3416, -0.4472, 0.4472, 1.3416])
    # RMSNorm leaves the mean alone: the root of the mean square of these is sqrt(30).
    rms_norm = make_norm(tiny_config(norm_type="rmsnorm"))
    assert_close(rms_norm(states), states / math.sqrt(30.0), torch.float32)


class TestMaskedSelfAttention:
    """Example 6: a look-ahead mask, and a last position that is padding."""

    STATES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2], [0.0, 0, 0, 0]])[None]
    WEIGHTS = (
        (1.0, 0.0, 0.0, 0.0),
        (0.3729, 0.6271, 0.0, 0.0),
        (0.1152, 0.2668, 0.6180, 0.0),
        (0.3333, 0.3333, 0.3333, 0.0),
    )

    def run(self, attention_mask: list[int], implementation: str = "eager") -> tuple[torch.Tensor, Any]:
        config = tiny_config(attn_implementation=implementation)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=self.STATES,
            attention_mask=torch.tensor([attention_mask]),
            past_key_values=None,
        )
        return identity_attention(config, is_causal=True)(self.STATES, mask)

    def test_scores(self) -> None:
        _, weights = identity_attention(tiny_config())(self.STATES)
        assert weights is not None
        # Back from the weights without a mask: the last column's scores are 0, and sqrt(d_k) is 2.
        logarithms = weights[0, 0].log()
        scores = 2 * (logarithms - logarithms[:, 3:])
        expected = [[0.30, 0.70, 1.10, 0], [0.70, 1.74, 2.78, 0], [1.10, 2.78, 4.46, 0], [0, 0, 0, 0]]
        assert_rounds_to(scores, expected, places=2)

    def test_weights_and_outputs(self) -> None:
        output, weights = self.run([1, 1, 1, 0])
        assert_rounds_to(weights[0, 0], self.WEIGHTS)
        assert_rounds_to(
            output[0, :3],
            [[0.1, 0.2, 0.3, 0.4], [0.3509, 0.4509, 0.5509, 0.6509], [0.7011, 0.8011, 0.9011, 1.0011]],
        )

    def test_the_decoder_masks_alike(self) -> None:
        # With post-norm and no positions, the first self-attention of the decoder gets the embeddings as they are.
        config = tiny_config(position_embedding_type="none", norm_position="post", scale_embedding=False)
        decoder = SparseqModel(config).eval().decoder
        decoder.layers[0].self_attn = identity_attention(config, is_causal=True)
        outputs = decoder(
            inputs_embeds=self.STATES,
            attention_mask=torch.tensor([[1, 1, 1, 0]]),
            encoder_hidden_states=torch.randn(1, 2, 4),
            output_attentions=True,
        )
        assert_rounds_to(outputs.attentions[0][0, 0], self.WEIGHTS)

    def test_the_mask_is_look_ahead_and_padding(self) -> None:
        _, weights = self.run([1, 1, 1, 0])
        assert (weights[0, 0] > 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_row_whose_keys_are_all_masked_is_finite(self, implementation: str) -> None:
        for attention_mask in ([0, 0, 0, 0], [0, 0, 1, 1]):
            output, _ = self.run(attention_mask, implementation)
            assert torch.isfinite(output).all()


SENTENCES = {
    "cell": [
        "the prisoner sat alone in his small cell",
        "each department formed a cell to drive innovation",
        "the cell houses the nucleus mitochondria and cytoplasm",
    ],
    "bank": ["she put her money into the bank", "they sat on the bank of the river"],
}


@pytest.mark.parametrize("word", SENTENCES)
def test_7_the_same_word_in_another_context(word: str) -> None:
    sentences = [sentence.split() for sentence in SENTENCES[word]]
    vocabulary = {token: i for i, token in enumerate(sorted({t for s in sentences for t in s}), start=3)}
    # Without positions, or the word's place alone would tell its states apart.
    config = tiny_config(d_model=16, heads=2, vocab_size=64, position_embedding_type="none")
    model = SparseqModel(config).eval()
    static, contextual = [], []
    for sentence in sentences:
        ids, place = torch.tensor([[vocabulary[token] for token in sentence]]), sentence.index(word)
        static.append(model.get_input_embeddings()(ids)[0, place])
        contextual.append(model.encoder(input_ids=ids).last_hidden_state[0, place])
        again = model.encoder(input_ids=ids).last_hidden_state[0, place]
        assert_close(again, contextual[-1], torch.float32)
    for i in range(1, len(sentences)):
        assert torch.equal(static[i], static[0])
        for j in range(i):
            assert (contextual[i] - contextual[j]).abs().max() > 0.05


def test_8_greedy_decoding_takes_one_argmax_a_step() -> None:
    target = {"a": 0, "am": 1, "I": 2, "thanks": 3, "student": 4, "<eos>": 5}
    names = {i: token for token, i in target.items()}
    source = {"je": 6, "suis": 7, "étudiant": 8}
    start, pad = 9, 10
    config = tiny_config(
        d_model=32,
        heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=11,
        pad_token_id=pad,
        bos_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=target["<eos>"],
    )
    model = SparseqForConditionalGeneration(config)
    input_ids = torch.tensor([[source[token] for token in ("je", "suis", "étudiant")]])
    labels = torch.tensor([[target[token] for token in ("I", "am", "a", "student", "<eos>")]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()

    model.eval()
    decoded = [start]
    while decoded[-1] != target["<eos>"] and len(decoded) < 10:
        logits = model(input_ids=input_ids, decoder_input_ids=torch.tensor([decoded])).logits
        decoded.append(int(logits[0, -1].argmax()))
    assert [names[i] for i in decoded[1:]] == ["I", "am", "a", "student", "<eos>"]
    generated = model.generate(input_ids, max_length=10, do_sample=False, num_beams=1)
    assert generated[0].tolist() == decoded


def test_9_the_base_model_of_2017() -> None:
    vocabulary, d_model, ffn, layers, heads = 37_000, 512, 2048, 6, 8
    config = tiny_config(
        d_model=d_model,
        heads=heads,
        vocab_size=vocabulary,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        gated_ffn=False,
        ffn_bias=True,
        norm_position="post",
        activation_function="relu",
    )
    with torch.device("meta"):
        model = SparseqForConditionalGeneration(config)
    attentions = [module for module in model.modules() if isinstance(module, SparseqAttention)]
    assert len(attentions) == 3 * layers
    for attention in attentions:
        assert attention.head_dim == d_model // heads == 64
        assert attention.num_key_value_groups == 1
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            assert projection.weight.shape == (512, 512)
    attention_size, feed_forward_size, norm_size = 4 * 512**2, 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder_size = layers * (attention_size + feed_forward_size + 2 * norm_size)
    decoder_size = layers * (2 * attention_size + feed_forward_size + 3 * norm_size)
    total = 37_000 * 512 + encoder_size + decoder_size
    # Table 3 of the paper says 65 million.
    assert total == 63_045_632
    assert model.num_parameters() == config.num_parameters() == config.num_parameters(active=True) == total
