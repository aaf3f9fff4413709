"""The gradient of the scores: what each gate brings, less what raising a score costs through tau.

    du_j = sum_i g_ij - (C[until_j] - C[from_j])

C is the running sum over queries of c_i, the i-th query's gate gradients shared among its fractional entries (more in
kernels/README.md, 4). It is taken in float64: totals of tiles, then within each tile what came before it. The same bits
every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Queries or entries of one program; a power of two."""
TILES_AT_ONCE = tl.constexpr(128)


def score_gradient(
    direct: Tensor, first_row: Tensor, grad_sums: Tensor, num_fractional: Tensor, fractional: tuple[Tensor, Tensor],
    stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the stream's scores [b, t, g] and of the carried ones [b, g, S].

    Args:
        direct: [b, g, S + t], the first term, of entries that have rows; the rest is not read.
        first_row: [b, g, S + t + 1] of a Layout: whose next number is greater has rows.
        grad_sums: [b, g, s], sum of each query's gradients of fractional gates.
        num_fractional: [b, g, s] int32.
        fractional: from and until [b, g, S + t] int32.
        stream: t.
    """
    (b, g, entries), s = direct.shape, grad_sums.shape[-1]
    tiles = triton.cdiv(s, TILE)
    totals = torch.empty(b, g, tiles, dtype=torch.float64, device=direct.device)
    running = torch.empty(b, g, s + 1, dtype=torch.float64, device=direct.device)
    grad, grad_carry = direct.new_empty(b, stream, g), direct.new_empty(b, g, entries - stream)
    total_shares_kernel[(tiles, b * g)](grad_sums, num_fractional, totals, s, TILE=TILE)
    run_shares_kernel[(tiles, b * g)](grad_sums, num_fractional, totals, running, s, TILE=TILE)
    grad_scores_kernel[(triton.cdiv(entries, TILE), b * g)](
        direct, first_row, running, *fractional, grad, grad_carry, s, entries, entries - stream, g, TILE=TILE
    )
    return grad, grad_carry


@triton.jit
def _shares(grad_sums, num_fractional, s, TILE: tl.constexpr):
    """c of this program's queries [TILE], float64; 0 beyond the last."""
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = tl.program_id(1).to(tl.int64) * s + query
    number = tl.load(num_fractional + at, mask=query < s, other=1)
    return tl.load(grad_sums + at, mask=query < s, other=0.0).to(tl.float64) / tl.maximum(number, 1).to(tl.float64)


@triton.jit
def total_shares_kernel(grad_sums, num_fractional, totals, s, TILE: tl.constexpr):
    """Sum of the shares of each tile of queries [b * g, tiles]."""
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(totals + slot, tl.sum(_shares(grad_sums, num_fractional, s, TILE), 0))


@triton.jit
def run_shares_kernel(grad_sums, num_fractional, totals, running, s, TILE: tl.constexpr):
    """C [b * g, s + 1]: the shares of all queries before each, and of all."""
    tile, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = tl.zeros([TILES_AT_ONCE], tl.float64)
    for first in range(0, tile, TILES_AT_ONCE):
        others = first + tl.arange(0, TILES_AT_ONCE)
        before += tl.load(totals + bg * tl.num_programs(0) + others, mask=others < tile, other=0.0)
    so_far = tl.sum(before, 0) + tl.cumsum(_shares(grad_sums, num_fractional, s, TILE), 0)
    query = tile * TILE + tl.arange(0, TILE)
    tl.store(running + bg * (s + 1) + query + 1, so_far, mask=query < s)
    if tile == 0:
        tl.store(running + bg * (s + 1), 0.0)


@triton.jit
def grad_scores_kernel(
    direct, first_row, running, fractional_from, fractional_until, grad, grad_carry, s, entries, S, g,
    TILE: tl.constexpr,
):  # fmt: skip
    """Both terms, in the layout of the scores: heads last in the stream, first in the carry."""
    bg = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside, at = entry < entries, bg * entries + entry
    row = first_row + bg * (entries + 1) + entry
    has_rows = inside & (tl.load(row + 1, mask=inside, other=0) > tl.load(row, mask=inside, other=0))
    value = tl.load(direct + at, mask=has_rows, other=0.0)
    begin = tl.load(fractional_from + at, mask=inside, other=0)
    end = tl.maximum(tl.load(fractional_until + at, mask=inside, other=0), begin)
    running += bg * (s + 1)
    price = tl.load(running + end, mask=inside, other=0.0) - tl.load(running + begin, mask=inside, other=0.0)
    value -= price.to(value.dtype)
    t = entries - S
    tl.store(grad + (bg // g * t + entry - S) * g + bg % g, value, mask=inside & (entry >= S))
    tl.store(grad_carry + bg * S + entry, value, mask=entry < S)
