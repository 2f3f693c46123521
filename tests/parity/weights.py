"""Random weights, and copying them from one model to another without leaving any behind."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from tests.tolerances import assert_close


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """
    Fill all parameters and persistent buffers with random numbers, also biases and norms: zero biases and unit norms
    would hide one that is left out or swapped. Frozen parameters, such as tables of sinusoids, stay.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if tensor.dim() > 1 and "bias" not in name:
            # Keeps the size of a layer's output near that of its input.
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=0.3)


def train_padding_row(module: nn.Module) -> None:
    """
    Let the pad token's embedding get its gradient. The library freezes that row; Sparseq does not, because the pad
    token may also start the target, as in Marian.
    """
    for embedding in module.modules():
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None


@torch.no_grad()
def copy_weights(
    source: nn.Module, target: nn.Module, renames: Iterable[tuple[str, str]], left_out: Iterable[str] = ()
) -> dict[str, str]:
    """
    Copy every parameter and persistent buffer.

    Args:
        source, target: The two modules.
        renames: Regular expressions and replacements that make a target's name out of a source's, applied in turn.
        left_out: Names in `source` of what is not copied; the caller says why.

    Returns:
        The target's name for each name of a source's tensor.

    Raises:
        AssertionError: if a source tensor has no place, a target tensor gets none, shapes differ, or two different
            source tensors meet in one tied target tensor.
    """
    sources, targets = source.state_dict(keep_vars=True), target.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    for source_name in sources.keys() - set(left_out):
        name = source_name
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        names[source_name] = name
    assert set(left_out) <= sources.keys()
    assert len(set(names.values())) == len(names), "two source tensors have one target"
    unused = set(names.values()) - targets.keys()
    assert not unused, f"the target has no {sorted(unused)}"
    for source_name, name in names.items():
        assert sources[source_name].shape == targets[name].shape, (source_name, name)
        targets[name].copy_(sources[source_name])

    filled = {id(targets[name]) for name in names.values()}
    empty = [name for name, tensor in targets.items() if id(tensor) not in filled]
    assert not empty, f"nothing was copied to {empty}"
    for source_name, name in names.items():
        assert torch.equal(sources[source_name], targets[name]), f"{name} was overwritten through a tied tensor"
    return names


def assert_gradients_close(source: nn.Module, target: nn.Module, names: dict[str, str], dtype: torch.dtype) -> None:
    """Assert that the gradients of all parameters are equal, under the names that `copy_weights` returned."""
    expected = dict(source.named_parameters(remove_duplicate=False))
    actual = dict(target.named_parameters(remove_duplicate=False))
    compared = set()
    for source_name, name in names.items():
        if source_name in expected:
            assert_close(actual[name].grad, expected[source_name].grad, dtype, name)
            compared.add(id(actual[name]))
    assert compared == {id(parameter) for parameter in target.parameters()}
