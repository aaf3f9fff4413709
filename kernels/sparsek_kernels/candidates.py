"""The candidates of every query of a chunk, without a list per query.

All queries of a chunk choose from one ranked list: what was carried into the chunk and what enters during it. How many
of a query's own candidates stand among the first r entries, and what they sum to, is all that its thresholds need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.carry import NOWHERE, rank


@dataclass(frozen=True)
class Bound:
    """A place in the total order (score, position): entries at or above it are in."""

    scores: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Candidates:
    """The candidates of all queries of some chunks, ranked once per chunk; each query's own are a subset.

    What was carried into the chunk belongs to all queries of the first one's document alike; only the B tokens that
    enter during the chunk need a table per query. Running counts and sums of both add up at any rank.
    """

    scores: Tensor
    """[b, g, c, m], best first; entries of nobody repeat the worst."""
    positions: Tensor
    """[b, g, c, m]."""
    carried: tuple[Tensor, Tensor]
    """Running count and sum [b, g, c, m + 1] of the carried entries."""
    entered_rank: Tensor
    """[b, g, c, m + 1]: how many of the first r entries have entered during the chunk."""
    entered: tuple[Tensor, Tensor]
    """Running count and sum [b, g, c, B, B + 1] over the entered entries alone."""
    sees_carried: Tensor
    """[b, 1, c, B] bool."""

    def count(self, rank: Tensor) -> Tensor:
        """How many of the first `rank` entries are candidates of each query; all [b, g, c, B]."""
        return self._at(rank, 0)

    def sum_(self, rank: Tensor) -> Tensor:
        """Their sum, float64."""
        return self._at(rank, 1)

    def _at(self, rank: Tensor, which: int) -> Tensor:
        carried = self.carried[which].gather(-1, rank)
        index = self.entered_rank.gather(-1, rank).unsqueeze(-1)
        return torch.where(self.sees_carried, carried, 0) + self.entered[which].gather(-1, index).squeeze(-1)

    def rank_of(self, n: int, like: Tensor) -> Tensor:
        """[b, g, c, B]: the shortest beginning of the list that holds n of the query's candidates; m if none does."""
        length = self.scores.shape[-1]
        low, high = torch.zeros_like(like), torch.full_like(like, length)
        for _ in range(length.bit_length()):
            middle = (low + high) // 2
            enough = self.count(middle) >= n
            low, high = torch.where(enough, low, (middle + 1).clamp_max(length)), torch.where(enough, middle, high)
        return high

    def bound(self, n: int, rank: Tensor, total: Tensor) -> Bound:
        """Score and position of each query's n-th best. With fewer, all are above the bound; with n = 0, none."""
        index = (rank - 1).clamp_min(0)
        exists = (total >= n) & (rank > 0)
        score = torch.where(exists, self.scores.gather(-1, index), torch.inf if n == 0 else -torch.inf)
        return Bound(score, torch.where(exists, self.positions.gather(-1, index), NOWHERE))


def rank_candidates(
    table: Tensor, positions: Tensor, starts: Tensor, carried: Tensor, first: int, window: int
) -> Candidates:
    """Candidates of some chunks of queries.

    Args:
        table: scores [b, g, S + w - 1 + s], carried entries first; likewise positions.
        starts: [b, chunks, B], where each query's document begins.
        carried: [b, g, c, S], index into the table of what each chunk begins with, -1 for none.
        first: the chunk that carried[:, :, 0] belongs to.
        window: w.
    """
    (b, g, num_chunks, support), size = carried.shape, starts.shape[2]
    begin = torch.arange(first, first + num_chunks, device=table.device).unsqueeze(-1) * size
    offsets = torch.arange(size, device=table.device)
    # The latest first, so that ties fall as they should.
    pool = torch.cat([(support + begin + offsets.flip(0)).expand(b, g, -1, -1), carried], dim=-1)
    filled = (pool >= 0) & (pool < table.shape[-1])
    flat = torch.where(filled, pool, 0).flatten(2)
    pool_scores, where = (x.gather(-1, flat).view_as(pool) for x in (table, positions))
    ranked, order = rank(pool_scores, filled, pool.shape[-1])
    exists = ranked > -torch.inf
    # Entries of nobody must not bring infinities into the corners of the threshold.
    ranked = torch.where(exists, ranked, torch.where(exists, ranked, torch.inf).amin(-1, keepdim=True))
    is_entered = order < size
    is_carried = exists & ~is_entered

    entered_order = rank(pool_scores[..., :size], filled[..., :size], size)[1]
    entered_scores = pool_scores[..., :size].gather(-1, entered_order).double().unsqueeze(-2)
    at = where[..., :size].gather(-1, entered_order).unsqueeze(-2)
    queries, since = (begin + offsets).unsqueeze(-1), starts[:, first : first + num_chunks].unsqueeze(1)
    # Slots beyond the end of the stream hold another entry's score, but no query of the chunk has them as candidates.
    candidate = (at <= queries - window) & (at >= since.unsqueeze(-1))
    candidate &= filled[..., :size].gather(-1, entered_order).unsqueeze(-2)

    def running(x: Tensor) -> Tensor:
        return F.pad(x.cumsum(-1), (1, 0))

    return Candidates(
        scores=ranked,
        positions=where.gather(-1, order),
        carried=(running(is_carried), running(torch.where(is_carried, ranked, 0).double())),
        entered_rank=running(is_entered),
        entered=(running(candidate), running(torch.where(candidate, entered_scores, 0))),
        sees_carried=since == since[..., :1],
    )
