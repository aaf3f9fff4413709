"""What a shard needs of the shards before it, and nothing else: a halo and a carry, both of constant size.

Halo: keys, values and scores of the left neighbour's last w - 1 tokens, point to point. Carry: of all candidates
further left, the S best scores and the k best pairs. Every rank summarises its own candidates, and the carry of rank r
is the merge of the summaries of the ranks before it: exact, because the best of a prefix are among the best of its
parts (sparsek_kernels/carry). Summaries reach later ranks in one of two ways: `all_gather` or `scan`. Their scores
travel first; the pairs arrive while the scores already select.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsek_dist.attention.parts import with_rows, with_tail
from sparsek_dist.parallel.comm import gather_all, gather_later, receive, receive_later
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Best, Carry, best_of_parts, best_of_shard, empty_carry, take
from sparsek_kernels.carry import NOWHERE

Exchange = Literal["auto", "all_gather", "scan"]
LARGEST_ALL_GATHER = 8
"""Degree up to which `auto` gathers: p - 1 summaries in one round cost no more there than ceil(log2 p) rounds of one,
and 8 GPUs are what one machine holds (docs/sequence-parallel.md)."""

EMPTY_INT32 = -(1 << 31)
"""NOWHERE on the wire: positions inside a sequence fit into 32 bits."""


def resolve_exchange(exchange: Exchange, degree: int) -> Literal["all_gather", "scan"]:
    """What `auto` stands for at this degree."""
    if exchange == "auto":
        return "all_gather" if degree <= LARGEST_ALL_GATHER else "scan"
    return exchange


def add_halo(key: Tensor, value: Tensor, scores: Tensor, width: int, group: RankGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The left neighbour's last tokens in front, zeros on the first rank.

    Args:
        key: [b, s, g, d] -> [b, width + s, g, d]; likewise value.
        scores: [b, s, g] -> [b, width + s, g].
    """
    if width == 0:
        return key, value, scores
    assert key.shape[1] >= width, "Config refuses shards shorter than the window"
    wholes, tails = zip(*(with_tail(x, width) for x in (key, value, scores)), strict=True)
    halo = receive(tails, group, distance=1, kind="halo")
    key, value, scores = (torch.cat([left, x], dim=1) for left, x in zip(halo, wholes, strict=True))
    return key, value, scores


@dataclass(frozen=True)
class Incoming:
    """What the ranks before this one have to give: their scores are here, their pairs on the way."""

    best: Best
    """The S best scores and their positions."""
    pairs: Callable[[], Tensor]
    """Keys and values side by side [b, g, k, 2d] of the k best, once they are needed. To be called once."""

    def carry(self) -> Carry:
        """All of it: waits for the pairs."""
        key, value = self.pairs().chunk(2, dim=-1)
        return Carry(self.best.scores, self.best.positions, key, value)


def exchange_carry(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    document_start: Tensor,
    group: RankGroup,
    *,
    num_selected: int,
    support: int,
    exchange: Exchange = "auto",
) -> tuple[Tensor, Tensor, Incoming]:
    """The merged summary of all ranks before this one. Differentiable: gradients return to the tokens' owners.

    Scores decide everything, and are few: they travel first, and what they select is worked out while the pairs, most
    of the bytes, are still on their way.

    Args:
        key: [b, w - 1 + s, g, d] with its halo; likewise value.
        scores: [b, w - 1 + s, g].
        document_start: [b, s], counted from this shard's first query.
        exchange: how summaries travel.

    Returns:
        Key and value to go on with (parts.py), and what comes in.
    """
    sizes = {"num_selected": num_selected, "support": support}
    if num_selected == 0:
        nothing = empty_carry(key, scores, **sizes)
        return key, value, Incoming(nothing, lambda: torch.cat([nothing.key, nothing.value], dim=-1))
    own, tokens = best_of_shard(scores, document_start, **sizes)
    (key, key_rows), (value, value_rows) = with_rows(key, tokens), with_rows(value, tokens)
    mine = torch.cat([key_rows, value_rows], dim=-1)
    exchanged = _gather_earlier if resolve_exchange(exchange, group.size) == "all_gather" else _scan_earlier
    earlier, arrive = exchanged(own, mine, document_start, group)
    best, rows = best_of_parts(_side_by_side(earlier), document_start[:, :1], **sizes)
    return key, value, Incoming(best, lambda: take(torch.cat(arrive(), dim=2), rows))


