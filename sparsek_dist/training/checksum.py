"""Do all ranks still hold the same parameters? A collective that fails silently shows here first, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsek_dist.errors import PeerError
from sparsek_dist.parallel.comm import gather
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.training.engine import whole_parameters

CHUNK = 1 << 22
"""Elements at a time: a checksum needs 16 bytes of each."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


def require_equal_parameters(engine: Any, world: RankGroup, step: int) -> None:
    """Compares every parameter of a training engine, bit for bit, over all ranks. Every rank must call it.

    Raises:
        PeerError: on all ranks, naming the first parameter that differs and the ranks that hold another.
    """
    names = [name for name, _ in engine.module.named_parameters()]
    if difference := _difference(names, whole_parameters(engine), world):
        raise PeerError(
            f"step {step}: {difference}: gradients were not reduced alike, so continue from a checkpoint before the "
            "last comparison (train.compare_every)"
        )


def require_equal_weights(model: nn.Module, world: RankGroup) -> None:
    """Compares every parameter of a model that each rank has read by itself. Every rank must call it.

    Raises:
        PeerError: as `require_equal_parameters`.
    """
    if world.size == 1:
        return
    names, parameters = zip(*model.named_parameters(), strict=True)
    if difference := _difference(names, parameters, world):
        raise PeerError(f"{difference}: give every host the same model folder")


def _difference(names: Sequence[str], parameters: Iterable[Tensor], world: RankGroup) -> str | None:
    """What differs between ranks, in words."""
    sums = torch.stack([checksum(parameter) for parameter in parameters])
    by_rank = gather(sums, world, kind="checksum")
    differs = (by_rank != by_rank[0]).any(dim=0)
    if not bool(differs.any()):
        return None
    first = int(differs.nonzero()[0])
    others = (by_rank[:, first] != by_rank[0, first]).nonzero().flatten().tolist()
    return (
        f"{int(differs.sum())} of {len(names)} parameters differ between ranks, first {names[first]}, of which ranks "
        f"{others} hold another than rank 0"
    )


def checksum(x: Tensor) -> Tensor:
    """An int64 scalar that changes with any bit of x, and with the order of its elements (modulo 2^64)."""
    bits = x.detach().contiguous().view(-1).view(INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for begin in range(0, bits.numel(), CHUNK):
        part = bits[begin : begin + CHUNK].long()
        # Odd weights: they can be divided out modulo 2^64, so no single change is lost.
        weight = 2 * torch.arange(begin, begin + part.numel(), device=x.device) + 1
        total += (part * weight).sum()
    return total
