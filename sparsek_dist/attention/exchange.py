"""What a shard needs of the shards before it, and nothing else: a halo and a carry, both of constant size.

Halo: keys, values and scores of the left neighbour's last w - 1 tokens, point to point. Carry: of all candidates
further left, the S best scores and the k best pairs. Every rank summarises its own candidates, and the carry of rank r
is the merge of the summaries of the ranks before it: exact, because the best of a prefix are among the best of its
parts (sparsek_kernels/carry). Summaries reach later ranks in one of two ways: `all_gather` or `scan`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsek_dist.parallel.comm import gather_all, receive
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Carry, empty_carry, merge, summarize
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


def add_halo(pairs: Tensor, scores: Tensor, width: int, group: RankGroup) -> tuple[Tensor, Tensor]:
    """The left neighbour's last tokens in front, zeros on the first rank.

    Args:
        pairs: [b, s, g, 2d] -> [b, width + s, g, 2d].
        scores: [b, s, g] -> [b, width + s, g].
    """
    assert group.size == 1 or pairs.shape[1] >= width, "Config refuses shards shorter than the window"
    parts = (pairs, scores)
    if group.size == 1 or width == 0:
        halo = tuple(x.new_zeros(x.shape[0], width, *x.shape[2:]) for x in parts)
    else:
        halo = receive([x[:, -width:] for x in parts], group, distance=1, kind="halo")
    with_halo = [torch.cat([left, x], dim=1) for left, x in zip(halo, parts, strict=True)]
    return with_halo[0], with_halo[1]


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
) -> Carry:
    """The merged summary of all ranks before this one. Differentiable: gradients return to the tokens' owners.

    Args:
        key: [b, w - 1 + s, g, d] with its halo; likewise value.
        scores: [b, w - 1 + s, g].
        document_start: [b, s], counted from this shard's first query.
        exchange: how summaries travel.
    """
    sizes = {"num_selected": num_selected, "support": support}
    if group.size == 1 or num_selected == 0:
        return empty_carry(key, scores, **sizes)
    own = summarize(key, value, scores, document_start, **sizes)
    if resolve_exchange(exchange, group.size) == "all_gather":
        earlier = _gather_earlier(own, document_start.shape[1], group)
    else:
        earlier = _scan_earlier(own, document_start, group)
    return merge(_side_by_side(earlier), document_start[:, :1], **sizes)


def _gather_earlier(own: Carry, length: int, group: RankGroup) -> list[Carry]:
    """Every rank's summary on every rank, the latest first; those that are not earlier are blank.

    Blanked, not left out: every rank then builds the same graph, and so takes part in the same collectives of the
    backward pass.
    """
    gathered = gather_all(_to_wire(own), group, kind="carry")
    parts = []
    for sender in reversed(range(group.size)):
        part = _from_wire(tuple(x[sender] for x in gathered), shift=(sender - group.rank) * length)
        parts.append(part if sender < group.rank else _blank(part))
    return parts


def _scan_earlier(own: Carry, document_start: Tensor, group: RankGroup) -> list[Carry]:
    """An exclusive prefix scan by recursive doubling: ceil(log2 p) summaries of all earlier ranks, latest first.

    Before the round of distance D, `mine` is the merge of the D ranks (r - D, r], or of all there are; the round
    brings that of (r - 2D, r - D]. So what arrives over the rounds, at distances 1, 2, 4, .., are neighbouring runs
    of 1, 2, 4, .. ranks, and each rank is in exactly one.

    A merge on the way drops what stands before the document of this shard's LAST query. That is right: every receiver
    is further right and can only be in that document or in a later one. And it is needed: a summary has room for S, and
    high scores of a document that has ended would push out those that a receiver still wants.
    """
    length, mine, arrived, distance = document_start.shape[1], own, [], 1
    sizes = {"num_selected": own.key.shape[2], "support": own.scores.shape[2]}
    while distance < group.size:
        message = receive(_to_wire(mine), group, distance=distance, kind="carry")
        part = _from_wire(message, shift=-distance * length)
        arrived.append(part if group.rank >= distance else _blank(part))
        distance *= 2
        if distance < group.size:
            mine = merge(_side_by_side([mine, arrived[-1]]), document_start[:, -1:], **sizes)
    return arrived


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


def _to_wire(summary: Carry) -> list[Tensor]:
    positions = summary.positions.clamp_min(EMPTY_INT32).to(torch.int32)
    return [summary.scores, torch.cat([summary.key, summary.value], dim=-1), positions]


def _from_wire(message: tuple[Tensor, ...], *, shift: int) -> Carry:
    """A summary whose positions, counted from the sender's first query, are now counted from this rank's."""
    scores, pairs, positions = message
    key, value = pairs.chunk(2, dim=-1)
    return Carry(scores, torch.where(positions > EMPTY_INT32, positions.long() + shift, NOWHERE), key, value)


def _blank(part: Carry) -> Carry:
    """The same tensors in the graph, but no entry that counts."""
    return Carry(part.scores, torch.full_like(part.positions, NOWHERE), part.key, part.value)


def _side_by_side(parts: list[Carry]) -> Carry:
    names = ("scores", "positions", "key", "value")
    return Carry(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in names))
