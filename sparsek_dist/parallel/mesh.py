"""The mesh of ranks: one frozen object, passed by hand, that knows degrees, groups and this process's place.

Ranks are laid out data-parallel first, sequence-parallel last: a sequence-parallel group is p consecutive ranks, so
that it stays inside a machine as long as it can.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed

SOLE_RANK = (0,)


@dataclass(frozen=True)
class RankGroup:
    """Some ranks that talk to each other, and this rank's place among them."""

    ranks: tuple[int, ...] = SOLE_RANK
    """Global ranks, in order."""
    rank: int = 0
    """This process's index in `ranks`."""
    handle: torch.distributed.ProcessGroup | None = None
    """None in a group of one, which needs no communication."""
    received: Counter[str] = field(default_factory=Counter, compare=False)
    """Bytes this rank has received through this group, by kind of exchange."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    def neighbour(self, distance: int) -> int | None:
        """Global rank that stands `distance` to the right, with later tokens (to the left if negative), if any."""
        index = self.rank + distance
        return self.ranks[index] if 0 <= index < self.size else None


@dataclass(frozen=True)
class Mesh:
    """data_degree x sequence_degree ranks."""

    world: RankGroup = field(default_factory=RankGroup)
    sequence: RankGroup = field(default_factory=RankGroup)
    """The ranks that share this rank's sequences."""

    @property
    def data_degree(self) -> int:
        """Sequence-parallel groups, each reading different sequences."""
        return self.world.size // self.sequence.size

    @property
    def data_rank(self) -> int:
        """Index of this rank's sequence-parallel group."""
        return self.world.rank // self.sequence.size

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all: prints, writes the run folder."""
        return self.world.rank == 0


def build_mesh(sequence_degree: int, *, timeout: timedelta) -> Mesh:
    """The mesh over the initialised world. Every rank must call it: it creates all groups, in the same order.

    Args:
        sequence_degree: p; must divide the world size.
        timeout: how long a collective may wait. Groups do not inherit it from the world, so it is given to each.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    assert size % sequence_degree == 0, "relations.check_world_size comes first"
    world = RankGroup(tuple(range(size)), rank, torch.distributed.group.WORLD if size > 1 else None)
    sequence = RankGroup((rank,))
    for start in range(0, size, sequence_degree):
        ranks = tuple(range(start, start + sequence_degree))
        if sequence_degree == 1:
            break
        handle = torch.distributed.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            sequence = RankGroup(ranks, ranks.index(rank), handle)
    return Mesh(world, sequence)
