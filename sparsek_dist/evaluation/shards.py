"""How the ranks of an evaluation share each sequence: every one is given all of it, and keeps its shard.

Tokens are few bytes, so every rank holds them all and decides alike what to do next; what is shared is the work on
them: hidden states, keys, values and logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsek_dist.data.loader import Batch
from sparsek_dist.parallel.comm import gather
from sparsek_dist.parallel.layout import unshard
from sparsek_dist.parallel.mesh import RankGroup


@dataclass(frozen=True)
class Sharing:
    """All ranks of an evaluation; one process alone holds every sequence whole."""

    group: RankGroup = field(default_factory=RankGroup)
    shortest: int = 1
    """Tokens that a shard must hold at least, the longest window of the model; shorter sequences are filled up."""

    def shard(self, batch: Batch, device: torch.device) -> Batch:
        """[b, n] -> this rank's [b, s], filled up at its end by a document without targets."""
        return batch.shard(self.group.rank, self.group.size, shortest=self.shortest).to(device)

    def whole(self, mine: Tensor, length: int) -> Tensor:
        """[b, s, ...] on each rank -> the first `length` tokens [b, n, ...] on all, on the CPU."""
        shards = gather(mine.contiguous(), self.group, kind="evaluation")
        return unshard(list(shards))[:, :length].cpu()
