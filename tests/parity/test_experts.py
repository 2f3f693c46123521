"""Every experts implementation equals a plain loop over tokens, in outputs and in the gradient of every parameter."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sparseq import SparseqConfig
from sparseq.grouped_sparseq import find_groups, grouped_linear
from sparseq.modeling_sparseq import SparseqSparseMLP, make_experts, sorted_experts_forward
from tests.parity.weights import randomize
from tests.tolerances import assert_close


def off_the_cpu(*args: Any) -> torch.Tensor:
    """Our experts as they run on accelerators and in compiled graphs: with grouped products, or the library's loop."""
    with mock.patch("sparseq.grouped_sparseq._is_plain_cpu", return_value=False):
        return sorted_experts_forward(*args)


ALL_EXPERTS_FUNCTIONS.register("sparseq off the CPU", off_the_cpu)

# Those that take any size and type, and all of them.
FREE = ["eager", "batched_mm", "sparseq", "sparseq off the CPU"]
IMPLEMENTATIONS = [*FREE, "grouped_mm"]
# Rows of the stacked weights as multiples of 16 bytes in float32 and bfloat16, and not.
ALIGNED, ODD = (16, 8), (15, 7)
EXPERTS, TOP_K, BATCH, LENGTH = 5, 2, 3, 7
# Gated or plain, with biases or without.
KINDS = list(itertools.product([True, False], [True, False]))
# The expert that no token chooses.
IDLE = 3


def make_block(
    implementation: str,
    *,
    gated: bool,
    bias: bool,
    scoring: str = "softmax",
    renormalise: bool = True,
    shared: int = 0,
    sizes: tuple[int, int] = ALIGNED,
    activation: str = "silu",
) -> SparseqSparseMLP:
    hidden, width = sizes
    config = SparseqConfig(
        d_model=hidden,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_num_key_value_heads=1,
        decoder_num_key_value_heads=1,
        position_embedding_type="none",
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        expert_ffn_dim=width,
        num_shared_experts=shared,
        gated_ffn=gated,
        expert_bias=bias,
        ffn_bias=bias,
        router_scoring=scoring,
        norm_topk_prob=renormalise,
        activation_function=activation,
    )
    config._experts_implementation = implementation
    block = SparseqSparseMLP(config)
    randomize(block)
    with torch.no_grad():
        # The first feature is 1 in every token, so this expert's logit is the lowest of all.
        block.router.weight[IDLE] = 0.0
        block.router.weight[IDLE, 0] = -8.0
    return block


def make_states(hidden: int) -> torch.Tensor:
    states = torch.randn(BATCH, LENGTH, hidden)
    states[..., 0] = 1.0
    return states


def padding_mask() -> torch.Tensor:
    """Right padding, left padding, and a row of padding only."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    mask[2] = False
    return mask


def feed_forward(
    token: torch.Tensor, first: Any, first_bias: Any, second: Any, second_bias: Any, gated: bool, activation: Any
) -> torch.Tensor:
    inner = first @ token if first_bias is None else first @ token + first_bias
    if gated:
        half = inner.shape[0] // 2
        inner = activation(inner[:half]) * inner[half:]
    else:
        inner = activation(inner)
    return second @ inner if second_bias is None else second @ inner + second_bias


def loop_over_choices(
    experts: nn.Module, states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, activation: Any
) -> torch.Tensor:
    """What each token gets from the experts it chose, one token and one expert at a time."""
    parameters = dict(experts.named_parameters())
    gated = "gate_up_proj" in parameters
    name = "gate_up_proj" if gated else "up_proj"
    first, second = parameters[name], parameters["down_proj"]
    first_biases, second_biases = parameters.get(f"{name}_bias"), parameters.get("down_proj_bias")
    rows = []
    for token, choices, shares in zip(states, indices.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(choices, shares, strict=True):
            if expert == EXPERTS:
                continue
            first_bias = None if first_biases is None else first_biases[expert]
            second_bias = None if second_biases is None else second_biases[expert]
            row = row + share * feed_forward(
                token, first[expert], first_bias, second[expert], second_bias, gated, activation
            )
        rows.append(row)
    return torch.stack(rows)


def loop_over_tokens(block: SparseqSparseMLP, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The whole sparse layer, token by token, from its definition and its weights alone."""
    config, hidden = block.experts.config, states.shape[-1]
    activation = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[config.activation_function]
    parameters = dict(block.named_parameters())
    flat = states.reshape(-1, hidden)
    kept = torch.ones(len(flat), dtype=torch.bool) if mask is None else mask.reshape(-1)
    indices, weights = [], []
    for token, is_kept in zip(flat, kept.tolist(), strict=True):
        logits = parameters["router.weight"].float() @ token.float()
        scores = torch.sigmoid(logits) if config.router_scoring == "sigmoid" else logits.exp() / logits.exp().sum()
        chosen = sorted(range(EXPERTS), key=lambda expert: -scores[expert].item())[:TOP_K]
        assert IDLE not in chosen
        total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
        weights.append(torch.stack([scores[expert] / total for expert in chosen]))
        indices.append(chosen if is_kept else [EXPERTS] * TOP_K)
    outputs = loop_over_choices(block.experts, flat, torch.tensor(indices), torch.stack(weights), activation)
    if config.num_shared_experts:
        names = ["gate_proj", "up_proj"] if config.gated_ffn else ["up_proj"]
        first = torch.cat([parameters[f"shared_experts.{name}.weight"] for name in names])
        has_bias = config.ffn_bias
        first_bias = torch.cat([parameters[f"shared_experts.{name}.bias"] for name in names]) if has_bias else None
        second_bias = parameters["shared_experts.down_proj.bias"] if has_bias else None
        second = parameters["shared_experts.down_proj.weight"]
        shared = [
            feed_forward(token, first, first_bias, second, second_bias, config.gated_ffn, activation) for token in flat
        ]
        outputs = outputs + torch.stack(shared)
    return outputs.view_as(states)


