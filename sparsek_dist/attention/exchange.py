"""What a shard needs of the shards before it, and nothing else: a halo and a carry, both of constant size.

Halo: keys, values and scores of the left neighbour's last w - 1 tokens, point to point. Carry: of all candidates
further left, the S best scores and the k best pairs. Every rank summarises its own candidates, gathers all summaries
and merges those before it: exact, because the best of a prefix are among the best of its parts (sparsek_kernels/carry).
Per layer and KV head a rank receives 2 d (w - 1 + (p - 1) k) + (p - 1) 2 S numbers and (w - 1) scores, whatever n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_dist.parallel.comm import gather, receive_left
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Carry, empty_carry, merge, summarize
from sparsek_kernels.carry import NOWHERE

EMPTY_INT32 = -(1 << 31)
"""NOWHERE on the wire: positions inside a shard fit into 32 bits."""


def add_halo(x: Tensor, width: int, group: RankGroup) -> Tensor:
    """[b, s, ...] -> [b, width + s, ...]: the left neighbour's last tokens in front; zeros on the first rank."""
    if group.size == 1 or width == 0:
        return torch.cat([x.new_zeros(x.shape[0], width, *x.shape[2:]), x], dim=1)
    assert x.shape[1] >= width, "Config refuses shards shorter than the window"
    return torch.cat([receive_left(x[:, -width:], group, kind="halo"), x], dim=1)


def exchange_carry(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    document_start: Tensor,
    group: RankGroup,
    *,
    num_selected: int,
    support: int,
) -> Carry:
    """The merged summary of all ranks before this one. Differentiable: gradients return to the tokens' owners.

    Args:
        key: [b, w - 1 + s, g, d] with its halo; likewise value.
        scores: [b, w - 1 + s, g].
        document_start: [b, s], counted from this shard's first query.
    """
    sizes = {"num_selected": num_selected, "support": support}
    if group.size == 1 or num_selected == 0:
        return empty_carry(key, scores, **sizes)
    own = summarize(key, value, scores, document_start, **sizes)
    pairs = gather(torch.cat([own.key, own.value], dim=-1), group, kind="carry")
    best = gather(own.scores, group, kind="carry")
    where = gather(own.positions.clamp_min(EMPTY_INT32).to(torch.int32), group, kind="carry").long()

    # Summaries of this rank and of later ones are blanked, not cut off: every rank then builds the same graph, and so
    # takes part in the same collectives of the backward pass.
    length = document_start.shape[1]
    sender = torch.arange(group.size, device=key.device).view(-1, 1, 1, 1)
    usable = (where > EMPTY_INT32) & (sender < group.rank)
    where = torch.where(usable, where + (sender - group.rank) * length, NOWHERE)
    keys, values = _latest_first(pairs).chunk(2, dim=-1)
    parts = Carry(_latest_first(best), _latest_first(where), keys, values)
    return merge(parts, document_start, **sizes)


def received_per_layer(
    group_size: int, *, window: int, num_selected: int, support: int, num_kv_heads: int, head_dim: int, pair_bytes: int
) -> int:
    """Bytes a rank (not the first) receives in one forward pass of one layer and sequence: no n in it."""
    others = group_size - 1
    if others == 0:
        return 0
    halo = (window - 1) * (2 * head_dim * pair_bytes + 4)
    carry = others * (num_selected * 2 * head_dim * pair_bytes + support * 8) if num_selected else 0
    return num_kv_heads * (halo + carry)


def _latest_first(parts: Tensor) -> Tensor:
    """[p, b, g, m, ...] -> [b, g, p * m, ...], the last rank's part first."""
    return parts.flip(0).movedim(0, 2).flatten(2, 3)
