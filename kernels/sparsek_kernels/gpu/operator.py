"""The SPARSEK operator on rows of any length, forward and backward in Triton, without a sort.

One program projects one row in two searches, each a few passes over the row. First the k-th best entry, by halving
the interval of bit patterns that holds it (floating-point numbers are ordered like their bits). It confines tau to an
interval of length 1 and, taken as the origin, keeps all sums small however large the entries are. Then Newton's method
for f(tau) = sum clip(z - tau, 0, 1) = k inside that interval: f is piecewise linear, so the step from the right piece
is the exact solution. Sums are float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.gpu.call import on_device_of

BLOCK = 2048
"""Entries of a row that are worked on at once."""


@triton.jit
def _ordered(bits):
    """Bit patterns of floats -> integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> (bits.dtype.primitive_bitwidth - 1)) & (((-1) << (bits.dtype.primitive_bitwidth - 1)) ^ -1))


@triton.jit
def _load(scores, start, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Entries in at least float32, and which of them exist."""
    index = start + tl.arange(0, BLOCK)
    exists = index < n
    z = tl.load(scores + index, mask=exists, other=0.0)
    return z.to(tl.float64 if WIDE else tl.float32), exists


@triton.jit
def _kth_best(scores, n, k, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The k-th best entry of a row of n > k >= 1."""
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    LAST: tl.constexpr = (1 << (63 if WIDE else 31)) - 1
    # Invariant: low <= the ordered bits of the k-th best <= high.
    low = tl.full([], -LAST - 1, INT)
    high = tl.full([], LAST, INT)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        count = 0
        least_above = tl.full([], LAST, INT)
        most_below = tl.full([], -LAST - 1, INT)
        for start in range(0, n, BLOCK):
            z, exists = _load(scores, start, n, BLOCK, WIDE)
            order = _ordered(z.to(INT, bitcast=True))
            above = exists & (order >= middle)
            count += tl.sum(above.to(tl.int32), 0)
            least_above = tl.minimum(least_above, tl.min(tl.where(above, order, LAST), 0))
            most_below = tl.maximum(most_below, tl.max(tl.where(exists & (order < middle), order, -LAST - 1), 0))
        low = tl.where(count >= k, least_above, low)
        high = tl.where(count > k, high, most_below)  # below `low` if exactly k are above: found
    return _ordered(low).to(tl.float64 if WIDE else tl.float32, bitcast=True)


@triton.jit
def _solve(scores, n, k, centre, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """tau - centre, in [-1, 0], float64."""
    low = tl.full([], -1.0, tl.float64)
    high = tl.full([], 0.0, tl.float64)
    tau = tl.full([], -0.5, tl.float64)
    steps = 0
    while steps < 128:
        ones = 0
        interior = 0
        inside = tl.full([], 0.0, tl.float64)
        for start in range(0, n, BLOCK):
            z, exists = _load(scores, start, n, BLOCK, WIDE)
            above = z.to(tl.float64) - centre - tau
            fractional = exists & (above > 0.0) & (above < 1.0)
            ones += tl.sum((exists & (above >= 1.0)).to(tl.int32), 0)
            interior += tl.sum(fractional.to(tl.int32), 0)
            inside += tl.sum(tl.where(fractional, above, 0.0), 0)
        excess = inside + (ones - k).to(tl.float64)  # f(tau) - k
        width = high - low
        low = tl.where(excess >= 0.0, tau, low)
        high = tl.where(excess >= 0.0, high, tau)
        newton = tau + excess / tl.maximum(interior, 1).to(tl.float64)
        trusted = (newton >= low) & (newton <= high)
        # A step that does not halve the bracket is followed by one that does.
        following = tl.where(trusted & (high - low <= 0.5 * width), newton, 0.5 * (low + high))
        done = (excess == 0.0) | (newton == tau) | (high - low <= 2.3e-16)
        tau = tl.where(done, tl.where(trusted, newton, tau), following)
        steps = tl.where(done, 128, steps + 1)
    return tau


@triton.jit
def _forward(scores, gates, n, k, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * n
    gates += row * n
    centre = _kth_best(scores, n, k, BLOCK, WIDE).to(tl.float64)
    tau = _solve(scores, n, k, centre, BLOCK, WIDE)
    for start in range(0, n, BLOCK):
        z, exists = _load(scores, start, n, BLOCK, WIDE)
        gate = tl.minimum(tl.maximum(z.to(tl.float64) - centre - tau, 0.0), 1.0)
        tl.store(gates + start + tl.arange(0, BLOCK), gate.to(gates.dtype.element_ty), mask=exists)


@triton.jit
def _backward(gates, grad, grad_scores, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gates += row * n
    grad += row * n
    grad_scores += row * n
    count = 0
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        gate = tl.load(gates + index, mask=index < n, other=0.0).to(tl.float64)
        upstream = tl.load(grad + index, mask=index < n, other=0.0).to(tl.float64)
        fractional = (gate > 0.0) & (gate < 1.0)
        count += tl.sum(fractional.to(tl.int32), 0)
        total += tl.sum(tl.where(fractional, upstream, 0.0), 0)
    mean = total / tl.maximum(count, 1).to(tl.float64)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        gate = tl.load(gates + index, mask=index < n, other=0.0).to(tl.float64)
        upstream = tl.load(grad + index, mask=index < n, other=0.0).to(tl.float64)
        found = tl.where((gate > 0.0) & (gate < 1.0), upstream - mean, 0.0)
        tl.store(grad_scores + index, found.to(grad_scores.dtype.element_ty), mask=index < n)


@torch.library.custom_op("sparsek::project", mutates_args=())
def project(scores: Tensor, num_selected: int) -> Tensor:
    """`sparsek` on a CUDA device (or in Triton's interpreter), to rounding: see there for arguments and gradient.

    Args:
        scores: [..., n] float16, bfloat16, float32 or float64, finite: the caller has looked.
        num_selected: k >= 0.

    Returns:
        Gates [..., n], contiguous, in the dtype of `scores`.
    """
    scores = scores.contiguous()
    gates = torch.empty_like(scores, memory_format=torch.contiguous_format)
    n = scores.shape[-1]
    if num_selected == 0 or n <= num_selected:
        return gates.fill_(float(num_selected > 0))
    if scores.numel() > 0:
        size, wide = min(BLOCK, triton.next_power_of_2(n)), scores.dtype == torch.float64
        with on_device_of(scores):
            _forward[(scores.numel() // n,)](scores, gates, n, num_selected, BLOCK=size, WIDE=wide, num_warps=4)
    return gates


@torch.library.custom_op("sparsek::project_backward", mutates_args=())
def project_backward(gates: Tensor, grad: Tensor) -> Tensor:
    """(Diag(s) - s s^T / |s|) grad with s = 1{0 < gate < 1}, row by row; both [..., n]."""
    gates, grad = gates.contiguous(), grad.contiguous()
    grad_scores = torch.empty_like(gates, memory_format=torch.contiguous_format)
    n = gates.shape[-1]
    if gates.numel() > 0:
        size = min(BLOCK, triton.next_power_of_2(n))
        with on_device_of(gates):
            _backward[(gates.numel() // n,)](gates, grad, grad_scores, n, BLOCK=size, num_warps=4)
    return grad_scores


@project.register_fake
def _(scores: Tensor, num_selected: int) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@project_backward.register_fake
def _(gates: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(gates, memory_format=torch.contiguous_format)


def _keep_gates(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (gates,) = ctx.saved_tensors
    return project_backward(gates, grad), None


project.register_autograd(_differentiate, setup_context=_keep_gates)
