"""Expert load, against a slow loop over the router logits of each token."""

import math
from typing import Any

import pytest
import torch

from sparseq import SparseqConfig, SparseqEncoderModel, SparseqForConditionalGeneration, SparseqModel
from sparseq.inspection.experts import LayerLoad, expert_load, format_expert_load

PAD = 0


def tiny_config(**changes: Any) -> SparseqConfig:
    arguments: dict[str, Any] = {
        "vocab_size": 40,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_num_key_value_heads": 1,
        "decoder_num_key_value_heads": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 1,
        "dropout": 0.5,
        # Far from uniform, so that the experts differ.
        "initializer_range": 0.6,
        **changes,
    }
    return SparseqConfig(**arguments)


def sentences(lengths: list[int], width: int) -> torch.Tensor:
    ids = torch.randint(4, 40, (len(lengths), width))
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    return ids


def batch(source: list[int], target: list[int]) -> dict[str, Any]:
    labels = sentences(target, 6)
    return {
        "input_ids": sentences(source, 7),
        "labels": labels.masked_fill(labels == PAD, -100),
        "id": ["what a collator may add", "and the model does not know"],
    }


def by_hand(model: SparseqForConditionalGeneration, batches: list[dict[str, Any]]) -> list[LayerLoad]:
    """Token after token, every sentence alone and without padding."""
    config = model.config
    loads = []
    for stack in ("encoder", "decoder"):
        for place, layer in enumerate(config.sparse_layers(stack)):
            router = model.routers(stack)[place]
            counts, entropies, largest = [0] * config.num_experts, [], []
            for one in batches:
                for ids, labels in zip(one["input_ids"], one["labels"], strict=True):
                    outputs = model.model(
                        input_ids=ids[ids != PAD][None],
                        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels[labels != -100][None]),
                        output_router_logits=True,
                    )
                    for logits in outputs[f"{stack}_router_logits"][place].tolist():
                        raw = [
                            math.exp(x) if config.router_scoring == "softmax" else 1 / (1 + math.exp(-x))
                            for x in logits
                        ]
                        scores = [x / sum(raw) for x in raw]
                        bias = router.e_score_correction_bias
                        choice = raw if bias is None else [x + b for x, b in zip(raw, bias.tolist(), strict=True)]
                        order = sorted(range(len(choice)), key=lambda e: -choice[e])
                        for expert in order[: config.num_experts_per_tok]:
                            counts[expert] += 1
                        entropies.append(-sum(p * math.log(p) for p in scores))
                        largest.append(max(scores))
            loads.append(
                LayerLoad(
                    stack=stack,
                    layer=layer,
                    tokens=len(entropies),
                    load=tuple(count / sum(counts) for count in counts),
                    router_entropy=sum(entropies) / len(entropies),
                    mean_top1_probability=sum(largest) / len(largest),
                )
            )
    return loads


def assert_same(found: list[LayerLoad], expected: list[LayerLoad]) -> None:
    assert [(x.stack, x.layer, x.tokens) for x in found] == [(x.stack, x.layer, x.tokens) for x in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.load == pytest.approx(other.load, abs=1e-12)
        assert one.router_entropy == pytest.approx(other.router_entropy, abs=1e-5)
        assert one.mean_top1_probability == pytest.approx(other.mean_top1_probability, abs=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"router_scoring": "sigmoid"}, {"router_scoring": "sigmoid", "router_balancing": "loss_free"}]
)
def test_equals_a_loop_over_tokens(changes: dict[str, Any]) -> None:
    model = SparseqForConditionalGeneration(tiny_config(**changes))
    if changes.get("router_balancing") == "loss_free":
        for router in model.routers("encoder") + model.routers("decoder"):
            router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.3, 0.6]))
    batches = [batch([7, 2], [3, 6]), batch([4, 5], [1, 2])]
    model.eval()
    with torch.no_grad():
        expected = by_hand(model, batches)
    model.train()
    found = expert_load(model, batches)
    assert [(x.stack, x.layer, x.tokens) for x in found] == [
        ("encoder", 1, 18),
        ("decoder", 0, 12),
        ("decoder", 1, 12),
        ("decoder", 2, 12),
    ]
    assert_same(found, expected)
    assert model.training, "the mode was not given back"


def test_the_same_for_the_bare_model_the_encoder_and_a_mask_in_place_of_labels() -> None:
    model = SparseqForConditionalGeneration(tiny_config())
    one = batch([7, 3], [2, 5])
    expected = expert_load(model, [one])
    bare = SparseqModel(model.config)
    bare.load_state_dict(model.model.state_dict())
    encoder = SparseqEncoderModel(model.config)
    encoder.shared.load_state_dict(model.model.shared.state_dict())
    encoder.encoder.load_state_dict(model.model.encoder.state_dict())
    assert expert_load(bare, [one]) == expected
    assert expert_load(encoder, [one]) == [x for x in expected if x.stack == "encoder"]

    labels = one["labels"]
    with_mask = {
        "input_ids": one["input_ids"],
        "attention_mask": one["input_ids"].ne(PAD).long(),
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        "decoder_attention_mask": labels.ne(-100).long(),
    }
    assert expert_load(bare, [with_mask]) == expected


def test_padding_is_not_counted_whatever_it_is_made_of() -> None:
    model = SparseqForConditionalGeneration(tiny_config())
    one = batch([7, 2], [3, 6])
    expected = expert_load(model, [one])
    wider = {
        "input_ids": torch.nn.functional.pad(one["input_ids"], (3, 4), value=PAD),
        "labels": torch.nn.functional.pad(one["labels"], (0, 5), value=-100),
    }
    assert_same(expert_load(model, [wider]), expected)


def test_max_violation_and_dead_experts() -> None:
    load = LayerLoad(
        stack="encoder",
        layer=1,
        tokens=10,
        load=(0.5, 0.5, 0.0, 0.0),
        router_entropy=0.1,
        mean_top1_probability=0.9,
    )
    assert load.max_violation == pytest.approx(1.0)
    assert load.dead_experts == (2, 3)


def test_table() -> None:
    loads = [
        LayerLoad(
            stack="encoder",
            layer=11,
            tokens=10,
            load=(0.25, 0.5, 0.0, 0.001, 0.249),
            router_entropy=1.234,
            mean_top1_probability=0.5,
        ),
        LayerLoad(stack="decoder", layer=1, tokens=10, load=(0.2,) * 5, router_entropy=0.5, mean_top1_probability=1.0),
    ]
    assert format_expert_load(loads).splitlines() == [
        "stack    layer  load of each expert  MaxVio  dead  entropy  top-1",
        "encoder     11  ▅█·▁▅                  1.50     1     1.23   0.50",
        "decoder      1  ▄▄▄▄▄                  0.00     0     0.50   1.00",
    ]


def test_dense_model_has_no_load() -> None:
    model = SparseqModel(tiny_config(num_experts=0))
    assert expert_load(model, []) == []
    assert "no experts" in format_expert_load([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "`labels`"),
        ({"labels": None, "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}, "`decoder_attention_mask`"),
        ({"input_ids": None}, "`input_ids`"),
    ],
)
def test_a_batch_that_does_not_say_what_is_real(change: dict[str, Any], message: str) -> None:
    model = SparseqModel(tiny_config())
    with pytest.raises(ValueError, match=message):
        expert_load(model, [{**batch([7, 2], [3, 6]), **change}])


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="no real token"):
        expert_load(SparseqModel(tiny_config()), [])
