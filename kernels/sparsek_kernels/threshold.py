"""The threshold tau of SPARSEK, exactly and for many entry sets at once.

SPARSEK(z, k) = clip(z - tau, 0, 1) with tau such that the sum is k (arXiv 2406.16747; definition in kernels/README.md).
f(tau) = sum clip(z - tau, 0, 1) falls piecewise linearly; its corners are the entries z and z - 1. So: find the two
neighbouring corners between which f passes k by bisection over the sorted corners, then solve the one linear equation
between them. Everything is exact up to rounding; nothing iterates to a tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_threshold(ranked: Tensor, counts: Tensor, sums: Tensor, num_selected: int) -> Tensor:
    """tau for q subsets of the same m ranked entries.

    Args:
        ranked: [..., m] entries, best first, finite.
        counts: [..., q, m + 1]; counts[q, r] = how many of the first r entries belong to subset q.
        sums: [..., q, m + 1] float64; the sum of those entries.
        num_selected: k >= 1. Subsets of at most k entries have no threshold: -inf.

    Returns:
        [..., q] float64. Where f is flat at k (hard top-k), the lower end of the flat part.
    """
    ranked = ranked.double()
    corners = torch.cat([ranked, ranked - 1], dim=-1).sort(dim=-1, descending=True).values
    reached = _count_at_least(ranked, corners)
    saturated = _count_at_least(ranked - 1, corners)

    def at(corner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number and sum of the entries strictly between 0 and 1 just below a corner, number of ones, the corner."""
        low, high = _take(saturated, corner), _take(reached, corner)
        ones = _take_rows(counts, low)
        interior = _take_rows(counts, high) - ones
        return interior, _take_rows(sums, high) - _take_rows(sums, low), ones, _take(corners, corner)

    # Invariant: f(corners[first]) <= k, and f(corners[last + 1]) > k if that corner exists.
    first = torch.zeros(counts.shape[:-1], dtype=torch.int64, device=counts.device)
    last = torch.full_like(first, corners.shape[-1] - 1)
    for _ in range(corners.shape[-1].bit_length()):
        middle = (first + last + 1) // 2
        interior, total, ones, corner = at(middle)
        below = ones + total - corner * interior <= num_selected
        first, last = torch.where(below, middle, first), torch.where(below, last, middle - 1)
        last = torch.maximum(first, last)

    interior, total, ones, corner = at(first)
    sloped = (total - (num_selected - ones)) / interior.clamp_min(1)
    tau = torch.where(interior > 0, sloped, corner)
    return torch.where(counts[..., -1] > num_selected, tau, -torch.inf)


def _count_at_least(ranked: Tensor, bounds: Tensor) -> Tensor:
    """For each bound, how many entries of the descending `ranked` are >= it."""
    return torch.searchsorted((-ranked).contiguous(), (-bounds).contiguous(), right=True)


def _take(row: Tensor, index: Tensor) -> Tensor:
    """[..., m] at [..., q] -> [..., q]."""
    return row.gather(-1, index)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """[..., q, m] at [..., q] -> [..., q]: one column of each row."""
    return rows.gather(-1, index.unsqueeze(-1)).squeeze(-1)
