"""What a decoding step does to the state of one KV head: who is replaced, the new threshold, and the writing of it.

Deciding reads a few kilobytes of scores and writes nothing, so every program of a head can do it for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

TRUSTED = tl.constexpr(8)
"""Steps of Newton's method that may leave the bracket wide."""
MOST_STEPS = tl.constexpr(48)
MOST_POSITIONS = tl.constexpr(8192)
"""Positions that registers hold beside as many scores. Of more, a part at a time is looked at."""
PART = tl.constexpr(4096)


@triton.jit
def _earlier(position, slot, other_position, other_slot):
    first = (position < other_position) | ((position == other_position) & (slot < other_slot))
    return tl.where(first, position, other_position), tl.where(first, slot, other_slot)


@triton.jit
def _earliest(tied, positions, index):
    """The earliest position and its slot, of those slots that are tied."""
    position = tl.load(positions + index, mask=tied, other=9223372036854775807)
    return tl.reduce((position, tl.where(tied, index, 2147483647)), 0, _earlier)


@triton.jit
def _worst(scores, table, positions, index, size: tl.constexpr):
    """The lowest score and the slot of its earliest position; scores: [m] of the table, +inf from `size` on."""
    lowest = tl.min(scores, 0)
    if scores.shape[0] <= MOST_POSITIONS:
        _, slot = _earliest(scores == lowest, positions, index)
    else:
        position, slot = tl.full([], 9223372036854775807, tl.int64), tl.full([], 2147483647, tl.int32)
        for begin in range(0, size, PART):
            part = begin + tl.arange(0, PART)
            tied = tl.load(table + part, mask=part < size, other=float("inf")) == lowest
            other, other_slot = _earliest(tied, positions, part)
            position, slot = _earlier(position, slot, other, other_slot)
    return lowest, slot


@triton.jit
def _add_both(one, other, more_of_one, more_of_other):
    return one + more_of_one, other + more_of_other


@triton.jit
def _solve(entries, begin, k: tl.constexpr):
    """tau in [-1, 0] with sum clip(entries - tau, 0, 1) = k, where the k-th best entry is 0; begin: a guess.

    Newton's method: exact, but for rounding, once a step has led to the linear piece that it started from. For random
    scores that takes 1 to 3 steps from the tau of the token before, 3 to 6 from the middle. If halving came in whenever
    a step does not halve the bracket, they were 20: so it does only after TRUSTED steps, where it ends them.
    """
    low = -1.0
    high = 0.0
    tau = begin
    piece = -1
    steps = 0
    while steps < MOST_STEPS:
        above = entries - tau
        is_one = above >= 1.0
        inside = (above > 0.0) & (above < 1.0)
        # Two counts in one number: both are below 2^15. They tell the linear piece.
        each = tl.where(is_one, 1, tl.where(inside, 65536, 0))
        counts, part = tl.reduce((each, tl.where(inside, above, 0.0)), 0, _add_both)
        interior = (counts // 65536).to(tl.float32)
        excess = part + ((counts % 65536) - k).to(tl.float32)
        width = high - low
        low = tl.where(excess >= 0.0, tau, low)
        high = tl.where(excess >= 0.0, high, tau)
        newton = tau + excess / tl.maximum(interior, 1.0)
        trusted = (newton >= low) & (newton <= high)
        narrowed = (steps < TRUSTED) | (high - low <= 0.5 * width)
        done = (excess == 0.0) | (newton == tau) | (high - low <= 1.2e-7) | (counts == piece)
        piece = tl.where(trusted & narrowed, counts, -1)
        following = tl.where(trusted & narrowed, newton, 0.5 * (low + high))
        tau = tl.where(done, tl.where(trusted, newton, tau), following)
        steps = tl.where(done, MOST_STEPS, steps + 1)
    return tau


@triton.jit
def _threshold(
    candidate, exists, selected, support, support_scores, support_positions, last, K: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """tau once the candidate has taken its place; `selected`, the scores of the new k best, +inf beyond them.

    last: the tau of some step before, or -inf.
    """
    index = tl.arange(0, support.shape[0])
    full = tl.where(index < S, support, float("inf"))
    lowest, slot = _worst(full, support_scores, support_positions, index, S)
    enters = exists & (candidate >= lowest)
    support = tl.where((index == slot) & enters, candidate, support)
    tau = float("-inf")
    if tl.sum((support > float("-inf")).to(tl.int32), 0) > K:
        # tau lies within 1 below the k-th best: measured from there, the sums are small and exact.
        centre = tl.min(selected, 0)
        entries = tl.minimum(tl.maximum(support - centre, -1.0), 1.0)
        begin = last - centre
        tau = centre + _solve(entries, tl.where((begin > -1.0) & (begin < 0.0), begin, -0.5), K)
    return tau


@triton.jit
def decide(
    position, start, old_scores, selected_positions, support_scores, support_positions, last_tau,
    W: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    GATE_VALUE: tl.constexpr,
):  # fmt: skip
    """Whether the pair that leaves the window is selected, the slot of the pair that it replaces, and the new tau."""
    candidate = tl.load(old_scores + position % W)
    exists = position - W >= start
    admitted = exists & (K > 0)
    evicted = 0
    tau = float("-inf")
    if K > 0:
        index = tl.arange(0, BLOCK_K)
        selected = tl.load(old_scores + W + index, mask=index < K, other=float("inf"))
        lowest, evicted = _worst(selected, old_scores + W, selected_positions, index, K)
        admitted = exists & (candidate >= lowest)
        if GATE_VALUE:
            support_index = tl.arange(0, BLOCK_S)
            support = tl.load(support_scores + support_index, mask=support_index < S, other=float("-inf"))
            selected = tl.where((index == evicted) & admitted, candidate, selected)
            last = tl.load(last_tau)
            tau = _threshold(candidate, exists, selected, support, support_scores, support_positions, last, K, S)
    return exists, admitted, evicted, tau


@triton.jit
def update(
    key, value, score, old_key, old_value, old_scores, selected_positions, support_scores, support_positions,
    slot, leaving, exists, admitted, evicted,
    W: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the state of one KV head; key and value point at the new token's, the others at the head's tables."""
    d, index = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    candidate = tl.load(old_scores + slot)
    support = tl.load(support_scores + index, mask=index < S, other=float("inf"))
    leaving_key = tl.load(old_key + slot * D + d, mask=d < D)
    leaving_value = tl.load(old_value + slot * D + d, mask=d < D)
    new_key, new_value = tl.load(key + d, mask=d < D), tl.load(value + d, mask=d < D)
    if admitted:
        target = (W + evicted) * D + d
        tl.store(old_key + target, leaving_key, mask=d < D)
        tl.store(old_value + target, leaving_value, mask=d < D)
        tl.store(old_scores + W + evicted, candidate)
        tl.store(selected_positions + evicted, leaving)
    if S > 0:
        lowest, worst = _worst(support, support_scores, support_positions, index, S)
        if exists & (candidate >= lowest):
            tl.store(support_scores + worst, candidate)
            tl.store(support_positions + worst, leaving)
    tl.debug_barrier()
    tl.store(old_key + slot * D + d, new_key, mask=d < D)
    tl.store(old_value + slot * D + d, new_value, mask=d < D)
    tl.store(old_scores + slot, score)
