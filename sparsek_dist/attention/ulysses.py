"""Dense attention over a shared sequence, for the `full` baseline: DeepSpeed-Ulysses (arXiv 2309.14509).

All-to-alls turn a shard of the tokens with all heads into all tokens with a share of the heads, and back. So heads must
divide by the degree, and what travels grows with n; neither is true of the sparse kinds (attention/exchange.py).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from sparsek_dist.attention.dense import causal_attention
from sparsek_dist.parallel.comm import gather
from sparsek_dist.parallel.layout import unshard
from sparsek_dist.parallel.mesh import RankGroup


class UlyssesAttention:
    """Causal attention within documents over a sequence of which this rank holds one contiguous shard."""

    def __init__(self, group: RankGroup) -> None:
        assert group.handle is not None, "one rank needs no exchange"
        self.group = group
        # Dim 2, the heads, is scattered; dim 1, the sequence, gathered.
        self._attend = DistributedAttention(_within_documents, group.handle, scatter_idx=2, gather_idx=1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, *, scale: float) -> Tensor:
        """Output [b, s, h, d] of this shard, equal to that of one process holding the whole sequence.

        Args:
            query: [b, s, h, d]; p must divide h.
            key: [b, s, g, d]; p must divide g. Likewise value.
            position_ids: [b, s], each token's position in its document.
            scale: of the logits.
        """
        mine = position_ids.expand(query.shape[0], -1).int()
        positions = unshard(list(gather(mine, self.group, kind="ulysses")))
        batch_dim, rotary = 0, None
        output = self._attend(query, key, value, batch_dim, rotary, positions, scale)
        travelled = sum(x.numel() * x.element_size() for x in (query, key, value, output))
        self._count(travelled)
        if output.requires_grad:
            output.register_hook(lambda grad: self._count(travelled))
        return output

    def _count(self, travelled: int) -> None:
        """Of all bytes that take part in an all-to-all, a rank keeps 1/p and receives as many as it sends."""
        self.group.received["ulysses"] += travelled * (self.group.size - 1) // self.group.size


def _within_documents(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
    """[b, n, h, d] of a share of the heads. Document by document: no [n, n] mask is ever built."""
    rows = []
    for q, k, v, row in zip(query, key, value, positions, strict=True):
        begins = torch.nonzero(row == 0).flatten().tolist()
        # Where a row starts in the midst of a document, that is a beginning too.
        edges = sorted({0, len(row), *begins})
        lengths = [end - begin for begin, end in pairwise(edges)]
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        attended = [causal_attention(*(x.unsqueeze(0) for x in part), scale=scale)[0] for part in parts]
        rows.append(torch.cat(attended, dim=1).transpose(0, 1))
    return torch.stack(rows)
