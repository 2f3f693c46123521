# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
Linear maps of groups of rows, each group with its own matrix: what experts are once tokens are sorted by expert.

Shapes: M rows, E groups, I inputs and O outputs of a map.
"""

import ctypes
import functools
import itertools
import mmap
import sys
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.utils.import_utils import is_tracing

# Bytes from which an allocation is worth a system call that asks for huge pages.
_HUGE_ALLOCATION = 4 << 20


def _new_weight_gradient(weight: torch.Tensor) -> torch.Tensor:
    """
    Uninitialised memory for the gradient `(E, O, I)` of stacked experts on the CPU.

    All experts' gradients are written even where few tokens take part, and by default every step gets that memory
    anew from the system, page by page, at up to half the layer's cost. Linux gives it in huge pages to who asks.
    """
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    size = gradient.numel() * gradient.element_size()
    if sys.platform == "linux" and size >= _HUGE_ALLOCATION:
        page = mmap.PAGESIZE
        start = -(-gradient.data_ptr() // page) * page
        end = (gradient.data_ptr() + size) // page * page
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return gradient


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Groups(NamedTuple):
    """
    Which rows of a matrix `(M, ...)`, sorted by expert, belong to which.

    Attributes:
        ids: `(M,)`, each row's expert; rows of the tail have the index E and belong to none.
        ends: `(E,)` int32, the row at which each group ends.
        sizes: The rows of each group, and last of the tail; None where reading them would wait for a device or break
            a graph.
    """

    ids: torch.Tensor
    ends: torch.Tensor
    sizes: list[int] | None


def is_functional() -> bool:
    """Whether `torch.func` transforms are at work, which take plain operators only."""
    return torch._C._are_functorch_transforms_active()


def _is_plain_cpu(tensor: torch.Tensor) -> bool:
    """Whether this is an ordinary computation on the CPU, where waiting for sizes costs nothing."""
    return tensor.device.type == "cpu" and not is_tracing(tensor) and not is_functional()


def find_groups(ids: torch.Tensor, num_groups: int) -> Groups:
    """The groups of sorted `ids`."""
    ends = torch.searchsorted(ids, torch.arange(num_groups, device=ids.device), right=True, out_int32=True)
    sizes = None
    if _is_plain_cpu(ids):
        sizes = [end - start for start, end in itertools.pairwise([0, *ends.tolist(), ids.shape[0]])]
    return Groups(ids, ends, sizes)


def _can_use_grouped_mm(weight: torch.Tensor) -> bool:
    if is_tracing(weight) and weight.dtype != torch.bfloat16:
        return False
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return _fits_grouped_mm(weight)


def _fits_grouped_mm(weight: torch.Tensor) -> bool:
    """The kernel wants rows that begin at multiples of 16 bytes, in the operands and in their gradients."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    _, rows, columns = weight.shape
    size = weight.element_size()
    return rows * size % 16 == 0 and columns * size % 16 == 0


