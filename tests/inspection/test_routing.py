"""Routing totals, against a slow loop over tokens in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseq import SparseqConfig
from sparseq.inspection.routing import RoutingTotals, cheap_scores
from sparseq.modeling_sparseq import SparseqRouter

Batch = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]


def router(scoring: str, num_experts: int = 5, top_k: int = 2) -> SparseqRouter:
    config = SparseqConfig(
        d_model=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_num_key_value_heads=1,
        decoder_num_key_value_heads=1,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=top_k > 1,
        router_scoring=scoring,
    )
    return SparseqRouter(config)


def random_batch(layers: int, tokens: int, experts: int, top_k: int, seed: int, scale: float = 3.0) -> Batch:
    """Logits, indices with padding (index E) and a mask that hides further tokens."""
    generator = torch.Generator().manual_seed(seed)
    is_padding = torch.rand(tokens, generator=generator) < 0.25
    logits = [torch.randn(tokens, experts, generator=generator) * scale for _ in range(layers)]
    indices = [one.topk(top_k, dim=-1).indices.masked_fill(is_padding[:, None], experts) for one in logits]
    return logits, indices, torch.rand(tokens, generator=generator) < 0.75


def by_hand(batches: list[Batch], layers: int, experts: int, scoring: str) -> torch.Tensor:
    """The vector of `sums()`, token after token."""
    rows = [[0.0] * (experts + 3) for _ in range(layers)]
    for logits, indices, is_real in batches:
        for layer, row in enumerate(rows):
            for token, counts in enumerate(is_real.flatten().tolist()):
                chosen = indices[layer][token].tolist()
                if not counts or experts in chosen:
                    continue
                values = logits[layer][token].double().tolist()
                largest = max(values)
                raw = [math.exp(x - largest) if scoring == "softmax" else 1 / (1 + math.exp(-x)) for x in values]
                scores = [x / sum(raw) for x in raw]
                for expert in chosen:
                    row[expert] += 1
                row[experts] += 1
                row[experts + 1] -= sum(p * math.log(p) for p in scores if p > 0)
                row[experts + 2] += max(scores)
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 4),
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_equals_a_loop_over_tokens(
    scoring: str, layers: int, tokens: int, experts: int, scale: float, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    batches = [random_batch(layers, tokens, experts, top_k, seed + i, scale) for i in range(2)]
    totals = RoutingTotals(layers, experts)
    for batch in batches:
        totals.add(*batch, router(scoring, experts, top_k).scores)
    expected = by_hand(batches, layers, experts, scoring)
    torch.testing.assert_close(totals.sums(), expected, rtol=1e-5, atol=1e-5)
    rows = expected.view(layers, experts + 3)
    assert torch.equal(totals.counts, rows[:, :experts]), "counts are whole numbers, so they are exact"
    assert torch.equal(totals.tokens, rows[:, experts])
    torch.testing.assert_close(totals.entropy, rows[:, experts + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(totals.top1, rows[:, experts + 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_cheap_scores_give_the_same_totals(scoring: str) -> None:
    batch = random_batch(3, 50, 5, 2, seed=0, scale=20.0)
    one, other = RoutingTotals(3, 5), RoutingTotals(3, 5)
    one.add(*batch, router(scoring).scores)
    other.add(*batch, cheap_scores(router(scoring)))
    torch.testing.assert_close(one.sums(), other.sums(), rtol=1e-6, atol=1e-6)


def test_the_mask_may_have_the_shape_of_the_batch() -> None:
    logits, indices, is_real = random_batch(2, 12, 5, 2, seed=1)
    flat, square = RoutingTotals(2, 5), RoutingTotals(2, 5)
    flat.add(logits, indices, is_real, torch.sigmoid)
    square.add(logits, indices, is_real.view(3, 4), torch.sigmoid)
    assert torch.equal(flat.sums(), square.sums())


def test_what_does_not_count_may_hold_anything() -> None:
    logits, indices, is_real = random_batch(2, 12, 5, 2, seed=2)
    expected = RoutingTotals(2, 5)
    expected.add(logits, indices, is_real, torch.sigmoid)
    hidden = ~is_real | (indices[0] == 5).any(dim=-1)
    found = RoutingTotals(2, 5)
    found.add([one.masked_fill(hidden[:, None], float("nan")) for one in logits], indices, is_real, torch.sigmoid)
    assert torch.equal(found.sums(), expected.sums())


def test_sigmoids_that_all_underflow() -> None:
    totals = RoutingTotals(1, 3)
    totals.add([torch.full((4, 3), -200.0)], [torch.tensor([[0], [1], [1], [2]])], torch.ones(4).bool(), torch.sigmoid)
    assert totals.counts.tolist() == [[1, 2, 1]]
    assert totals.sums().isfinite().all()


def test_sums_of_two_runs_add_up_to_those_of_one() -> None:
    batches = [random_batch(2, 9, 4, 2, seed=seed) for seed in range(5)]

    def run(part: list[Batch]) -> RoutingTotals:
        totals = RoutingTotals(2, 4)
        for batch in part:
            totals.add(*batch, torch.sigmoid)
        return totals

    whole, first, second = run(batches), run(batches[:2]), run(batches[2:])
    vector = first.sums()
    first.load_sums(vector + second.sums())
    torch.testing.assert_close(first.sums(), whole.sums(), rtol=1e-12, atol=0.0)
    vector.zero_()
    assert torch.equal(first.sums(), run(batches[:2]).sums() + second.sums()), "sums() must be a copy"
    first.reset()
    assert not first.sums().any()


def test_many_batches_lose_nothing() -> None:
    # In float32, adding 1 to 2 ** 24 changes nothing.
    totals = RoutingTotals(1, 2)
    totals.load_sums(torch.full((5,), 2.0**24))
    totals.add([torch.zeros(1, 2)], [torch.tensor([[0, 1]])], torch.ones(1, dtype=torch.bool), torch.sigmoid)
    assert totals.counts.tolist() == [[2.0**24 + 1] * 2]
    assert totals.tokens.tolist() == [2.0**24 + 1]


def test_no_gradient_and_no_change_of_the_inputs() -> None:
    logits, indices, is_real = random_batch(2, 6, 4, 2, seed=3)
    leaves = [one.clone().requires_grad_() for one in logits]
    totals = RoutingTotals(2, 4)
    totals.add(leaves, indices, is_real, cheap_scores(router("softmax", 4)))
    assert not totals.sums().requires_grad
    assert all(torch.equal(leaf, one) for leaf, one in zip(leaves, logits, strict=True))


@pytest.mark.parametrize("scores", [lambda x: x.softmax(dim=-1), torch.sigmoid])
def test_half_precision_logits_are_summed_in_float32(scores: Callable[[torch.Tensor], torch.Tensor]) -> None:
    logits, indices, is_real = random_batch(1, 40, 4, 2, seed=4)
    low = [one.bfloat16() for one in logits]
    found, expected = RoutingTotals(1, 4), RoutingTotals(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.add(low, indices, is_real, scores)
    expected.add([one.float() for one in low], indices, is_real, scores)
    torch.testing.assert_close(found.sums(), expected.sums(), rtol=1e-6, atol=0.0)


def test_layer_loads() -> None:
    totals = RoutingTotals(2, 4)
    logits = [torch.tensor([[0.0, 0.0, 0.0, 0.0]] * 2), torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]] * 2)]
    indices = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [0, 1]])]
    totals.add(logits, indices, torch.ones(2, dtype=torch.bool), lambda x: x.softmax(dim=-1))
    first, second = totals.layer_loads("decoder", [1, 3])
    assert (first.stack, first.layer, first.tokens, first.load) == ("decoder", 1, 2, (0.25, 0.5, 0.25, 0.0))
    assert first.router_entropy == pytest.approx(math.log(4))
    assert first.mean_top1_probability == pytest.approx(0.25)
    assert (second.stack, second.layer, second.load) == ("decoder", 3, (0.5, 0.5, 0.0, 0.0))
    assert second.router_entropy == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(6))
    assert second.mean_top1_probability == pytest.approx(0.5)
    assert (first.dead_experts, second.dead_experts) == ((3,), (2, 3))


def test_nothing_was_added() -> None:
    with pytest.raises(ValueError, match="no real token"):
        RoutingTotals(1, 4).layer_loads("encoder", [0])


def test_routing_of_another_model() -> None:
    logits, indices, is_real = random_batch(2, 6, 4, 2, seed=5)
    with pytest.raises(ValueError, match="3 sparse layers of 4 experts, but got logits of 2"):
        RoutingTotals(3, 4).add(logits, indices, is_real, torch.sigmoid)
    with pytest.raises(ValueError, match=r"2 sparse layers of 8 experts, but got .* with 4 experts"):
        RoutingTotals(2, 8).add(logits, indices, is_real, torch.sigmoid)
    with pytest.raises(ValueError, match="are 14 numbers, but the vector has 3"):
        RoutingTotals(2, 4).load_sums(torch.zeros(3))
