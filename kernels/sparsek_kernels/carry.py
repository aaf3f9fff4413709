"""What the tokens before a shard leave behind: a summary of constant size, because "top-S of a prefix" is a monoid.

top-S(A + B) = top-S(top-S(A) + top-S(B)). So the state that queries need of ANY number of earlier tokens is the S best
scores with their positions, and the keys and values of the k best of them. Chunks of one process and shards of many
pass on the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -(1 << 62)
"""Position of an empty slot: before the start of every document, hence visible to no query."""


@dataclass(frozen=True)
class Carry:
    """Best candidates of all tokens before a shard, best first; empty slots have score -inf, position NOWHERE."""

    scores: Tensor
    """[b, g, S]."""
    positions: Tensor
    """[b, g, S] int64, counted from the shard's first query: all negative."""
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


def summarize(
    key: Tensor, value: Tensor, scores: Tensor, document_start: Tensor, *, num_selected: int, support: int
) -> Carry:
    """What this shard's own candidates leave behind for later shards. Differentiable in key, value and scores.

    Candidates are the tokens that have left the window by the end of the shard; only those of the last query's
    document can matter later.

    Args:
        key: [b, w - 1 + s, g, d], halo first; likewise value.
        scores: [b, w - 1 + s, g].
        document_start: [b, s], counted from the first query.

    Returns:
        A carry whose positions are counted from this shard's first query (the receiver shifts them).
    """
    length, halo = document_start.shape[1], scores.shape[1] - document_start.shape[1]
    latest_first = scores[:, :length].transpose(1, 2).flip(-1)
    positions = torch.arange(length - 1, -1, -1, device=scores.device) - halo
    eligible = (positions >= document_start[:, -1:]).unsqueeze(1).expand(latest_first.shape)
    best, index = rank(latest_first, eligible, min(support, length))
    filled = best > -torch.inf
    pairs = (length - 1 - index[..., :num_selected]).unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
    summary = Carry(
        scores=torch.where(filled, latest_first.gather(-1, index), -torch.inf),
        positions=torch.where(filled, positions[index], NOWHERE),
        key=key.transpose(1, 2).gather(2, pairs),
        value=value.transpose(1, 2).gather(2, pairs),
    )
    return _fill(summary, num_selected, support)


def merge(parts: Carry, document_start: Tensor, *, num_selected: int, support: int) -> Carry:
    """The best of several summaries laid side by side, for the document that the receiver's first query is in.

    Args:
        parts: fields [b, g, P * S] and [b, g, P * k, d]: P summaries, each sorted, the LATEST shard's first, positions
            counted from the receiver's first query.
        document_start: [b, s] of the receiver.
    """
    eligible = parts.positions >= document_start[:, :1].unsqueeze(1)
    best, index = rank(parts.scores, eligible, support)
    filled = best > -torch.inf
    # A pair among the k best of all is among the k best of its own summary: entry (part, rank) has rank < k.
    chosen = index[..., :num_selected]
    pairs = torch.where(filled[..., :num_selected], chosen // support * num_selected + chosen % support, 0)
    pairs = pairs.unsqueeze(-1).expand(-1, -1, -1, parts.key.shape[-1])
    return Carry(
        scores=torch.where(filled, parts.scores.gather(-1, index), -torch.inf),
        positions=torch.where(filled, parts.positions.gather(-1, index), NOWHERE),
        key=parts.key.gather(2, pairs),
        value=parts.value.gather(2, pairs),
    )


def _fill(carry: Carry, num_selected: int, support: int) -> Carry:
    """Pads with empty slots to S scores and k pairs, so that every summary has the same shape."""
    entries, pairs = support - carry.scores.shape[-1], num_selected - carry.key.shape[2]
    pad = torch.nn.functional.pad
    return Carry(
        scores=pad(carry.scores, (0, entries), value=-torch.inf),
        positions=pad(carry.positions, (0, entries), value=NOWHERE),
        key=pad(carry.key, (0, 0, 0, pairs)),
        value=pad(carry.value, (0, 0, 0, pairs)),
    )