def _multiply_groups(
    rows: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """Each group of `rows` `(M, I)` times its matrix of `(E, I, O)`, plus its bias, on the CPU; the tail is zero."""
    tail = rows.shape[0] - sizes[-1]
    if bias is None and _fits_grouped_mm(matrices):
        outputs = F.grouped_mm(rows, matrices, offs=ends)
    else:
        outputs = rows.new_empty(rows.shape[0], matrices.shape[2])
        parts, results = rows.split(sizes), outputs.split(sizes)
        for group, size in enumerate(sizes[:-1]):
            if not size:
                continue
            if bias is None:
                torch.mm(parts[group], matrices[group], out=results[group])
            else:
                torch.addmm(bias[group], parts[group], matrices[group], out=results[group])
    if sizes[-1]:
        outputs[tail:].zero_()
    return outputs


def _weight_gradient(weight: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The gradient `(E, O, I)` of stacked experts from those of their outputs `(M, O)` and their inputs `(M, I)`."""
    gradient = _new_weight_gradient(weight)
    _, rows, columns = gradient.shape
    # A sum of a few outer products is all writing, which float32 kernels do in an order that wastes the caches where
    # the result is larger than they are. In blocks of 32 rows it takes 0.2 to 0.9 of the time.
    few = range(2, 17) if gradient.dtype == torch.float32 and rows * columns >= 2**18 and rows % 32 == 0 else ()
    blocks = (rows // 32, 32)
    # Lean, because at a few tokens each call is felt.
    lefts, rights = torch.split_with_sizes(grad.t(), sizes, 1), torch.split_with_sizes(inputs, sizes)
    for result, left, right, size in zip(gradient.unbind(), lefts, rights, sizes, strict=False):
        if size == 0:
            result.zero_()
        elif size in few:
            torch.bmm(left.unflatten(0, blocks), right.expand(blocks[0], -1, -1), out=result.unflatten(0, blocks))
        else:
            torch.mm(left, right, out=result)
    return gradient


class _GroupedLinear(torch.autograd.Function):
    """
    `grouped_linear` on the CPU, for every size and type. It spares what a composition of operators would add: passes
    over inputs and outputs that clear the tail, copies of biases for each row, and gradients in ordinary memory.
    """

    # Not with `setup_context`, which costs as much as a small product.
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ends: torch.Tensor,
        sizes: list[int],
    ) -> torch.Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(inputs, weight, ends)
        return _multiply_groups(inputs, weight.mT, bias, ends, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, ends = ctx.saved_tensors
        sizes = ctx.sizes
        of_inputs, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_bias = None
        grad_weight = _weight_gradient(weight, grad, inputs, sizes) if of_weight else None
        if of_bias:
            grad_bias = torch.stack([part.sum(dim=0) for part in grad.split(sizes)[:-1]])
        grad_inputs = _multiply_groups(grad, weight, None, ends, sizes) if of_inputs else None
        return grad_inputs, grad_weight, grad_bias, None, None


class _Rearrange(torch.autograd.Function):
    """
    Row i of the result is row `order[i] // copies` of the input; `inverse` is the inverse permutation of `order`.

    Indexing would do, but its gradient is added up row by row, over atomics on a GPU; this one is gathered.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.copies = copies
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        gathered = _Rearrange.apply(grad, inverse, order, 1)
        if ctx.copies > 1:
            gathered = gathered.view(-1, ctx.copies, grad.shape[-1]).sum(dim=1)
        return gathered, None, None, None


def rearrange(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    if is_functional():
        return rows[order // copies]
    return _Rearrange.apply(rows, order, inverse, copies)


def grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Groups
) -> torch.Tensor:
    """
    One linear map for each group of rows.

    Args:
        inputs: `(M, I)`, rows sorted by group.
        weight: `(E, O, I)`.
        bias: `(E, O)` or None.
        groups: Which rows belong to which map.

    Returns:
        `(M, O)`. Rows of no group are zero, and so is their gradient.
    """
    device_type = inputs.device.type
    if torch.is_autocast_enabled(device_type):
        weight = weight.to(torch.get_autocast_dtype(device_type))
    inputs = inputs.to(weight.dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    if groups.sizes is not None:
        if not torch.is_grad_enabled():
            # A step of decoding would feel the detour.
            return _multiply_groups(inputs, weight.mT, bias, groups.ends, groups.sizes)
        return _GroupedLinear.apply(inputs, weight, bias, groups.ends, groups.sizes)
    is_tail = (groups.ids >= weight.shape[0])[:, None]
    # Filled going in as well, because the kernel leaves the tail of the gradient as the memory was.
    inputs, transposed = inputs.masked_fill(is_tail, 0.0), weight.transpose(-2, -1)
    if _can_use_grouped_mm(weight):
        outputs = F.grouped_mm(inputs, transposed, offs=groups.ends)
    else:
        # The library's operator loops over the groups: any size and type, and opaque to the compiler.
        outputs = torch.ops.transformers.grouped_mm_fallback(inputs, transposed, groups.ends)
    if bias is not None:
        outputs = outputs + bias[groups.ids.clamp(max=weight.shape[0] - 1)]
    return outputs.masked_fill(is_tail, 0.0)
