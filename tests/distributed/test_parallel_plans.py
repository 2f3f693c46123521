"""A model that two processes share computes, generates and saves what the whole one does, or says that it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from sparseq import SparseqForConditionalGeneration
from tests.distributed import plans
from tests.distributed.meshes import MESHES, MODEL
from tests.distributed.scenarios import Results
from tests.tiny import source_batch, tiny_config
from tests.tolerances import assert_close

# One launch serves all tests of a worker; without this each worker of `make test` would launch its own.
pytestmark = pytest.mark.xdist_group("two-processes")

Whole = Callable[[str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What one process finds with a whole model, and the folder with what it saved."""
    found: dict[str, tuple[dict[str, Any], Path]] = {}

    def observe(model: str) -> tuple[dict[str, Any], Path]:
        if model not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[model] = plans.observe(plans.whole_model(model), folder), folder / "saved"
        return found[model]

    return observe


def together(ranks: list[dict[str, Any]], is_shared_out: bool) -> list[dict[str, Any]]:
    """What each process found; where the sentences were shared out, what they found together."""
    if not is_shared_out:
        return ranks
    joined = {}
    for name in ("greedy", "beams", "static cache"):
        # Sentences 0 and 2 were the first process', 1 and 3 the second's.
        joined[name] = torch.stack([rank[name] for rank in ranks], dim=1).flatten(0, 1)
    losses = {name: sum(rank["losses"][name] for rank in ranks) for name in ranks[0]["losses"]}
    return [{**rank, **joined, "losses": losses} for rank in ranks]


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    assert expected["losses"]["loss"] > 1
    for rank in ranks:
        for name in ("greedy", "beams", "static cache"):
            assert torch.equal(rank[name], expected[name]), name
        for kind in ("losses", "gradients"):
            assert rank[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                assert_close(rank[kind][name], tensor, torch.float32, f"{kind} {name}")
        assert rank["active parameters"] == expected["active parameters"]
        assert rank["biases"].keys() == expected["biases"].keys()
        assert all(torch.equal(rank["biases"][name], bias) for name, bias in expected["biases"].items())


def assert_same_folder(actual: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    # Tied weights once, as one process saves them.
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, torch.float32, name)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((actual / name).read_text()) == json.loads((expected / name).read_text()), name
    assert {path.name for path in actual.iterdir()} == {path.name for path in expected.iterdir()}
    _, report = SparseqForConditionalGeneration.from_pretrained(actual, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize(("plan", "model"), plans.CASES, ids=[", ".join(case) for case in plans.CASES])
def test_a_cut_model_is_the_whole_one(
    plan: str, model: str, on_two_processes: Results, of_one_process: Whole, two_processes_folder: Path
) -> None:
    expected, folder = of_one_process(model)
    ranks = on_two_processes(f"{plan}, {model}")
    assert_same(together(ranks, "shards" in plan), expected)
    assert_same_folder(two_processes_folder / f"{plan}, {model}" / "saved", folder)


def test_every_router_loss_and_bias_is_compared(of_one_process: Whole) -> None:
    found, _ = of_one_process("sparse gated")
    assert found["losses"].keys() == {
        "loss",
        *(f"{stack}_{term}_loss" for stack in ("encoder", "decoder") for term in ("aux", "z")),
    }
    found, _ = of_one_process("sparse untied loss-free")
    assert found["biases"]
    assert all(bias.any() for bias in found["biases"].values())


@pytest.mark.parametrize("implementation", plans.IMPLEMENTATIONS)
def test_each_experts_implementation_runs_half_of_the_experts(
    implementation: str, on_two_processes: Results, of_one_process: Whole
) -> None:
    assert_same(on_two_processes(f"implementation {implementation}"), of_one_process("sparse gated")[0])


@pytest.mark.parametrize("plan", plans.PLANS)
def test_models_without_an_output_projection_are_cut_too(plan: str, on_two_processes: Results) -> None:
    source = source_batch(plans.SOURCE_LENGTHS)
    model = plans.whole_model("sparse gated").model
    with torch.no_grad():
        bare = model(input_ids=source, decoder_input_ids=source).last_hidden_state
        encoder = model.encoder(input_ids=source).last_hidden_state
    for rank in on_two_processes(f"states with {plan}"):
        assert_close(rank["bare"], bare, torch.float32, "bare")
        assert_close(rank["encoder"], encoder, torch.float32, "encoder")


def test_processes_may_generate_unequal_lengths(on_two_processes: Results) -> None:
    for share, rank in enumerate(on_two_processes("unequal")):
        assert torch.equal(rank["text"], plans.generate_share(plans.whole_model("dense gated"), share))


@pytest.mark.parametrize("model", plans.BY_ACCELERATE)
def test_accelerates_fsdp2_changes_nothing(model: str, on_two_processes: Results, of_one_process: Whole) -> None:
    ranks = on_two_processes(f"Accelerate's FSDP2, {model}")
    assert_same(together(ranks, True), of_one_process(model)[0])


@pytest.mark.parametrize("plan", ["nothing", *plans.TRAINED_PLANS])
def test_a_stock_trainer_ends_with_the_same_model(
    plan: str, on_two_processes: Results, two_processes_folder: Path, tmp_path: Path
) -> None:
    expected = plans.trained(tmp_path, plans.whole_model(plans.TRAINED), size=16)
    for rank in on_two_processes(f"trained with {plan}"):
        assert torch.equal(rank["text"], expected["text"])
        assert len(rank["logs"]) == len(expected["logs"]) == 2
        for ours, theirs in zip(rank["logs"], expected["logs"], strict=True):
            names = [name for name in theirs if name == "loss" or name.startswith("router/")]
            assert "router/encoder_1/load_3" in names
            for name in names:
                assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), torch.float32, name)
    assert_same_folder(two_processes_folder / f"trained with {plan}" / "saved", tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_four_processes_cut_in_two_ways(mesh: str, on_four_processes: Results, of_one_process: Whole) -> None:
    ranks, shares = on_four_processes(mesh), MESHES[mesh][1]
    expected, _ = of_one_process(MODEL)
    if shares[0] is None:
        assert_same(ranks, expected)
    else:
        first, second = ([rank for rank, of in zip(ranks, shares, strict=True) if of == share] for share in (0, 1))
        for pair in zip(first, second, strict=True):
            assert_same(together(list(pair), True), expected)


def test_loading_says_what_cannot_be_cut(on_two_processes: Results) -> None:
    for rank in on_two_processes("refusals"):
        assert "`expert_bias=True` has no plan for `tp_size` (2) alone" in rank["biased"]
        for name, cut in (("other", "(Shard(dim=1),)"), ("whole", "None")):
            assert "`lm_head.weight` is tied to `model.shared.weight`" in rank[name]
            assert f"{cut} and (Shard(dim=0),)" in rank[name]


@pytest.mark.parametrize(
    ("fields", "plan", "message"),
    [
        ({"decoder_num_key_value_heads": 1}, {"tp_size": 2}, r"`decoder_num_key_value_heads` \(1\).*`tp_size` \(2\)"),
        ({"encoder_ffn_dim": 47, "encoder_sparse_step": 2}, {"tp_size": 2}, r"`encoder_ffn_dim` \(47\) must be"),
        ({"decoder_ffn_dim": 47, "decoder_sparse_step": 0}, {"tp_size": 2}, r"`decoder_ffn_dim` \(47\) must be"),
        ({"expert_ffn_dim": 7, "num_shared_experts": 1}, {"tp_size": 2, "ep_size": 2}, r"`expert_ffn_dim` \(7\)"),
        ({"expert_ffn_dim": 7}, {"tp_size": 2}, r"`expert_ffn_dim` \(7\) must be a multiple"),
        (
            {"encoder_attention_heads": 4, "encoder_num_key_value_heads": 4},
            {"tp_size": 8},
            r"`encoder_attention_heads` \(4\).*`tp_size` \(8\).*in its place `fsdp_size`",
        ),
        ({"expert_bias": True}, {"tp_size": 2}, r"`expert_bias=True`.*add `ep_size=2`.*or use `fsdp_size`"),
        (
            {"num_experts": 5},
            {"tp_size": 2, "ep_size": 2},
            r"`num_experts` \(5\) must be a multiple of `ep_size` \(2\)",
        ),
        ({"num_experts": 5}, {"fsdp_size": 2, "ep_size": 2}, r"`num_experts` \(5\).*or `fsdp_size` alone"),
        ({"num_experts": 0}, {"fsdp_size": 2, "ep_size": 2}, r"`ep_size` \(2\).*has none \(`num_experts` is 0\)"),
        ({"expert_dropout": 0.1}, {"tp_size": 2, "ep_size": 2}, r"`expert_dropout` \(0.1\).*`expert_dropout=0.0`"),
        ({"activation_dropout": 0.1}, {"tp_size": 2, "ep_size": 2}, r"`activation_dropout` \(0.1\).*`fsdp_size`"),
        ({}, {"pp_size": 2}, r"`pp_size` \(2\).*no plan for"),
    ],
)
def test_a_configuration_says_what_cannot_be_cut(fields: dict[str, Any], plan: dict[str, Any], message: str) -> None:
    config = tiny_config(**{"decoder_num_key_value_heads": 2, **fields})
    with pytest.raises(ValueError, match=message):
        config.check_parallelism(DistributedConfig(**plan))


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({"num_experts": 0, "expert_bias": True, "expert_ffn_dim": 7}, {"tp_size": 2}),
        ({"expert_bias": True, "expert_ffn_dim": 7}, {"tp_size": 2, "ep_size": 2}),
        ({"decoder_num_key_value_heads": 1, "num_experts": 5, "encoder_ffn_dim": 47}, {"fsdp_size": 2}),
        ({"decoder_num_key_value_heads": 1, "expert_dropout": 0.1}, {"fsdp_size": 2, "ep_size": 2}),
        ({"num_experts": 5, "expert_dropout": 0.1}, {"tp_size": 2}),
        # No layer has this width.
        ({"encoder_ffn_dim": 47, "decoder_ffn_dim": 47, "expert_ffn_dim": 8}, {"tp_size": 2}),
        ({"expert_ffn_dim": 7, "num_shared_experts": 2}, {"tp_size": 2, "ep_size": 2}),
    ],
)
def test_what_can_be_cut_is_not_refused(fields: dict[str, Any], plan: dict[str, Any]) -> None:
    tiny_config(**{"decoder_num_key_value_heads": 2, **fields}).check_parallelism(DistributedConfig(**plan))
