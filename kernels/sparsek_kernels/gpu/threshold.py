"""The thresholds of every query: its k-th and S-th best candidate, and tau.

tau solves f(tau) = sum clip(u - tau, 0, 1) = k over the S best candidates. f falls piecewise linearly, and between
u_(k) - 1 and u_(k+1) strictly, so Newton's steps, kept inside a shrinking bracket, end on the linear piece that holds
the solution, and there they are exact. Each step counts and sums the entries above tau and tau + 1 (queries.py).

Such a count is two ways down the tree, and nearly all that a query costs. So there are as few as can be: Newton starts
from a good guess, ends as soon as the row's neighbouring scores show that a step stayed on its piece, and its last
counts are those of the rounded tau unless a score lies in between. The S-th and the (k + 1)-th best are looked for only
where they matter: if more than S candidates lie above tau, or no more than k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.gpu.queries import candidate_range, count_gates, quantile, same_gates


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _solve(tree, low, high, theta, tau, num_selected, limit, centre, active, TILE: tl.constexpr):
    """tau of the `active` queries, and what is counted there.

    Args:
        tree, low, high: candidates.
        theta, tau: the k-th best score, and a guess above theta - 1 and below theta; less the centre.
        limit: S; it makes no difference if there are fewer candidates.

    Returns:
        tau: less the centre.
        counts: all but the last sum of `count_gates`, at tau or on the same piece.
        after: rank of the (k + 1)-th best where f is flat at k, down to its score (hard top-k); else -1.
        limit_rank: rank of the S-th best; -1 if it did not matter.
    """
    _ends, _sums, ranked, _length, _levels, _span = tree
    below, above = theta - 1, theta
    step = above - below
    active = active & (step > 0)
    ones, reached = tl.zeros_like(low), tl.zeros_like(low)
    ones_sum = low.to(tl.float64) * 0
    ones_rank, reached_rank = ones, ones
    last_ones, last_reached = ones - 1, ones - 1
    after, limit_rank, limit_sum = ones - 1, ones - 1, ones_sum
    while _any(active):
        ones, ones_sum, ones_rank, reached, reached_sum, reached_rank = count_gates(tree, low, high, tau + centre, TILE)
        if _any(active & (limit_rank < 0) & ((reached <= num_selected) | (reached > limit))):
            after, _ = quantile(tree, low, high, tl.minimum(num_selected, high - low - 1), TILE, False)
            limit_rank, limit_sum = quantile(tree, low, high, tl.minimum(limit, high - low) - 1, TILE, True)
            limit_sum += tl.load(ranked + limit_rank).to(tl.float64) - centre
            after_score = tl.load(ranked + after).to(tl.float64) - centre
            after = tl.where(active & (after_score <= theta - 1), after, -1)
            active = active & (after < 0)
            above = tl.minimum(above, after_score)
        inner = tl.minimum(ones, limit)
        inner_sum = tl.where(ones <= limit, ones_sum, limit_sum)
        outer_sum = tl.where(reached <= limit, reached_sum, limit_sum)
        outer = tl.minimum(reached, limit)
        interior = tl.maximum(outer - inner, 1).to(tl.float64)
        missing = (outer_sum - inner_sum) - (num_selected - inner).to(tl.float64)
        newton = missing / interior
        # f(tau) - k
        excess = missing - tau * interior
        below = tl.where(excess >= 0, tau, below)
        above = tl.where(excess <= 0, tl.minimum(tau, above), above)
        rounding = 1e-15 * (1 + tl.abs(tau))
        # The same entries as before the last Newton step, or after this one: it ends on its own piece.
        settled = same_gates(tree, ones_rank, reached_rank, newton + centre)
        settled = settled | ((ones == last_ones) & (reached == last_reached)) | (tl.abs(newton - tau) <= rounding)
        inside = (newton > below) & (newton < above) & (tl.abs(newton - tau) <= 0.5 * step)
        proposal = tl.where(settled | inside, newton, (below + above) * 0.5)
        stuck = (above - below) <= rounding
        step = tl.where(active, tl.abs(proposal - tau), step)
        tau = tl.where(active, proposal, tau)
        last_ones = tl.where(inside, ones, -1)
        last_reached = tl.where(inside, reached, -1)
        # A NaN score must give NaN, not a kernel that never ends.
        active = active & ((settled | stuck) == 0) & (excess == excess)
    return tau, (ones, ones_sum, ones_rank, reached, reached_rank), after, limit_rank


@triton.jit
def _mass_of(ones, ones_sum, selected, selected_sum, tau, centre):
    """Sum of the gates of the selected, of whom `ones` have gate 1; the sums are of scores less the centre."""
    ones = tl.minimum(ones, selected)
    interior = selected - ones
    shift = tl.where(interior > 0, tau, 0.0).to(tl.float64) - centre
    return ones + tl.where(interior > 0, selected_sum - ones_sum - shift * interior, 0.0)


@triton.jit
def select_kernel(
    ends, sums, ranked, length, levels, span, centre,
    document_start, carry_positions, tau_out, num_fractional, support_size, selected_mass, theta, sigma,
    first_row, heads, s, carried, carry_steps, halo, num_selected, window, support,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each query: tau and what follows from it, and the ranks of its k-th and S-th best (`length` if all are in).

    The S-th best is given only to queries with more than S candidates above tau: to others it makes no difference.
    """
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
    selected = tl.minimum(available, num_selected)

    theta_rank, selected_sum = quantile(tree, low, high, tl.maximum(selected - 1, 0), TILE, True)
    theta_score = tl.load(ranked + theta_rank).to(tl.float64) - middle
    selected_sum += theta_score
    out = row * s + query
    full = tl.where(num_selected > 0, theta_rank, -1)
    tl.store(theta + out, tl.where(available >= num_selected, full, length), mask=inside)

    # Scores that fall off from theta like an exponential of this mean have tau a few hundredths from here.
    mean = tl.maximum(selected_sum / tl.maximum(selected, 1) - theta_score, 0.001)
    guess = theta_score - 0.5 * mean / (mean + 0.11)
    has_tau = (available > num_selected) & (num_selected > 0)
    solution, counts, after, limit_rank = _solve(
        tree, low, high, theta_score, guess, num_selected, support, middle, inside & has_tau, TILE
    )
    ones, ones_sum, ones_rank, reached, reached_rank = counts
    # Where f is flat at k: the lower end of the flat part.
    flat = after >= 0
    next_score = tl.load(ranked + after, mask=flat, other=0.0)
    tau = tl.where(flat, next_score, (solution + middle).to(dtype))

    # Counted in the arithmetic of the gates' own dtype; the S-th best is known if it mattered on the way to tau.
    counted = same_gates(tree, ones_rank, reached_rank, tau) & ((reached <= support) | (limit_rank >= 0))
    if _any(inside & has_tau & ((counted == 0) | flat)):
        ones, ones_sum, _, reached, _, _ = count_gates(tree, low, high, tau, TILE)
        limit_rank, _ = quantile(tree, low, high, tl.minimum(support, high - low) - 1, TILE, False)
    sigma_rank = tl.where(reached > support, limit_rank, length)
    all_or_none = tl.where(num_selected > 0, available, 0)
    ones = tl.where(has_tau, tl.minimum(ones, support), all_or_none)
    reached = tl.where(has_tau, tl.minimum(reached, support), all_or_none)
    tau = tl.where(has_tau, tau, tl.where(num_selected > 0, float("-inf"), float("inf"))).to(dtype)
    mass = _mass_of(ones, ones_sum, selected, selected_sum, tau, middle)
    tl.store(tau_out + out, tau, mask=inside)
    tl.store(num_fractional + out, reached - ones, mask=inside)
    tl.store(support_size + out, reached, mask=inside)
    tl.store(selected_mass + out, mass.to(dtype), mask=inside)
    tl.store(sigma + out, tl.where(has_tau, sigma_rank, length), mask=inside)
