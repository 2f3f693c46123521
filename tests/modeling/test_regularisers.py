"""Regularisers of sparse layers: router jitter, expert dropout, expert output masking. None acts in evaluation."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparseq.modeling_sparseq import SparseqSparseMLP
from tests.tiny import label_batch, source_batch, tiny_config, tiny_model
from tests.tolerances import assert_close

ALL = {"router_jitter_noise": 0.3, "expert_dropout": 0.4, "expert_output_masking": 0.5}
TOKENS = 200


def sparse_layer(implementation: str = "sparseq", **overrides: Any) -> SparseqSparseMLP:
    config = tiny_config(**overrides)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    layer = SparseqSparseMLP(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.train()


def states() -> torch.Tensor:
    return torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ALL)
def test_each_acts_in_training_and_none_in_evaluation(name: str) -> None:
    batch = {"input_ids": source_batch(), "labels": label_batch()}
    plain, model = tiny_model(), tiny_model(**{name: ALL[name]})
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    plain.train(), model.train()
    assert torch.equal(plain(**batch).logits, plain(**batch).logits), "something else is random in training"
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ALL)
def test_dense_layers_know_none_of_them(name: str) -> None:
    batch = {"input_ids": source_batch(), "labels": label_batch()}
    model = tiny_model(num_experts=0, **{name: ALL[name]}).train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ALL)
def test_recomputed_layers_draw_the_same_noise(name: str) -> None:
    batch = {"input_ids": source_batch(), "labels": label_batch()}
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(**{name: ALL[name]}).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, kept, torch.float32)


def test_jitter_multiplies_what_the_router_sees_and_nothing_else() -> None:
    layer, hidden = sparse_layer(router_jitter_noise=0.1), states()
    torch.manual_seed(7)
    logits, weights, indices = layer.router(hidden[0])
    torch.manual_seed(7)
    noise = torch.empty(TOKENS, 32).uniform_(0.9, 1.1)
    assert_close(logits, F.linear(hidden[0] * noise, layer.router.weight), torch.float32)
    torch.manual_seed(7)
    outputs, _ = layer(hidden)
    assert_close(outputs[0], layer.experts(hidden[0], indices, weights), torch.float32)


def test_expert_dropout_scales_what_it_keeps() -> None:
    # With an identity as second projection the output is the dropped-out inner activation itself.
    layer = sparse_layer(
        expert_dropout=0.4, gated_ffn=False, activation_function="relu", expert_ffn_dim=32, num_experts_per_tok=1,
        norm_topk_prob=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.experts.down_proj.copy_(torch.eye(32).expand(4, 32, 32))
        _, weights, indices = layer.router(states()[0])
        whole = torch.einsum("nfh,nh->nf", layer.experts.up_proj[indices[:, 0]], states()[0]).relu() * weights
        dropped = layer(states())[0][0]
    is_kept = dropped != 0
    assert_close(dropped[is_kept], whole[is_kept] / 0.6, torch.float32)
    share = (is_kept & (whole > 0)).sum() / (whole > 0).sum()
    # Some 3,200 draws: four standard deviations.
    assert abs(float(share) - 0.6) < 4 * (0.24 / int((whole > 0).sum())) ** 0.5


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "sparseq"])
def test_masked_outputs_leave_out_single_experts_of_single_tokens(implementation: str) -> None:
    layer, hidden = sparse_layer(implementation, expert_output_masking=0.3), states()
    with torch.no_grad():
        outputs, (_, indices) = layer(hidden)
        _, weights, chosen = layer.router(hidden[0])
        alone = [layer.experts(hidden[0], chosen[:, [k]], weights[:, [k]]) / 0.7 for k in range(2)]
    assert torch.equal(indices, chosen), "what is balanced and counted is the choice, masked or not"
    # Every token has none, the first, the second or both of its two experts.
    found = torch.zeros(2, 2)
    for token, (first, second) in itertools.product(range(TOKENS), itertools.product((0, 1), repeat=2)):
        expected = first * alone[0][token] + second * alone[1][token]
        found[first, second] += torch.allclose(outputs[0, token], expected, rtol=1e-4, atol=1e-5)
    assert found.sum() == TOKENS
    expected = TOKENS * torch.tensor([[0.09, 0.21], [0.21, 0.49]])
    assert (found - expected).abs().max() < 4 * (TOKENS * 0.49 * 0.51) ** 0.5
    assert (found > 0).all()


def test_masked_outputs_have_the_expectation_of_whole_ones() -> None:
    layer, hidden = sparse_layer(expert_output_masking=0.5), states()
    with torch.no_grad():
        repeated = layer(hidden.repeat(1, 400, 1))[0]
        whole = layer.eval()(hidden)[0]
    mean = repeated.view(400, TOKENS, -1).mean(dim=0)
    spread = repeated.view(400, TOKENS, -1).std(dim=0) / 400**0.5
    # Of 6,400 means, fewer than one is six standard errors off.
    assert ((mean - whole[0]).abs() <= 6 * spread + 1e-5).all()


def test_masking_moves_neither_losses_nor_counts() -> None:
    batch = {"input_ids": source_batch(), "labels": label_batch(), "output_router_logits": True}
    # In the first sparse layer the router has seen nothing masked yet.
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "decoder_sparse_step": 0}
    results = []
    for masking in (0.0, 0.5):
        torch.manual_seed(1)
        results.append(tiny_model(**sizes, expert_output_masking=masking).train()(**batch))
    assert torch.equal(results[0].encoder_aux_loss, results[1].encoder_aux_loss)
    assert torch.equal(results[0].encoder_z_loss, results[1].encoder_z_loss)
    assert not torch.equal(results[0].logits, results[1].logits)


def test_shared_experts_keep_the_dense_layers_dropout() -> None:
    layer = sparse_layer(num_shared_experts=1, expert_dropout=0.5, expert_output_masking=0.5)
    with torch.no_grad():
        layer.experts.down_proj.zero_()
        assert torch.equal(layer(states())[0], layer(states())[0])