def gradients(outputs: torch.Tensor, module: nn.Module, *inputs: torch.Tensor) -> dict[str, Any]:
    """Gradients of a fixed random projection of `outputs`."""
    projection = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs.dtype)
    names = [name for name, _ in module.named_parameters()] + [f"input {i}" for i in range(len(inputs))]
    tensors = [*module.parameters(), *inputs]
    found = torch.autograd.grad((outputs * projection).sum(), tensors, allow_unused=True)
    return dict(zip(names, found, strict=True))


def check_block(block: SparseqSparseMLP, states: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> None:
    states = states.requires_grad_()
    outputs, _ = block(states, mask)
    expected = loop_over_tokens(block, states, mask)
    assert_close(outputs, expected, dtype, "outputs")
    actual_gradients, expected_gradients = (gradients(result, block, states) for result in (outputs, expected))
    for name, expected_gradient in expected_gradients.items():
        assert_close(actual_gradients[name], expected_gradient, dtype, name)
    # The test would say little if the router's gradient were lost in the tolerance.
    assert float(expected_gradients["router.weight"].abs().max()) > 0.01


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("scoring", "renormalise"), [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]
)
@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sparse_layer_equals_a_loop_over_tokens(
    implementation: str, gated: bool, bias: bool, scoring: str, renormalise: bool, padding: bool
) -> None:
    block = make_block(implementation, gated=gated, bias=bias, scoring=scoring, renormalise=renormalise)
    check_block(block, make_states(ALIGNED[0]), padding_mask() if padding else None, torch.float32)


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_experts_are_added_for_every_token(implementation: str, shared: int, gated: bool, bias: bool) -> None:
    activation = "gelu" if gated else "relu"
    block = make_block(implementation, gated=gated, bias=bias, shared=shared, activation=activation)
    check_block(block, make_states(ALIGNED[0]), padding_mask(), torch.float32)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("implementation", FREE)
def test_sizes_that_the_grouped_product_cannot_take(implementation: str, gated: bool, bias: bool) -> None:
    block = make_block(implementation, gated=gated, bias=bias, sizes=ODD)
    check_block(block, make_states(ODD[0]), padding_mask(), torch.float32)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17])
@pytest.mark.parametrize("sizes", [(512, 544), (544, 512), (600, 512)], ids=str)
def test_weight_gradients_of_large_experts_with_few_tokens(sizes: tuple[int, int], rows: int) -> None:
    # One expert has `rows` tokens, one a single token and one none; the last rows belong to nobody.
    outputs, inputs = sizes
    weight = (torch.randn(3, outputs, inputs) * inputs**-0.5).requires_grad_()
    states, gradient = torch.randn(rows + 3, inputs), torch.randn(rows + 3, outputs)
    choices = torch.tensor([0] * rows + [1, 3, 3])
    assert weight[0].nbytes >= 2**20
    grouped_linear(states, weight, None, find_groups(choices, 3)).backward(gradient)
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    for choice, state, of_output in zip(choices.tolist(), states.double(), gradient.double(), strict=True):
        if choice < 3:
            expected[choice] += torch.outer(of_output, state)
    assert_close(weight.grad, expected, torch.float32)


