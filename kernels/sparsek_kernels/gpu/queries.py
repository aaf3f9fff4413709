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
def _is_above(score, bound, SHIFTED: tl.constexpr):
    """u > bound, or u - 1 >= bound, in the dtype of `bound`."""
    score = score.to(bound.dtype)
    return score - 1 >= bound if SHIFTED else score > bound


@triton.jit
def _count_step(tables, length, half, way, bound, TILE: tl.constexpr, SHIFTED: tl.constexpr):
    """One level further down on the way to a bound; `way` is (low, high, node, count, total)."""
    ends, sums, ranked = tables
    low, high, node, count, total = way
    better_low = _into_better(ends, low, node)
    better_high = _into_better(ends, high, node)
    # If the worst entry of the better half is above the bound, all of that half is. Beyond the table nothing is, not
    # even above -inf, or the way would lead out of it: NaN.
    pivot = node + half - 1
    worse = _is_above(tl.load(ranked + pivot, mask=pivot < length, other=float("nan")), bound, SHIFTED)
    inner = node & -tl.maximum(half, TILE)
    total += _sum_of(sums, better_low, better_high, inner, worse)
    count += tl.where(worse, better_high - better_low, 0)
    low = tl.where(worse, low + half + node - better_low, better_low)
    high = tl.where(worse, high + half + node - better_high, better_high)
    return low, high, tl.where(worse, node + half, node), count, total


@triton.jit
def count_gates(tree, low, high, bound, TILE: tl.constexpr):
    """Of the entries u of [low, high) with u - 1 >= bound, then of those with u > bound: how many there are, their sum,
    and how many the whole row has.

    Scores are compared in the dtype of `bound`. The two ways down the tree go side by side: each
    step waits for its reads, so two wait together.
    """
    ends, sums, ranked, length, levels, span = tree
    node = tl.zeros_like(low)
    ones = (low, high, node, node, low.to(tl.float64) * 0)
    reached = ones
    size = span
    for _ in range(levels):
        size = size >> 1
        ones = _count_step((ends, sums, ranked), length, size, ones, bound, TILE, True)
        reached = _count_step((ends, sums, ranked), length, size, reached, bound, TILE, False)
        ends += length
        sums += length
    return ones[3], ones[4], ones[2], reached[3], reached[4], reached[2]


@triton.jit
def _is_rank(ranked, length, rank, bound, SHIFTED: tl.constexpr):
    """Whether `rank` scores of the row are above a bound."""
    last = tl.load(ranked + rank - 1, mask=rank > 0, other=float("inf"))
    following = tl.load(ranked + rank, mask=rank < length, other=float("nan"))
    return _is_above(last, bound, SHIFTED) & (_is_above(following, bound, SHIFTED) == 0)


@triton.jit
def same_gates(tree, ones_rank, reached_rank, bound):
    """Whether `count_gates` would count the same for this bound, as no score of the row lies in between."""
    _ends, _sums, ranked, length, _levels, _span = tree
    return _is_rank(ranked, length, ones_rank, bound, True) & _is_rank(ranked, length, reached_rank, bound, False)


@triton.jit
def candidate_range(query, start, carry_positions, carried, carry_steps, halo, window):
    """The places [low, high) in the table of a query's candidates: positions start to query - window.

    The carried entries come first, by position (`carry_positions` [carried]); then the stream, whose first entry is
    at position -halo. `carry_steps` is bit_length(carried).
    """
    before = start < -halo
    first = query * 0
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
