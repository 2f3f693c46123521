"""Training: the model can learn, checkpointing is exact, initial weights are sound."""

from typing import Any

import pytest
import torch

from sparseq import SparseqForConditionalGeneration
from tests.tiny import label_batch, source_batch, tiny_config, tiny_model
from tests.tolerances import assert_close


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_experts": 0, "position_embedding_type": "sinusoidal", "norm_position": "post", "norm_type": "layernorm"},
        {"position_embedding_type": "learned", "router_scoring": "sigmoid", "gated_ffn": False, "expert_bias": True},
    ],
)
def test_overfits_one_batch(overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    silent = {"initializer_range": None, "router_aux_loss_coef": 0, "router_z_loss_coef": 0}
    model = SparseqForConditionalGeneration(tiny_config(**silent, **overrides)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for _ in range(150):
        loss = model(input_ids=source_batch(), labels=label_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert norms[-1] < 0.1 * norms[0]
    decoded = model.eval().generate(source_batch(), max_new_tokens=7, do_sample=False)[:, 1:]
    labels = label_batch()
    assert torch.equal(decoded[labels != -100], labels[labels != -100])


@pytest.mark.parametrize("overrides", [{}, {"num_experts": 0}, {"norm_position": "post", "activation_dropout": 0.0}])
def test_gradient_checkpointing_is_exact(overrides: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(**{"dropout": 0.2, **overrides}).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(input_ids=source_batch(), labels=label_batch()).loss
        loss.backward()
        gradients.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_reentrant_checkpointing_of_a_sparse_model_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        getattr(tiny_model(), method)({"use_reentrant": True})
    getattr(tiny_model(num_experts=0), method)({"use_reentrant": True})


def test_every_parameter_gets_a_gradient() -> None:
    everything = {
        "attention_bias": True,
        "ffn_bias": True,
        "expert_bias": True,
        "num_shared_experts": 1,
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "embedding_norm": True,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "encoder_sparse_step": 2,
    }
    model = tiny_model(**everything).train()
    model(input_ids=source_batch(), labels=label_batch()).loss.backward()
    # A bias common to all keys moves every score of a row alike, and softmax does not see it.
    silent = [n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith("k_proj.bias")]
    assert not silent


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    inputs = {"input_ids": source_batch(), "decoder_input_ids": source_batch()}
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
@pytest.mark.parametrize("experts", ["sparseq", "eager", "grouped_mm"])
def test_each_kind_of_dropout_does_something(kind: str, experts: str) -> None:
    model = tiny_model(**{"dropout": 0.0, kind: 0.5}).train()
    model.set_experts_implementation(experts)
    inputs = {"input_ids": source_batch(), "decoder_input_ids": source_batch()}
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_initial_outputs_have_the_scale_of_unit_noise() -> None:
    torch.manual_seed(0)
    wide = {"initializer_range": None, "vocab_size": 500, "d_model": 128, "expert_ffn_dim": 64}
    model = SparseqForConditionalGeneration(tiny_config(**wide)).eval()
    ids = torch.randint(3, 500, (8, 20))
    logits = model(input_ids=ids, decoder_input_ids=torch.randint(3, 500, (8, 20))).logits
    assert 0.5 < logits.std() < 2
    # Xavier: for each expert apart, and for gate and up apart (arXiv 2002.05202 stacks them only in our storage).
    weight = model.model.encoder.layers[0].mlp.experts.gate_up_proj
    bound = (6 / (64 + 128)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound


def test_bfloat16_model_follows_the_float32_one() -> None:
    model = tiny_model(initializer_range=None)
    expected = model(input_ids=source_batch(), decoder_input_ids=source_batch()).logits
    low = model.to(torch.bfloat16)(input_ids=source_batch(), decoder_input_ids=source_batch()).logits
    assert low.dtype == torch.bfloat16
    assert_close((low - expected).abs().mean(), torch.zeros(()), torch.bfloat16)
