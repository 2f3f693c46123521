"""Losses: what they are, and that they are the same however a batch is cut."""

import logging
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseq import SparseqForConditionalGeneration, losses_sparseq
from sparseq.losses_sparseq import ProjectedCrossEntropy, router_losses
from tests.tiny import label_batch, source_batch, tiny_model
from tests.tolerances import assert_close


def slow_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean over labels, one label after the other."""
    losses = []
    for row, row_labels in zip(logits, labels, strict=True):
        for scores, label in zip(row, row_labels, strict=True):
            if label != -100:
                log_probabilities = scores.log_softmax(dim=-1)
                losses.append(-(1 - smoothing) * log_probabilities[label] - smoothing * log_probabilities.mean())
    return torch.stack(losses).mean()


def test_evaluation_loss_is_plain_cross_entropy_of_unshifted_labels() -> None:
    model, ids, labels = tiny_model(label_smoothing=0.2), source_batch(), label_batch()
    output = model(input_ids=ids, labels=labels, output_router_logits=True)
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    inputs = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
    logits = model(input_ids=ids, decoder_input_ids=inputs).logits
    assert_close(output.logits, logits, torch.float32)
    assert_close(output.loss, slow_cross_entropy(logits, labels), torch.float32)
    assert output.encoder_aux_loss > 0, "reported apart"


def test_labels_may_be_every_second_row_of_a_batch() -> None:
    model, ids, labels = tiny_model(), source_batch(), label_batch()
    whole, strided = labels.repeat_interleave(2, dim=0), ids.repeat_interleave(2, dim=0)
    assert not whole[::2].is_contiguous()
    found = model(input_ids=strided[::2], labels=whole[::2]).loss
    assert_close(found, model(input_ids=ids, labels=labels).loss, torch.float32)


def test_training_loss_adds_smoothing_and_router_losses() -> None:
    model = tiny_model(label_smoothing=0.2, router_aux_loss_coef=0.3, router_z_loss_coef=0.05).train()
    output = model(input_ids=source_batch(), labels=label_batch())
    expected = slow_cross_entropy(output.logits, label_batch(), smoothing=0.2)
    expected = expected + 0.3 * (output.encoder_aux_loss + output.decoder_aux_loss)
    expected = expected + 0.05 * (output.encoder_z_loss + output.decoder_z_loss)
    assert_close(output.loss, expected, torch.float32)


@pytest.mark.parametrize("overrides", [{"num_experts": 0}, {}, {"router_scoring": "sigmoid", "num_shared_experts": 1}])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(overrides: dict[str, Any]) -> None:
    ids = source_batch((9, 3, 8, 5, 7, 2, 6, 4) * 2)
    labels = label_batch((2, 7, 3, 6, 1, 8, 5, 4) * 2)
    count = labels.ne(-100).sum()
    gradients = []
    for size in (16, 4):
        model = tiny_model(label_smoothing=0.1, **overrides).train()
        total = 0.0
        for part in range(0, 16, size):
            rows = slice(part, part + size)
            loss = model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        gradients.append({"loss": total, **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, torch.float32, name)


def test_a_loop_that_knows_no_count_gets_the_mean() -> None:
    model, ids, labels = tiny_model().train(), source_batch(), label_batch()
    alone = model(input_ids=ids, labels=labels).loss
    assert torch.equal(alone, model(input_ids=ids, labels=labels, num_items_in_batch=int(labels.ne(-100).sum())).loss)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_labels_without_a_single_token_cost_nothing(count: Any) -> None:
    model = tiny_model().train()
    labels = torch.full((2, 4), -100)
    loss = model(input_ids=source_batch((5, 4)), labels=labels, num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_training_goes_on_from_given_encoder_outputs(balancing: str, as_tuple: bool) -> None:
    model, ids, labels = tiny_model(router_balancing=balancing).train(), source_batch(), label_batch()
    states = model.get_encoder()(ids)
    output = model(input_ids=ids, encoder_outputs=(states[0],) if as_tuple else states, labels=labels)
    whole = model(input_ids=ids, labels=labels)
    assert_close(output.logits, whole.logits, torch.float32)
    assert output.encoder_aux_loss is None, "nothing is known of the encoder's routing"
    assert_close(output.decoder_aux_loss, whole.decoder_aux_loss, torch.float32)
    output.loss.backward()


def loss_and_gradients(model: Any, *, skip: bool, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**{"input_ids": source_batch(), "labels": label_batch(), **inputs}, skip_logits=skip)
    assert (output.logits is None) == skip
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **gradients}


# Pieces of one row, with a rest, exactly all rows, and more than there are.
@pytest.mark.parametrize("rows", [1, 4, 13, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "final_logits_bias": True},
        {"tie_word_embeddings": False},
        {"label_smoothing": 0.3, "num_experts": 0},
    ],
    ids=["bias", "untied", "smoothed"],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_skipped_logits_change_neither_loss_nor_gradient(
    mode: str, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_sparseq, "_PROJECTED_ROWS", rows)
    model = tiny_model(**options)
    if model.final_logits_bias is not None:
        torch.nn.init.normal_(model.final_logits_bias)
    model.train(mode == "train")
    whole, pieces = (loss_and_gradients(model, skip=skip) for skip in (False, True))
    assert whole.keys() == pieces.keys()
    for name, expected in whole.items():
        assert_close(pieces[name], expected, torch.float32, name)


def test_no_more_logits_exist_than_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything else of the vocabulary's width, forward or backward, but weights and their gradients."""
    monkeypatch.setattr(losses_sparseq, "_PROJECTED_ROWS", 4)
    model = tiny_model(label_smoothing=0.1, vocab_size=97)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape) for t in tree_leaves(result) if torch.is_tensor(t) and 97 in t.shape)
            return result

    for skip in (False, True):
        seen.clear()
        with Watch():
            loss_and_gradients(model, skip=skip)
        rows = [math.prod(shape) // 97 for shape in seen if model.config.d_model not in shape]
        assert max(rows) == (4 if skip else label_batch().numel())


def test_skipped_logits_in_other_precisions() -> None:
    model = tiny_model(label_smoothing=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        whole, pieces = (loss_and_gradients(model, skip=skip) for skip in (False, True))
    for name, expected in whole.items():
        assert pieces[name].dtype == expected.dtype
        assert_close(pieces[name], expected, torch.bfloat16, name)
    model = tiny_model(label_smoothing=0.1).double().train()
    whole, pieces = (loss_and_gradients(model, skip=skip) for skip in (False, True))
    for name, expected in whole.items():
        assert pieces[name].dtype == torch.float64
        assert (pieces[name] - expected).abs().max() < 1e-12, name


def test_the_projected_cross_entropy_has_the_gradient_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=shape[0] > 1)
        for shape in ((5, 4), (7, 4), (1, 7))
    )
    labels = torch.tensor([0, 6, 3, 3, 1])

    def loss(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ProjectedCrossEntropy.apply(states, weight, bias, labels, 0.2)

    assert torch.autograd.gradcheck(loss, (states, weight))


def test_what_is_frozen_gets_no_gradient() -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    whole, pieces = (loss_and_gradients(model, skip=skip) for skip in (False, True))
    assert whole.keys() == pieces.keys()
    assert "lm_head.weight" not in pieces
    for name, expected in whole.items():
        assert_close(pieces[name], expected, torch.float32, name)
    with torch.no_grad():
        loss = model(input_ids=source_batch(), labels=label_batch(), skip_logits=True).loss
    assert not loss.requires_grad
    assert_close(loss, whole["loss"], torch.float32)


@pytest.mark.parametrize("kind", ["hook", "adapter", "replaced"])
def test_an_output_layer_that_is_more_than_a_product_is_called(kind: str) -> None:
    """As PEFT, offloading and quantization make it; its weight alone would be another model."""
    model = tiny_model(label_smoothing=0.1)
    head = model.lm_head
    if kind == "hook":
        head.register_forward_hook(lambda module, args, output: 3 * output)
    elif kind == "replaced":
        original = head.forward
        head.forward = lambda states: 3 * original(states)
    else:

        class Adapted(torch.nn.Linear):
            def forward(self, states: torch.Tensor) -> torch.Tensor:
                return 3 * super().forward(states)

        head.__class__ = Adapted
    whole, pieces = (loss_and_gradients(model, skip=skip) for skip in (False, True))
    for name, expected in whole.items():
        assert_close(pieces[name], expected, torch.float32, name)


def test_skipped_logits_of_a_batch_without_labels_cost_nothing() -> None:
    model = tiny_model(num_experts=0)
    gradients = loss_and_gradients(model, skip=True, labels=torch.full_like(label_batch(), -100))
    assert all(value.eq(0).all() for value in gradients.values())


def test_skipped_logits_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="needs `labels`"):
        tiny_model()(input_ids=source_batch(), decoder_input_ids=source_batch(), skip_logits=True)


