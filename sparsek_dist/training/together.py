"""Small agreements between ranks about things that are not tensors: names, hashes, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed

from sparsek_dist.errors import SparsekError
from sparsek_dist.parallel import rendezvous
from sparsek_dist.parallel.mesh import RankGroup

T = TypeVar("T")


def barrier(group: RankGroup) -> None:
    """Returns when every rank has called it."""
    if group.handle is not None:
        rendezvous.barrier(group.handle)


def gather_objects(value: T, group: RankGroup) -> list[T]:
    """Every rank's value, in rank order. It travels by pickle between the processes of one run."""
    if group.handle is None:
        return [value]
    values: list[T | None] = [None] * group.size
    torch.distributed.all_gather_object(values, value, group=group.handle)
    return values  # type: ignore[return-value]


@contextmanager
def together(group: RankGroup) -> Iterator[None]:
    """Every rank must enter and leave it: an error a user can cure on one rank becomes the same error on all.

    Without it the other ranks would wait in their next collective until it times out, and bury the message.

    Raises:
        SparsekError: the first in rank order.
    """
    mine: SparsekError | None = None
    try:
        yield
    except SparsekError as error:
        mine = error
    # A copy arrives of each; this rank raises its own, which knows its cause.
    for rank, told in enumerate(gather_objects(mine, group)):
        if told is not None:
            raise mine if mine is not None and rank == group.rank else told