Earlier = tuple[list[Best], Callable[[], list[Tensor]]]
"""Summaries of runs of earlier ranks, the latest first, and, when called, their pairs [b, g, k, 2d] in that order."""


def _gather_earlier(own: Best, mine: Tensor, document_start: Tensor, group: RankGroup) -> Earlier:
    """Every rank's summary on every rank, the latest first; those that are not earlier are blank.

    Blanked, not left out: every rank then builds the same graph, and so takes part in the same collectives of the
    backward pass.
    """
    length = document_start.shape[1]
    gathered = gather_all(_to_wire(own), group, kind="carry")
    # Started second: NCCL carries the messages of a group one after another, so scores would wait for the pairs.
    travelling = gather_later(mine, group, kind="carry")
    parts = []
    for sender in reversed(range(group.size)):
        part = _from_wire(tuple(x[sender] for x in gathered), shift=(sender - group.rank) * length)
        parts.append(part if sender < group.rank else _blank(part))
    # Unbound, not indexed: the gradient of each index would be a table of all p summaries, to be added up.
    return parts, lambda: list(reversed(travelling.wait().unbind()))


def _scan_earlier(own: Best, mine: Tensor, document_start: Tensor, group: RankGroup) -> Earlier:
    """An exclusive prefix scan by recursive doubling: ceil(log2 p) summaries of all earlier ranks, latest first.

    Before the round of distance D, `own` is the merge of the D ranks (r - D, r], or of all there are; the round
    brings that of (r - 2D, r - D]. So what arrives over the rounds, at distances 1, 2, 4, .., are neighbouring runs
    of 1, 2, 4, .. ranks, and each rank is in exactly one.

    A merge on the way drops what stands before the document of this shard's LAST query. That is right: every receiver
    is further right and can only be in that document or in a later one. And it is needed: a summary has room for S, and
    high scores of a document that has ended would push out those that a receiver still wants.

    Pairs take the same rounds, after those of the scores, with the rows that these have told. The first of them travel
    early; the others wait for their merge.
    """
    length, distances = document_start.shape[1], [1 << i for i in range((group.size - 1).bit_length())]
    sizes = {"num_selected": mine.shape[2], "support": own.scores.shape[2]}
    parts, kept = [], []
    for distance in distances:
        message = receive(_to_wire(own), group, distance=distance, kind="carry")
        part = _from_wire(message, shift=-distance * length)
        parts.append(part if group.rank >= distance else _blank(part))
        if distance != distances[-1]:
            own, rows = best_of_parts(_side_by_side([own, parts[-1]]), document_start[:, -1:], **sizes)
            kept.append(rows)
    travelling = receive_later(mine, group, distance=1, kind="carry")

    def arrive() -> list[Tensor]:
        merged, arrived = mine, [travelling.wait()]
        for distance, rows in zip(distances[1:], kept, strict=True):
            merged = take(torch.cat([merged, arrived[-1]], dim=2), rows)
            arrived.append(receive([merged], group, distance=distance, kind="carry")[0])
        return arrived

    return parts, arrive


def received_per_layer(
    degree: int,
    *,
    window: int,
    num_selected: int,
    support: int,
    num_kv_heads: int,
    head_dim: int,
    pair_bytes: int,
    exchange: Exchange = "auto",
) -> int:
    """Bytes the last rank, which receives most, gets in one forward pass of one layer and sequence: no n in it."""
    if degree == 1:
        return 0
    gathers = resolve_exchange(exchange, degree) == "all_gather"
    summaries = degree - 1 if gathers else (degree - 1).bit_length()
    halo = (window - 1) * (2 * head_dim * pair_bytes + 4)
    carry = summaries * (num_selected * 2 * head_dim * pair_bytes + support * 8) if num_selected else 0
    return num_kv_heads * (halo + carry)


def _to_wire(summary: Best) -> list[Tensor]:
    return [summary.scores, summary.positions.clamp_min(EMPTY_INT32).to(torch.int32)]


def _from_wire(message: tuple[Tensor, ...], *, shift: int) -> Best:
    """A summary whose positions, counted from the sender's first query, are now counted from this rank's."""
    scores, positions = message
    return Best(scores, torch.where(positions > EMPTY_INT32, positions.long() + shift, NOWHERE))


def _blank(part: Best) -> Best:
    """The same tensors in the graph, but no entry that counts."""
    return Best(part.scores, torch.full_like(part.positions, NOWHERE))


def _side_by_side(parts: list[Best]) -> Best:
    return Best(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("scores", "positions")))
