"""The threshold tau of SPARSEK, exactly and for many entry sets at once.

SPARSEK(z, k) = clip(z - tau, 0, 1) with tau such that the sum is k (arXiv 2406.16747; definition in kernels/README.md).
f(tau) = sum clip(z - tau, 0, 1) falls piecewise linearly; its corners are the entries z and z - 1. So: find the two
neighbouring corners between which f passes k by bisection over the sorted corners, then solve the one linear equation
between them. Everything is exact up to rounding; nothing iterates to a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def solve_threshold(
    ranked: Tensor,
    total: Tensor,
    num_selected: int,
    *,
    count: Callable[[Tensor], Tensor],
    sum_: Callable[[Tensor], Tensor],
) -> Tensor:
    """tau for q subsets of the same m ranked entries.

    Args:
        ranked: [..., m] entries, best first, finite.
        total: [..., q], the number of entries in each subset.
        num_selected: k >= 1. Subsets of at most k entries have no threshold: -inf.
        count: ranks [..., q] -> how many of the first `rank` entries belong to each subset.
        sum_: ranks [..., q] -> the sum of those entries, float64.

    Returns:
        [..., q] float64. Where f is flat at k (hard top-k), the lower end of the flat part.
    """
    ranked = ranked.double()
    corners = torch.cat([ranked, ranked - 1], dim=-1).sort(dim=-1, descending=True).values
    reached = _count_at_least(ranked, corners)
    saturated = _count_at_least(ranked - 1, corners)

    def at(corner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number and sum of the entries strictly between 0 and 1 just below a corner, number of ones, the corner."""
        low, high = saturated.gather(-1, corner), reached.gather(-1, corner)
        ones = count(low)
        return count(high) - ones, sum_(high) - sum_(low), ones, corners.gather(-1, corner)

    # Invariant: f(corners[first]) <= k, and f(corners[last + 1]) > k if that corner exists.
    first = torch.zeros_like(total, dtype=torch.int64)
    last = torch.full_like(first, corners.shape[-1] - 1)
    for _ in range(corners.shape[-1].bit_length()):
        middle = (first + last + 1) // 2
        interior, inside, ones, corner = at(middle)
        below = ones + inside - corner * interior <= num_selected
        first, last = torch.where(below, middle, first), torch.where(below, last, middle - 1)
        last = torch.maximum(first, last)

    interior, inside, ones, corner = at(first)
    sloped = (inside - (num_selected - ones)) / interior.clamp_min(1)
    tau = torch.where(interior > 0, sloped, corner)
    return torch.where(total > num_selected, tau, -torch.inf)


def _count_at_least(ranked: Tensor, bounds: Tensor) -> Tensor:
    """For each bound, how many entries of the descending `ranked` are >= it."""
    return torch.searchsorted((-ranked).contiguous(), (-bounds).contiguous(), right=True)
