"""Who is visible to whom, in O(n) memory: one interval of queries per key, one threshold per query.

Along a document neither the k-th best score nor tau ever falls, so a pair that drops out never returns: key j is
visible to exactly the queries [j, visible_until_j), first through the window, then by selection, and its gate is
fractional during one interval too. The whole n x n mask is two integers per key and one number per query.

The work is a scan over chunks of queries that carries the S best candidates, then, for all chunks at once, the
thresholds of each query, then one binary search per key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.candidates import Bound, Candidates, rank_candidates
from sparsek_kernels.carry import NOWHERE, Best, rank
from sparsek_kernels.threshold import solve_threshold

MAX_ELEMENTS = 1 << 22
"""Entries of the largest temporary: chunks are worked on in groups that stay below it."""


@dataclass(frozen=True)
class Selection:
    """Positions and query indices count from the shard's first query. Keys stand in stream order: halo, then shard."""

    tau: Tensor
    """[b, g, s]: gate_ij = clip(u_j - tau_i, 0, 1); -inf where at most k candidates exist."""
    visible_until: Tensor
    """[b, g, S + w - 1 + s]: the first query that key j is not visible to; carried entries first."""
    fractional_from: Tensor
    """[b, g, S + w - 1 + s]: first query for which 0 < gate < 1 within the support."""
    fractional_until: Tensor
    """[b, g, S + w - 1 + s]: the query after the last such."""
    num_fractional: Tensor
    """[b, g, s]: entries of query i's support with 0 < gate < 1."""
    support_size: Tensor
    """[b, g, s]: entries of query i's support with gate > 0."""
    selected_mass: Tensor
    """[b, g, s]: sum of the gates of the k selected pairs (k, if all mass of the projection is on them)."""
    alive: Tensor
    """[b, g, c, k]: index into (carry, stream) of the candidates of chunk c's first query that it selects; -1: none."""


