"""How fast the ranks reach each other: an all-gather over all, and an exchange between neighbours.

These are the two exchanges of sequence-parallel SPARSEK attention: its summaries travel by all-gather, its window
by neighbours. What arrives is compared, so that a link that damages data is noticed, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sparsek_dist.parallel.rendezvous import barrier

REPEATS = 5
NUM_BYTES = {"cpu": (1 << 12, 1 << 20, 1 << 24), "cuda": (1 << 15, 1 << 22, 1 << 28)}
"""Sizes of the messages: one for the latency, one as attention sends them, one for the bandwidth."""


@dataclass(frozen=True)
class Timing:
    """One size of message, as one rank saw it; medians in seconds."""

    num_bytes: int
    all_gather: float
    """Until every rank has `num_bytes` in all."""
    exchange: dict[int, float]
    """Neighbour's rank -> `num_bytes` there and as many back at once."""


def measure_links(device: torch.device, sizes: Sequence[int] | None = None) -> list[Timing]:
    """Times all links of the process group. Every rank must call it.

    Args:
        device: of the messages; must suit the backend of the group.
        sizes: bytes of the messages; default NUM_BYTES of the device.

    Raises:
        RuntimeError: from torch.distributed, if a rank is lost; or if what arrives is not what was sent.
    """
    sizes = NUM_BYTES[device.type] if sizes is None else sizes
    return [Timing(size, _time_all_gather(size, device), _time_neighbours(size, device)) for size in sizes]


def _time_all_gather(num_bytes: int, device: torch.device) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = torch.full((max(1, num_bytes // 4 // world),), float(rank), device=device)
    parts = [torch.empty_like(mine) for _ in range(world)]
    seconds = _median(lambda: dist.all_gather(parts, mine), device)
    for sender, part in enumerate(parts):
        _check(part, sender)
    return seconds


def _time_neighbours(num_bytes: int, device: torch.device) -> dict[int, float]:
    """Two rounds, so that each rank speaks to one neighbour at a time: pairs (0, 1), (2, 3), ..., then (1, 2), ..."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = torch.full((num_bytes // 4,), float(rank), device=device)
    theirs = torch.empty_like(mine)
    seconds = {}
    for turn in (0, 1):
        other = rank + 1 if rank % 2 == turn else rank - 1
        # All wait here, also those without a partner in this round.
        barrier()
        if 0 <= other < world:
            seconds[other] = _median(lambda other=other: _exchange(mine, theirs, other), device)  # type: ignore[misc]
            _check(theirs, other)
    return seconds


def _exchange(mine: torch.Tensor, theirs: torch.Tensor, other: int) -> None:
    messages = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
    for request in dist.batch_isend_irecv(messages):
        request.wait()


def _median(action: Callable[[], object], device: torch.device) -> float:
    times = []
    # The first one makes connections.
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _check(received: torch.Tensor, sender: int) -> None:
    if not torch.equal(received, torch.full_like(received, float(sender))):
        raise RuntimeError(f"gloo or NCCL delivered other data than rank {sender} sent")