@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("implementation", FREE)
def test_experts_in_float64(implementation: str, gated: bool, bias: bool, sizes: tuple[int, int]) -> None:
    # Without the router, which works in float32 whatever the type of the model.
    hidden = sizes[0]
    experts = make_experts(make_block(implementation, gated=gated, bias=bias, sizes=sizes).experts.config).double()
    randomize(experts)
    tokens = BATCH * LENGTH
    states = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    indices[indices == IDLE] = 0
    indices[4:6] = EXPERTS
    weights = torch.rand(tokens, TOP_K, dtype=torch.float64, requires_grad=True)
    outputs = experts(states, indices, weights)
    expected = loop_over_choices(experts, states, indices, weights, F.silu)
    assert_close(outputs, expected, torch.float64, "outputs")
    actual_gradients, expected_gradients = (gradients(x, experts, states, weights) for x in (outputs, expected))
    for name, expected_gradient in expected_gradients.items():
        assert_close(actual_gradients[name], expected_gradient, torch.float64, name)


@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_our_experts_in_bfloat16_are_close_to_float32(gated: bool, bias: bool, sizes: tuple[int, int]) -> None:
    block = make_block("sparseq", gated=gated, bias=bias, sizes=sizes).bfloat16()
    states, mask = make_states(sizes[0]).bfloat16().requires_grad_(), padding_mask()
    outputs, _ = block(states, mask)
    assert outputs.dtype == torch.bfloat16
    # The same numbers in float32: bfloat16 fits in it, and the router chooses in float32 in both.
    reference = make_block("sparseq", gated=gated, bias=bias, sizes=sizes)
    reference.load_state_dict(block.state_dict())
    reference_states = states.detach().float().requires_grad_()
    expected = loop_over_tokens(reference, reference_states, mask)
    assert_close(outputs, expected, torch.bfloat16, "outputs")
    actual_gradients = gradients(outputs, block, states)
    for name, expected_gradient in gradients(expected, reference, reference_states).items():
        # Sums over tokens are rounded on the scale of their largest terms.
        scale = expected_gradient.abs().max()
        assert_close(actual_gradients[name] / scale, expected_gradient / scale, torch.bfloat16, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_padding_only(implementation: str) -> None:
    block = make_block(implementation, gated=True, bias=True)
    states = make_states(ALIGNED[0]).requires_grad_()
    outputs, _ = block(states, torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert not outputs.any()
    # With the residual connection around a layer, since "eager" has run no expert and has nothing to differentiate.
    found = gradients(states + outputs, block, states)
    assert_close(found.pop("input 0"), gradients(states + 0, nn.Identity(), states)["input 0"], torch.float32)
    for name, gradient in found.items():
        assert_close(gradient, None, torch.float32, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_sees_another(implementation: str) -> None:
    block = make_block(implementation, gated=True, bias=True)
    states = make_states(ALIGNED[0])
    together, _ = block(states)
    for row in range(BATCH):
        assert_close(block(states[row : row + 1])[0], together[row : row + 1], torch.float32, f"sentence {row}")


@pytest.mark.parametrize("implementation", ["sparseq", "sparseq off the CPU"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_no_tokens_at_all(gated: bool, bias: bool, implementation: str) -> None:
    block = make_block(implementation, gated=gated, bias=bias)
    states = torch.zeros(2, 0, ALIGNED[0], requires_grad=True)
    outputs, _ = block(states)
    assert outputs.shape == states.shape
    outputs.sum().backward()
    assert all(not parameter.grad.any() for parameter in block.parameters())


def test_function_transforms() -> None:
    block, states = make_block("sparseq", gated=True, bias=True), make_states(ALIGNED[0])

    def loss(parameters: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, parameters, (rows[None],))[0].square().sum()

    parameters = dict(block.named_parameters())
    together = torch.func.grad(lambda p: sum(loss(p, rows) for rows in states))(parameters)
    expected = torch.autograd.grad(sum(loss(parameters, rows) for rows in states), list(parameters.values()))
    for (name, gradient), reference in zip(together.items(), expected, strict=True):
        assert_close(gradient, reference, torch.float32, name)
