"""What experts cost: operations for real tokens only, no copies of weights, gradients where they are asked for."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparseq.grouped_sparseq import _new_weight_gradient
from sparseq.modeling_sparseq import SparseqSparseMLP
from tests.tiny import label_batch, source_batch, tiny_config, tiny_model
from tests.tolerances import assert_close

KINDS = [(True, False), (False, True)]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def sparse_layer(implementation: str, gated: bool = True, bias: bool = False, width: int = 24) -> SparseqSparseMLP:
    config = tiny_config(gated_ffn=gated, expert_bias=bias, expert_ffn_dim=width)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    layer = SparseqSparseMLP(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


def operations(layer: SparseqSparseMLP, states: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, int]:
    """Operations of a forward, and of forward and backward."""
    states = states.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        outputs, _ = layer(states, mask)
    with FlopCounterMode(display=False) as backward:
        outputs.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_padding_costs_no_expert_operations(gated: bool, bias: bool) -> None:
    # A width that the grouped product cannot take: the counter knows only the products of the loop.
    layer = sparse_layer("sparseq", gated, bias, width=25)
    states = torch.randn(2, 30, 32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 10:] = False
    real = int(mask.sum())
    router = 2 * 32 * 4
    experts = 2 * 2 * (3 if gated else 2) * 32 * 25
    # The router scores padding too; its backward has one product for the weight and one for the states.
    assert operations(layer, states, mask) == (
        60 * router + real * experts,
        3 * (60 * router + real * experts),
    )


def test_padding_reaches_no_expert_in_training_and_prefill() -> None:
    ids, labels = source_batch(), label_batch()
    real_source, real_target = int(ids.ne(0).sum()), int(labels.ne(-100).sum())
    model = tiny_model()
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for stack, rows in seen.items():
        for layer in getattr(model.model, stack).layers:
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args, rows=rows: rows.append(int((args[1] < module.num_experts).sum()))
            )
    model.train()
    model(input_ids=ids, labels=labels).loss.backward()
    assert seen == {"encoder": [2 * real_source] * 2, "decoder": [2 * real_target] * 2}
    model.eval()
    for rows in seen.values():
        rows.clear()
    prompt = torch.tensor([[0, 0, 1, 7], [0, 1, 5, 9], [1, 4, 6, 8]])
    model.generate(ids, decoder_input_ids=prompt, decoder_attention_mask=prompt.ne(0).long(), max_new_tokens=1)
    assert seen == {"encoder": [2 * real_source] * 2, "decoder": [2 * int(prompt.ne(0).sum())] * 2}


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_no_tensor_is_larger_than_the_weights_or_the_inner_activations(gated: bool, bias: bool) -> None:
    tokens, largest = 200, {}
    for implementation in ("sparseq", "batched_mm"):
        layer = sparse_layer(implementation, gated, bias)
        with LargestTensor() as recorded:
            layer(torch.randn(1, tokens, 32, requires_grad=True))[0].sum().backward()
        largest[implementation] = recorded.elements
    inner = tokens * 2 * 24 * (2 if gated else 1)
    weights = 4 * 24 * 32 * (2 if gated else 1)
    assert largest["sparseq"] <= max(inner, weights, tokens * 2 * 32)
    assert largest["batched_mm"] > 20 * largest["sparseq"], "the recorder misses copies of weights"


@pytest.mark.parametrize("frozen", ["experts", "router", "states"])
def test_gradients_are_made_only_where_they_are_asked_for(frozen: str) -> None:
    layer, states = sparse_layer("sparseq", bias=True), torch.randn(1, 9, 32, requires_grad=True)
    layer(states)[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    expected["states"], states.grad = states.grad, None
    layer.zero_grad()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    states.requires_grad_(frozen != "states")
    layer(states)[0].square().sum().backward()
    for name, tensor in [*layer.named_parameters(), ("states", states)]:
        assert_close(tensor.grad, None if name.startswith(frozen) else expected[name], torch.float32, name)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_memory_for_gradients_is_ordinary_memory(platform: str) -> None:
    # Above and below the size from which Linux is asked for huge pages.
    for experts in (1, 5):
        weight = torch.empty(experts, 1024, 1024)
        with mock.patch("sys.platform", platform):
            gradient = _new_weight_gradient(weight)
        assert gradient.shape == weight.shape
        assert gradient.is_contiguous()
        gradient.fill_(1.0)
        assert gradient.sum() == weight.numel()
