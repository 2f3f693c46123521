"""Routing groups of text through a model: sums, groups, and what a model can be shown on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedTokenizerBase

from sparseq.inspection.examples import Group
from sparseq.inspection.experts import LayerLoad, expert_load
from sparseq.inspection.survey import GroupRouting, inspect_experts
from tests.tiny import tiny_model


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return AutoModel.from_pretrained(checkpoint)


@pytest.fixture
def groups(sentences: dict[str, list[str]]) -> list[Group]:
    return [
        Group("de", sources=sentences["en"], targets=sentences["de"], languages=["de"] * 5),
        Group("fr", sources=sentences["en"][:3], targets=sentences["fr"][:3], languages=["fr"] * 3, skipped=2),
    ]


def assert_same_loads(found: tuple[LayerLoad, ...], expected: Any) -> None:
    assert [(x.stack, x.layer, x.tokens, x.load) for x in found] == [
        (x.stack, x.layer, x.tokens, x.load) for x in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.router_entropy == pytest.approx(other.router_entropy, rel=1e-5)
        assert one.mean_top1_probability == pytest.approx(other.mean_top1_probability, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_loads_are_those_of_expert_load(
    batch_tokens: int, model: Any, tokenizer: PreTrainedTokenizerBase, sentences: dict[str, list[str]]
) -> None:
    group = Group("g", sources=sentences["en"], targets=sentences["de"], languages=["de"] * 5)
    model.train()
    (found,) = inspect_experts(model, tokenizer, [group], batch_tokens=batch_tokens)
    assert model.training
    batches = []
    for source, target in zip(sentences["en"], sentences["de"], strict=True):
        batch = tokenizer(f"<2de> {source}", text_target=target, return_tensors="pt")
        batches.append({"input_ids": batch["input_ids"], "labels": batch["labels"]})
    assert_same_loads(found.loads, expert_load(model, batches))
    assert (found.name, found.examples, found.skipped, found.truncated) == ("g", 5, 0, 0)


def test_groups_equal_separate_runs(model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group]) -> None:
    whole, *parts = inspect_experts(model, tokenizer, groups, min_occurrences=2)
    assert [part.name for part in parts] == ["de", "fr"]
    for part, group in zip(parts, groups, strict=True):
        assert inspect_experts(model, tokenizer, [group], min_occurrences=2) == [part]
    both = Group(
        "all data",
        sources=[*groups[0].sources, *groups[1].sources],
        targets=[*(groups[0].targets or []), *(groups[1].targets or [])],
        languages=[*groups[0].languages, *groups[1].languages],
        skipped=2,
    )
    (expected,) = inspect_experts(model, tokenizer, [both], min_occurrences=2)
    assert dataclasses.replace(whole, loads=()) == dataclasses.replace(expected, loads=())
    assert_same_loads(whole.loads, expected.loads)


def test_tokens_are_those_that_the_layers_read(
    model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group]
) -> None:
    (found,) = inspect_experts(model, tokenizer, groups[:1], limit=1000, min_occurrences=1)
    assert len(found.tokens) == len(found.loads) == 4
    sources = tokenizer(groups[0].tagged_sources(tokenizer))["input_ids"]
    # The decoder reads the start token and the target without its last token.
    targets = [[1, *ids[:-1]] for ids in tokenizer(text_target=groups[0].targets)["input_ids"]]
    for load, experts in zip(found.loads, found.tokens, strict=True):
        read = [token for ids in (sources if load.stack == "encoder" else targets) for token in ids]
        occurrences = {token.id: token.occurrences for expert in experts for token in expert.by_count}
        assert occurrences == {token: read.count(token) for token in set(read)}
        for share, expert in zip(load.load, experts, strict=True):
            assert sum(token.count for token in expert.by_count) == round(share * 2 * load.tokens)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack(stack: Any, model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group]) -> None:
    (both,) = inspect_experts(model, tokenizer, groups[:1])
    (one,) = inspect_experts(model, tokenizer, groups[:1], stacks=[stack])
    pairs = [pair for pair in zip(both.loads, both.tokens, strict=True) if pair[0].stack == stack]
    assert list(zip(one.loads, one.tokens, strict=True)) == pairs
    assert len(pairs) == 2


def test_an_encoder_alone(
    checkpoint: Path, model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group]
) -> None:
    encoder = AutoModelForTextEncoding.from_pretrained(checkpoint)
    sources = dataclasses.replace(groups[0], targets=None)
    (found,) = inspect_experts(encoder, tokenizer, [sources])
    (expected,) = inspect_experts(model, tokenizer, groups[:1], stacks=["encoder"])
    assert_same_loads(found.loads, expected.loads)
    assert found.tokens == expected.tokens


def test_long_texts_are_cut_and_counted(tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> None:
    model = tiny_model(max_position_embeddings=6, position_embedding_type="learned", **fields)
    group = Group("g", sources=["A man walks in the park ."] * 2, targets=["Ein", "Ein"], languages=[None, None])
    (found,) = inspect_experts(model, tokenizer, [group], limit=100, min_occurrences=1)
    assert found.truncated == 2
    assert found.loads[0].tokens == 2 * 6
    ends = [token for expert in found.tokens[0] for token in expert.by_count if token.token == "</s>"]
    assert [token.occurrences for token in ends] == [2] * len(ends), "the end of the sentence is kept"
    assert ends


def test_a_report_that_json_can_hold(model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group]) -> None:
    (found,) = inspect_experts(model, tokenizer, groups[:1], min_occurrences=1)
    report = found.to_dict()
    assert (report["name"], report["examples"]) == ("de", 5)
    for layer, load, experts in zip(report["layers"], found.loads, found.tokens, strict=True):
        assert layer["load"] == list(load.load)
        assert layer["max_violation"] == load.max_violation
        for entry, expert in zip(layer["experts"], experts, strict=True):
            assert [token["token"] for token in entry["by_count"]] == [token.token for token in expert.by_count]
            assert [token["share"] for token in entry["by_count"]] == [token.share for token in expert.by_count]


def test_what_cannot_be_shown(
    model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group], fields: dict[str, Any]
) -> None:
    def inspect(**options: Any) -> list[GroupRouting]:
        return inspect_experts(options.pop("model", model), tokenizer, options.pop("groups", groups), **options)

    for name in ("batch_tokens", "limit", "min_occurrences"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but is 0"):
            inspect(**{name: 0})
    with pytest.raises(ValueError, match="no sparse layer in its encoder or decoder"):
        inspect(model=tiny_model(num_experts=0, **fields))
    with pytest.raises(ValueError, match="no sparse layer in its decoder"):
        inspect(model=tiny_model(decoder_sparse_step=0, **fields), stacks=["decoder"])
    with pytest.raises(ValueError, match="no targets for 'x'"):
        inspect(groups=[Group("x", sources=["a"], languages=[None])])
    for nothing in ([], [Group("x", targets=[])]):
        with pytest.raises(ValueError, match="no examples"):
            inspect(groups=nothing)


def test_the_model_is_given_back_in_its_mode_after_an_error(
    model: Any, tokenizer: PreTrainedTokenizerBase, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()

    def fail(*_: Any, **__: Any) -> Any:
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        inspect_experts(model, tokenizer, groups)
    assert model.training