def slow_router_losses(
    logits: list[torch.Tensor],
    indices: list[torch.Tensor],
    mask: torch.Tensor,
    weights: torch.Tensor,
    scoring: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentence by sentence, token by token, from Switch eq. 4-6 and ST-MoE eq. 5; sigmoid scores normalised."""

    def scores(token: torch.Tensor) -> torch.Tensor:
        return token.softmax(-1) if scoring == "softmax" else token.sigmoid() / token.sigmoid().sum()

    balance, z_loss = torch.zeros(()), torch.zeros(())
    for layer_logits, layer_indices in zip(logits, indices, strict=True):
        rows = layer_logits.view(*mask.shape, -1)
        chosen = layer_indices.view(*mask.shape, -1)
        for sentence in range(mask.shape[0]):
            tokens = [t for t in range(mask.shape[1]) if mask[sentence, t]]
            if not tokens:
                continue
            experts = rows.shape[-1]
            share = torch.zeros(experts)
            for t in tokens:
                for e in chosen[sentence, t]:
                    share[e] += 1 / (len(tokens) * chosen.shape[-1])
            mean = torch.stack([scores(rows[sentence, t]) for t in tokens]).mean(0)
            balance = balance + weights[sentence] * experts * (share * mean).sum()
            squares = torch.stack([rows[sentence, t].logsumexp(-1) ** 2 for t in tokens])
            z_loss = z_loss + weights[sentence] * squares.mean()
    return balance / len(logits), z_loss / len(logits)


@pytest.mark.parametrize("is_routed", [False, True], ids=["sentinel", "routed all the same"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_sequence_scope_equals_a_slow_reference(scoring: str, is_routed: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    weights = torch.tensor([0.5, 0.3, 0.0])
    logits = [torch.randn(12, 5, requires_grad=True) for _ in range(2)]
    indices = [layer.topk(2).indices for layer in logits]
    if not is_routed:
        indices = [chosen.masked_fill(~mask.view(-1, 1), 5) for chosen in indices]
    fast = router_losses(tuple(logits), tuple(indices), scoring, mask, weights, "sequence")
    slow = slow_router_losses(logits, indices, mask, weights, scoring)
    for name, a, b in zip(("balance", "z"), fast, slow, strict=True):
        assert_close(a, b, torch.float32, name)
        for x, y in zip(
            torch.autograd.grad(a, logits, retain_graph=True),
            torch.autograd.grad(b, logits, retain_graph=True),
            strict=True,
        ):
            assert_close(x, y, torch.float32, name)


def test_batch_scope_balances_all_tokens_together() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    weights = torch.tensor([0.5, 0.25])
    logits = torch.randn(8, 5)
    indices = logits.topk(2).indices.masked_fill(~mask.view(-1, 1), 5)
    balance, _ = router_losses((logits,), (indices,), "softmax", mask, weights, "batch")
    flat = mask.view(1, -1)
    expected, _ = slow_router_losses([logits], [indices], flat, torch.tensor([0.75]))
    assert_close(balance, expected, torch.float32)


def test_uniform_routing_costs_one() -> None:
    logits = torch.zeros(1, 8, 4).view(8, 4)
    indices = torch.tensor([[0, 1], [2, 3]] * 4)
    mask = torch.ones(1, 8, dtype=torch.bool)
    balance, z_loss = router_losses((logits,), (indices,), "sigmoid", mask, torch.ones(1), "sequence")
    assert_close(balance, torch.tensor(1.0), torch.float32)
    assert_close(z_loss, torch.tensor(4.0).log().square(), torch.float32)


def loss_free_model() -> SparseqForConditionalGeneration:
    return tiny_model(router_balancing="loss_free", router_scoring="sigmoid").train()


def test_loss_free_bias_moves_towards_the_neglected_experts() -> None:
    model, ids, labels = loss_free_model(), source_batch(), label_batch()
    router = model.routers("encoder")[0]
    for _ in range(2):  # two accumulated micro-batches
        model(input_ids=ids, labels=labels).loss.backward()
    tokens = int(ids.ne(0).sum())
    assert router.expert_counts.sum() == 2 * tokens * 2, "two experts for each real token of two batches"
    counts = router.expert_counts
    model.update_router_bias()
    expected = 0.001 * torch.sign(counts.mean() - counts)
    assert torch.equal(router.e_score_correction_bias, expected)
    assert expected.any(), "balanced by chance: the test shows nothing"
    assert router.expert_counts is None


def test_the_bias_chooses_but_does_not_weigh_and_rests_in_evaluation() -> None:
    model, ids = loss_free_model().eval(), source_batch()
    router = model.routers("encoder")[0]
    hidden = torch.randn(5, 32)
    _, weights, indices = router(hidden)
    router.e_score_correction_bias += torch.tensor([0.0, 10.0, 0.0, 10.0])
    logits, weights, indices = router(hidden)
    assert set(indices.flatten().tolist()) == {1, 3}
    scores = logits.sigmoid().gather(1, indices)
    assert_close(weights, scores / scores.sum(-1, keepdim=True), torch.float32)
    model(input_ids=ids, labels=label_batch())
    assert router.expert_counts is None


def test_counts_are_not_doubled_by_checkpointing() -> None:
    model = loss_free_model()
    model.activation_checkpointing_enable()
    model(input_ids=source_batch(), labels=label_batch()).loss.backward()
    assert model.routers("encoder")[0].expert_counts.sum() == source_batch().ne(0).sum() * 2


def test_the_bias_update_is_refused_where_there_is_no_bias() -> None:
    with pytest.raises(ValueError, match="aux_loss"):
        tiny_model().update_router_bias()


def train_loss_free(caplog: pytest.LogCaptureFixture, *, updates: int, accumulate: int, moves: bool) -> list[str]:
    """Train without dropout and return what was warned of."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # added by transformers
    model = loss_free_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(updates):
        for _ in range(accumulate):
            model(input_ids=source_batch(), labels=label_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if moves:
            model.update_router_bias()
    return [record.message for record in caplog.records if "selection biases" in record.message]


def test_biases_that_nobody_moves_are_said_so_loudly_and_once(caplog: pytest.LogCaptureFixture) -> None:
    messages = train_loss_free(caplog, updates=3, accumulate=2, moves=False)
    assert len(messages) == 1
    assert "SparseqCallback" in messages[0]
    assert "update_router_bias()" in messages[0]


def test_biases_keep_their_type_whatever_the_model_is_cast_to() -> None:
    model = loss_free_model()
    model(input_ids=source_batch(), labels=label_batch()).loss.backward()
    model.update_router_bias()
    biases = [router.e_score_correction_bias.clone() for router in model.routers("encoder")]
    for cast in (
        lambda: model.bfloat16(),
        lambda: model.half(),
        lambda: model.to(torch.float64),
        lambda: model.float(),
    ):
        cast()
        for router, bias in zip(model.routers("encoder"), biases, strict=True):
            assert router.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(router.e_score_correction_bias, bias)
    assert "model.encoder.layers.0.mlp.router.e_score_correction_bias" in model.state_dict()
    model.to("meta")
    assert model.routers("encoder")[0].e_score_correction_bias.is_meta


def test_losses_without_weight_are_reported_and_cost_no_backward_pass() -> None:
    model = tiny_model(router_balancing="loss_free", router_z_loss_coef=0.0).train()
    output = model(input_ids=source_batch(), labels=label_batch(), output_router_logits=True)
    assert output.encoder_aux_loss > 0
    assert output.encoder_z_loss > 0
    plain = tiny_model(router_balancing="none", router_z_loss_coef=0.0).train()
    assert torch.equal(output.loss, plain(input_ids=source_batch(), labels=label_batch()).loss)


def test_accumulation_with_moved_biases_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert train_loss_free(caplog, updates=3, accumulate=4, moves=True) == []


def test_labels_at_minus_100_inside_a_sentence_still_feed_their_context() -> None:
    # A masked prefix has no labels, but later tokens attend to it: its experts must run in training too.
    model, ids, labels = tiny_model(), source_batch(), label_batch()
    masked = labels.clone()
    masked[:, :2] = -100
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    losses = []
    for mode in (True, False):
        model.train(mode)
        output = model(input_ids=ids, decoder_input_ids=inputs, labels=masked)
        losses.append(F.cross_entropy(output.logits.flatten(0, 1), masked.flatten()))
    assert_close(losses[0], losses[1], torch.float32)
