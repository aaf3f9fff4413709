"""Ways down the wavelet tree: the n-th best entry of a range, and how many of a range lie above a bound.

Device functions. A range [low, high) of the table becomes a range of one node of each level; `at` is either end of it.
Neighbouring queries take nearly the same way, so what they load lies together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _into_better(ends, at, node):
    """Where `at`, in a node of one level, comes to lie in the node's better half on the next."""
    return tl.load(ends + at - 1, mask=at > node, other=node)


@triton.jit
def _sum_of(sums, low, high, segment, wanted):
    """Sum of the entries [low, high) of a level."""
    upper = tl.load(sums + high - 1, mask=wanted & (high > segment), other=0.0)
    return upper - tl.load(sums + low - 1, mask=wanted & (low > segment), other=0.0)


@triton.jit
def quantile(tree, low, high, nth, TILE: tl.constexpr, SUM: tl.constexpr):
    """Rank of the nth best entry, from 0, of [low, high), and the sum of those better than it.

    0 <= nth < high - low, or the way down leads out of the table.
    """
    ends, sums, _ranked, length, levels, span = tree
    node = tl.zeros_like(low)
    total = low.to(tl.float64) * 0
    size = span
    for _ in range(levels):
        half = size >> 1
        better_low = _into_better(ends, low, node)
        better_high = _into_better(ends, high, node)
        num_better = better_high - better_low
        worse = nth >= num_better
        if SUM:
            inner = node & -tl.maximum(half, TILE)
            total += _sum_of(sums, better_low, better_high, inner, worse)
        low = tl.where(worse, low + half + node - better_low, better_low)
        high = tl.where(worse, high + half + node - better_high, better_high)
        nth = tl.where(worse, nth - num_better, nth)
        node = tl.where(worse, node + half, node)
        size = half
        ends += length
        sums += length
    return node, total


@triton.jit
def count_above(tree, low, high, bound, shifted, centre, TILE: tl.constexpr):
    """Number and sum of the entries u of [low, high) with u > bound, or where `shifted` with u - 1 >= bound.

    Scores are compared after `centre` is taken off them, in the dtype of `bound`.
    """
    ends, sums, ranked, length, levels, span = tree
    node = tl.zeros_like(low)
    count = tl.zeros_like(low)
    total = low.to(tl.float64) * 0
    size = span
    for _ in range(levels):
        half = size >> 1
        better_low = _into_better(ends, low, node)
        better_high = _into_better(ends, high, node)
        # If the worst entry of the better half is above the bound, all of that half is.
        pivot = node + half - 1
        exists = pivot < length
        score = tl.load(ranked + pivot, mask=exists, other=float("-inf")).to(bound.dtype) - centre
        worse = exists & tl.where(shifted, score - 1 >= bound, score > bound)
        inner = node & -tl.maximum(half, TILE)
        total += _sum_of(sums, better_low, better_high, inner, worse)
        count += tl.where(worse, better_high - better_low, 0)
        low = tl.where(worse, low + half + node - better_low, better_low)
        high = tl.where(worse, high + half + node - better_high, better_high)
        node = tl.where(worse, node + half, node)
        size = half
        ends += length
        sums += length
    return count, total


@triton.jit
def candidate_range(query, start, carry_positions, carried, carry_steps, halo, window):
    """The places [low, high) in the table of a query's candidates: positions start to query - window.

    The carried entries come first, by position (`carry_positions` [carried]); then the stream, whose first entry is
    at position -halo. `carry_steps` is bit_length(carried).
    """
    before = start < -halo
    first = tl.zeros_like(query)
    last = tl.where(before, carried, 0)
    for _ in range(carry_steps):
        middle = (first + last) // 2
        is_open = first < last
        reached = tl.load(carry_positions + middle, mask=is_open, other=0) >= start
        last = tl.where(is_open & reached, middle, last)
        first = tl.where(is_open & (reached == 0), middle + 1, first)
    low = tl.where(before, first, (carried + halo + start).to(tl.int32))
    high = carried + tl.maximum(query - window + halo + 1, 0)
    return low, tl.maximum(low, high)
