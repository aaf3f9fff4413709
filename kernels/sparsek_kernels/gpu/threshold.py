"""The thresholds of every query: its k-th and S-th best candidate, and tau.

tau solves f(tau) = sum clip(u - tau, 0, 1) = k over the S best candidates. f falls piecewise linearly, and between
u_(k) - 1 and u_(k+1) strictly, so Newton's steps, kept inside a shrinking bracket, end on the linear piece that holds
the solution, and there they are exact. Each step counts and sums the entries above tau and tau + 1 (queries.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.gpu.queries import candidate_range, count_above, quantile


@triton.jit
def _count_gates(tree, low, high, tau, centre, TILE: tl.constexpr):
    """Number and sum of the candidates with gate 1, and of those with a gate above 0.

    The two ways down the tree go side by side: each step waits for its reads, so two wait together.
    """
    is_one = tl.join(tl.zeros_like(low) == 0, tl.zeros_like(low) != 0)
    count, total = count_above(tree, tl.join(low, low), tl.join(high, high), tl.join(tau, tau), is_one, centre, TILE)
    ones, reached = tl.split(count)
    ones_sum, reached_sum = tl.split(total)
    return ones, ones_sum, reached, reached_sum


@triton.jit
def _solve(tree, low, high, below, above, num_selected, limit, limit_sum, centre, active, TILE: tl.constexpr):
    """tau less the centre, between `below` and `above`; of the `active` queries.

    Args:
        tree, low, high: candidates.
        limit, limit_sum: number and sum of the S best of them.
    """
    tau = (below + above) * 0.5
    step = above - below
    active = active & (step > 0)
    last_ones, last_reached = tl.full(low.shape, -1, tl.int32), tl.full(low.shape, -1, tl.int32)
    while tl.max(active.to(tl.int32), 0) > 0:
        ones, ones_sum, reached, reached_sum = _count_gates(tree, low, high, tau, centre, TILE)
        ones_sum = tl.where(ones < limit, ones_sum, limit_sum)
        reached_sum = tl.where(reached < limit, reached_sum, limit_sum)
        ones, reached = tl.minimum(ones, limit), tl.minimum(reached, limit)
        interior = tl.maximum(reached - ones, 1).to(tl.float64)
        missing = (reached_sum - ones_sum) - (num_selected - ones).to(tl.float64)
        newton = missing / interior
        # f(tau) - k
        excess = missing - tau * interior
        below = tl.where(excess >= 0, tau, below)
        above = tl.where(excess <= 0, tau, above)
        rounding = 1e-15 * (1 + tl.abs(tau))
        # The same entries as before the last Newton step: that step ended on its own piece.
        settled = (ones == last_ones) & (reached == last_reached)
        settled = settled | (tl.abs(newton - tau) <= rounding)
        inside = (newton > below) & (newton < above) & (tl.abs(newton - tau) <= 0.5 * step)
        proposal = tl.where(settled | inside, newton, (below + above) * 0.5)
        stuck = (above - below) <= rounding
        step = tl.where(active, tl.abs(proposal - tau), step)
        tau = tl.where(active, proposal, tau)
        last_ones = tl.where(inside, ones, -1)
        last_reached = tl.where(inside, reached, -1)
        # A NaN score must give NaN, not a kernel that never ends.
        active = active & ((settled | stuck) == 0) & (excess == excess)
    return tau


@triton.jit
def _mass_of(ones, ones_sum, selected, selected_sum, tau, centre):
    """Sum of the gates of the selected, of whom `ones` have gate 1; the sums are of scores less the centre."""
    ones = tl.minimum(ones, selected)
    interior = selected - ones
    shift = tl.where(interior > 0, tau, 0.0).to(tl.float64) - centre
    return ones + tl.where(interior > 0, selected_sum - ones_sum - shift * interior, 0.0)


@triton.jit
def _kth_and_limit(tree, low, high, num_selected, support, centre, TILE: tl.constexpr):
    """Of the k-th, the (k + 1)-th and the S-th best, or the last: rank; sum up to it of scores less the centre."""
    _zeros, _sums, ranked, _length, _levels, _span = tree
    last = high - low - 1
    # Two ways down the tree side by side, as in `_count_gates`.
    nth = tl.join(tl.minimum(tl.maximum(num_selected - 1, 0), last), tl.minimum(support - 1, last))
    ranks, totals = quantile(tree, tl.join(low, low), tl.join(high, high), nth, TILE, True)
    kth, limit = tl.split(ranks)
    kth_sum, limit_sum = tl.split(totals)
    after, _ = quantile(tree, low, high, tl.minimum(num_selected, last), TILE, False)
    kth_sum += tl.load(ranked + kth).to(tl.float64) - centre
    limit_sum += tl.load(ranked + limit).to(tl.float64) - centre
    return kth, kth_sum, after, limit, limit_sum


@triton.jit
def select_kernel(
    ends, sums, ranked, length, levels, span, centre,
    document_start, carry_positions, tau_out, num_fractional, support_size, selected_mass, theta, sigma,
    first_row, heads, s, carried, carry_steps, halo, num_selected, window, support,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each query: tau and what follows from it, and the ranks of its k-th and S-th best (`length` if all are in)."""
    row = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = query < s
    query = tl.minimum(query, s - 1)
    start = tl.load(document_start + (first_row + row) // heads * s + query)
    low, high = candidate_range(query, start, carry_positions + row * carried, carried, carry_steps, halo, window)
    available = high - low
    exists = available > 0
    # Queries without candidates look at the first entry of the stream, and then ignore it.
    low, high = tl.where(exists, low, carried), tl.where(exists, high, carried + 1)
    ends, sums = ends + row * levels * length, sums + row * levels * length
    ranked = ranked + row * length
    tree = (ends, sums, ranked, length, levels, span)
    middle = tl.load(centre + row)
    dtype: tl.constexpr = ranked.dtype.element_ty

    theta_rank, selected_sum, next_rank, sigma_rank, limit_sum = _kth_and_limit(
        tree, low, high, num_selected, support, middle, TILE
    )
    theta_score = tl.load(ranked + theta_rank).to(tl.float64) - middle
    next_score = tl.load(ranked + next_rank)
    limit = tl.minimum(available, support)
    selected = tl.minimum(available, num_selected)

    active = inside & (available > num_selected) & (num_selected > 0)
    next_centred = next_score.to(tl.float64) - middle
    flat = next_centred <= theta_score - 1
    active = active & (flat == 0)
    solution = _solve(
        tree, low, high, theta_score - 1, next_centred, num_selected, limit, limit_sum, middle, active, TILE
    )
    # Where f is flat at k (hard top-k): the lower end of the flat part.
    tau = tl.where(flat, next_score, (solution + middle).to(dtype))
    tau = tl.where(available > num_selected, tau, float("-inf"))
    tau = tl.where(num_selected > 0, tau, float("inf")).to(dtype)

    # Counted in the arithmetic of the gates' own dtype.
    ones, ones_sum, reached, _ = _count_gates(tree, low, high, tau, 0.0, TILE)
    mass = _mass_of(ones, ones_sum, selected, selected_sum, tau, middle)
    ones, reached = tl.minimum(ones, limit), tl.minimum(reached, limit)
    out = row * s + query
    tl.store(tau_out + out, tau, mask=inside)
    tl.store(num_fractional + out, reached - ones, mask=inside)
    tl.store(support_size + out, reached, mask=inside)
    tl.store(selected_mass + out, mass.to(dtype), mask=inside)
    full = tl.where(num_selected > 0, theta_rank, -1)
    tl.store(theta + out, tl.where(available >= num_selected, full, length), mask=inside)
    tl.store(sigma + out, tl.where(available >= support, sigma_rank, length), mask=inside)
