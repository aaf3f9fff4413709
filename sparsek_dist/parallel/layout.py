"""Which tokens a sequence-parallel rank holds: contiguous shards, as pure functions of (rank, degree)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shard(x: Tensor, rank: int, degree: int, *, dim: int = 1) -> Tensor:
    """[.., n, ..] -> [.., n/p, ..]: the slice of `dim` that `rank` holds.

    Raises:
        ValueError: if `degree` does not divide the length.
    """
    length = x.shape[dim]
    if length % degree:
        raise ValueError(f"a length of {length} cannot be cut into {degree} equal shards: pad it to a multiple")
    return x.narrow(dim, rank * (length // degree), length // degree)


def padding(length: int, degree: int) -> int:
    """How many tokens to add to n = `length` so that p = `degree` shards are equal; less than p."""
    return -length % degree


def unshard(shards: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """p times [.., n/p, ..], in rank order -> [.., n, ..]."""
    return torch.cat(list(shards), dim=dim)


def positions(length: int, rank: int, degree: int, *, device: torch.device | None = None) -> Tensor:
    """Global positions [n/p] of the tokens that `rank` holds of a sequence of n = `length`."""
    return shard(torch.arange(length, device=device), rank, degree, dim=0)
