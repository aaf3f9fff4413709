"""What the tokens before a shard leave behind: a summary of constant size, because "top-S of a prefix" is a monoid.

top-S(A + B) = top-S(top-S(A) + top-S(B)). So the state that queries need of ANY number of earlier tokens is the S best
scores with their positions, and the keys and values of the k best of them. Chunks of one process and shards of many
pass on the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NOWHERE = -(1 << 62)
"""Position of an empty slot: before the start of every document, hence visible to no query."""


@dataclass(frozen=True)
class Best:
    """Best candidates of some tokens, best first; empty slots have score -inf, position NOWHERE."""

    scores: Tensor
    """[b, g, S]."""
    positions: Tensor
    """[b, g, S] int64, counted from the shard's first query: all negative in what is carried into it."""


@dataclass(frozen=True)
class Carry(Best):
    """The same with the keys and values of the k best."""

    key: Tensor
    """[b, g, k, d], of the first k entries."""
    value: Tensor
    """[b, g, k, d]."""


def empty_carry(key: Tensor, scores: Tensor, *, num_selected: int, support: int) -> Carry:
    """The carry of a shard with nothing before it.

    Args:
        key: [b, t, g, d], for dtype, device and sizes.
        scores: [b, t, g], likewise.
    """
    b, _, g, d = key.shape
    pairs = key.new_zeros(b, g, num_selected, d)
    return Carry(
        scores=scores.new_full((b, g, support), -torch.inf),
        positions=torch.full((b, g, support), NOWHERE, device=key.device),
        key=pairs,
        value=pairs,
    )


def rank(scores: Tensor, eligible: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The `limit` best eligible entries: of two equal scores the LATER position ranks higher.

    Args:
        scores: [..., m], arranged so that later positions of equal score stand first: the sort is stable.
        eligible: [..., m] bool.
        limit: at most m.

    Returns:
        scores [..., limit], best first, -inf where fewer are eligible, and their indices into m.
    """
    masked = torch.where(eligible, scores.detach(), -torch.inf)
    ranked, index = masked.sort(dim=-1, descending=True, stable=True)
    return ranked[..., :limit], index[..., :limit]


def best_of_shard(scores: Tensor, document_start: Tensor, *, num_selected: int, support: int) -> tuple[Best, Tensor]:
    """The best of this shard's own candidates, for later shards, and which tokens the k best are. Scores alone tell.

    Candidates are the tokens that have left the window by the end of the shard; only those of the last query's
    document can matter later.

    Args:
        scores: [b, w - 1 + s, g], halo first.
        document_start: [b, s], counted from the first query.

    Returns:
        The S best, their positions counted from this shard's first query (the receiver shifts them), and the place in
        the stream of the k best [b, g, k]; any place for an empty slot. Differentiable in the scores.
    """
    length, halo = document_start.shape[1], scores.shape[1] - document_start.shape[1]
    latest_first = scores[:, :length].transpose(1, 2).flip(-1)
    positions = torch.arange(length - 1, -1, -1, device=scores.device) - halo
    eligible = (positions >= document_start[:, -1:]).unsqueeze(1).expand(latest_first.shape)
    best, index = rank(latest_first, eligible, min(support, length))
    filled, unused = best > -torch.inf, (0, support - best.shape[-1])
    chosen = torch.where(filled, latest_first.gather(-1, index), -torch.inf)
    found = Best(
        scores=F.pad(chosen, unused, value=-torch.inf),
        positions=F.pad(torch.where(filled, positions[index], NOWHERE), unused, value=NOWHERE),
    )
    rows = length - 1 - index[..., :num_selected]
    return found, F.pad(rows, (0, num_selected - rows.shape[-1]))


def best_of_parts(parts: Best, document_start: Tensor, *, num_selected: int, support: int) -> tuple[Best, Tensor]:
    """The best of several summaries laid side by side, for the document that the receiver's first query is in.

    Args:
        parts: fields [b, g, P * S]: P summaries, each sorted, the LATEST shard's first, positions counted from the
            receiver's first query.
        document_start: [b, s] of the receiver.

    Returns:
        The S best of all, and the rows [b, g, k] of their pairs among P * k pairs laid side by side in the same order.
    """
    eligible = parts.positions >= document_start[:, :1].unsqueeze(1)
    best, index = rank(parts.scores, eligible, support)
    filled = best > -torch.inf
    # A pair among the k best of all is among the k best of its own summary: entry (part, rank) has rank < k.
    chosen = index[..., :num_selected]
    rows = torch.where(filled[..., :num_selected], chosen // support * num_selected + chosen % support, 0)
    found = Best(
        scores=torch.where(filled, parts.scores.gather(-1, index), -torch.inf),
        positions=torch.where(filled, parts.positions.gather(-1, index), NOWHERE),
    )
    return found, rows


def take(pairs: Tensor, rows: Tensor) -> Tensor:
    """pairs [b, g, m, e] at rows [b, g, k] -> [b, g, k, e]."""
    return pairs.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, pairs.shape[-1]))


def summarize(
    key: Tensor, value: Tensor, scores: Tensor, document_start: Tensor, *, num_selected: int, support: int
) -> Carry:
    """`best_of_shard` with the pairs of the k best. Differentiable in key, value and scores.

    Args:
        key: [b, w - 1 + s, g, d], halo first; likewise value.
    """
    best, rows = best_of_shard(scores, document_start, num_selected=num_selected, support=support)
    return Carry(best.scores, best.positions, take(key.transpose(1, 2), rows), take(value.transpose(1, 2), rows))


def merge(parts: Carry, document_start: Tensor, *, num_selected: int, support: int) -> Carry:
    """`best_of_parts` with the pairs of the k best, out of pairs [b, g, P * k, d]."""
    best, rows = best_of_parts(parts, document_start, num_selected=num_selected, support=support)
    return Carry(best.scores, best.positions, take(parts.key, rows), take(parts.value, rows))