def select(
    scores: Tensor,
    *,
    num_selected: int,
    window: int,
    support: int,
    document_start: Tensor | None = None,
    carry: Best | None = None,
    chunk_size: int = 64,
) -> Selection:
    """Selects for every query of a shard.

    Args:
        scores: [b, g, t], finite: of the shard's s tokens, preceded by those of the halo (t = w - 1 + s) if there is
            one. Without document_start, t = s and there is no halo.
        document_start: [b, s] index, counted from the first query, of the first token of each query's document.
        carry: best candidates of earlier shards.
    """
    b, g, length = scores.shape
    if document_start is None:
        document_start = torch.zeros(b, length, dtype=torch.int64, device=scores.device)
    s = document_start.shape[1]
    if scores.shape[-1] == s:
        scores = F.pad(scores, (window - 1, 0))
    assert scores.shape[-1] == window - 1 + s, "the halo holds w - 1 tokens"
    if carry is None:
        support = min(support, s)
        carry_scores = scores.new_full((b, g, support), -torch.inf)
        carry_positions = torch.full(carry_scores.shape, NOWHERE, device=scores.device)
    else:
        carry_scores, carry_positions = carry.scores.detach(), carry.positions
    # Adding 0.0 turns -0.0 into 0.0: equal scores, then equal bits.
    table = torch.cat([carry_scores, scores.detach()], dim=-1) + 0.0
    stream = torch.arange(scores.shape[-1], device=scores.device) - (window - 1)
    positions = torch.cat([carry_positions, stream.expand(b, g, -1)], dim=-1)

    starts = _pad_queries(document_start, chunk_size)
    carried = _scan(table, positions, starts, support=support)
    group = max(1, MAX_ELEMENTS // (b * g * chunk_size * chunk_size))
    groups = [
        _thresholds(
            rank_candidates(table, positions, starts, carried[:, :, low : low + group], low, window),
            num_selected=num_selected,
            support=support,
        )
        for low in range(0, carried.shape[2], group)
    ]
    per_query = {name: torch.cat([part[name] for part in groups], dim=2).flatten(2, 3)[:, :, :s] for name in groups[0]}
    theta = Bound(per_query.pop("theta_score"), per_query.pop("theta_position"))
    sigma = Bound(per_query.pop("sigma_score"), per_query.pop("sigma_position"))
    intervals = _intervals(table, positions, document_start, theta, sigma, per_query["tau"], window=window)
    return Selection(alive=carried[..., :num_selected], **per_query, **intervals)


def _pad_queries(document_start: Tensor, chunk_size: int) -> Tensor:
    """[b, s] -> [b, c, B]: the last chunk is filled up with one-token documents, which see only themselves."""
    b, s = document_start.shape
    extra = torch.arange(s, -(-s // chunk_size) * chunk_size, device=document_start.device)
    return torch.cat([document_start, extra.expand(b, -1)], dim=1).view(b, -1, chunk_size)


def _scan(table: Tensor, positions: Tensor, starts: Tensor, *, support: int) -> Tensor:
    """[b, g, c, S]: index into the table of the best candidates of each chunk's first query; -1 for an empty slot.

    A chunk of B queries turns B tokens of the stream into candidates; they merge with those carried so far.
    """
    b, num_chunks, chunk_size = starts.shape
    newest_first = torch.arange(chunk_size - 1, -1, -1, device=table.device)
    state = torch.arange(support, device=table.device).expand(b, table.shape[1], -1)
    carried = []
    for chunk in range(num_chunks):
        if chunk > 0:
            entered = support + (chunk - 1) * chunk_size + newest_first
            state = torch.cat([entered.expand(*state.shape[:2], -1), state], dim=-1)
        eligible = positions.gather(-1, state) >= starts[:, chunk, :1].unsqueeze(1)
        best, index = rank(table.gather(-1, state), eligible, support)
        state = state.gather(-1, index)
        carried.append(torch.where(best > -torch.inf, state, -1))
    return torch.stack(carried, dim=2)


def _thresholds(candidates: Candidates, *, num_selected: int, support: int) -> dict[str, Tensor]:
    """What each query of some chunks selects: fields [b, g, c, B]."""
    (b, g, c, m), size = candidates.scores.shape, candidates.sees_carried.shape[-1]
    end = torch.full((b, g, c, size), m, dtype=torch.int64, device=candidates.scores.device)
    total = candidates.count(end)
    limit = candidates.rank_of(support, end)
    theta_rank = candidates.rank_of(num_selected, end)

    def count(rank: Tensor) -> Tensor:
        return candidates.count(torch.minimum(rank, limit))

    def sum_(rank: Tensor) -> Tensor:
        return candidates.sum_(torch.minimum(rank, limit))

    scores = candidates.scores
    if num_selected == 0:
        tau = torch.full(end.shape, torch.inf, dtype=scores.dtype, device=scores.device)
    else:
        tau = solve_threshold(scores, total, num_selected, count=count, sum_=sum_).to(scores.dtype)
    ones = torch.searchsorted(1 - scores, -tau, right=True)
    num_ones, size_ = count(ones), count(torch.searchsorted(-scores, -tau))
    ones_selected = torch.minimum(ones, theta_rank)
    interior = count(theta_rank) - count(ones_selected)
    shifted = sum_(theta_rank) - sum_(ones_selected) - tau.double() * interior
    theta, sigma = candidates.bound(num_selected, theta_rank, total), candidates.bound(support, limit, total)
    return {
        "theta_score": theta.scores,
        "theta_position": theta.positions,
        "sigma_score": sigma.scores,
        "sigma_position": sigma.positions,
        "tau": tau,
        "num_fractional": size_ - num_ones,
        "support_size": size_,
        "selected_mass": (count(ones_selected) + torch.where(interior > 0, shifted, 0)).to(scores.dtype),
    }


def _intervals(
    table: Tensor,
    positions: Tensor,
    document_start: Tensor,
    theta: Bound,
    sigma: Bound,
    tau: Tensor,
    *,
    window: int,
) -> dict[str, Tensor]:
    """For every entry of the table, the intervals of queries that see it and that see it fractionally."""
    b, g, _ = table.shape
    starts = document_start.unsqueeze(1).expand(b, g, -1).contiguous()
    document_end = torch.searchsorted(starts, positions, right=True)
    candidate_from = torch.minimum((positions + window).clamp_min(0), document_end)

    def below(bound: Bound, query: Tensor) -> Tensor:
        score, position = bound.scores.gather(-1, query), bound.positions.gather(-1, query)
        return (table < score) | ((table == score) & (positions < position))

    def first(crossed: Callable[[Tensor], Tensor]) -> Tensor:
        return _first_query(candidate_from, document_end, crossed)

    fractional_from = first(lambda query: table - 1 < tau.gather(-1, query))
    fractional_until = first(lambda query: (table <= tau.gather(-1, query)) | below(sigma, query))
    return {
        "visible_until": first(lambda query: below(theta, query)),
        "fractional_from": fractional_from,
        "fractional_until": torch.maximum(fractional_from, fractional_until),
    }


def _first_query(low: Tensor, high: Tensor, crossed: Callable[[Tensor], Tensor]) -> Tensor:
    """Smallest query in [low, high) for which `crossed` holds, or high; `crossed` never turns false again."""
    for _ in range(int((high - low).max()).bit_length()):
        middle = (low + high) // 2
        is_open = low < high
        true = crossed(torch.where(is_open, middle, 0))
        high = torch.where(is_open & true, middle, high)
        low = torch.where(is_open & ~true, middle + 1, low)
    return high
