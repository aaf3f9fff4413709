"""The exchange: its size does not depend on n, and packing documents leaks nothing across shards."""

from __future__ import annotations

from datetime import timedelta

import torch

from sparsek_dist.attention.exchange import received_per_layer
from sparsek_dist.attention.parallel import Budget, ParallelAttention
from sparsek_dist.parallel.layout import shard
from sparsek_dist.parallel.mesh import build_mesh
from tests.distributed import run_distributed

K, W, S, G, D = 6, 5, 16, 2, 4


def _attend(rank: int, mesh, n: int, *, changed: int | None = None, begins: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, n, 4, D, generator=generator)
    key, value = (torch.randn(1, n, G, D, generator=generator) for _ in range(2))
    scores = torch.randn(1, n, G, generator=generator)
    if changed is not None:
        for x in (query, key, value, scores):
            x[:, changed] += 1.0
    positions = torch.arange(n) if begins is None else torch.cat([torch.arange(begins), torch.arange(n - begins)])
    attention = ParallelAttention(Budget(K, W, S, "value"), mesh.sequence)
    parts = [shard(x, rank, 2) for x in (query, key, value, scores, positions.unsqueeze(0))]
    return attention(*parts, scale=0.5)


def _volumes(rank: int, world_size: int) -> list[int]:
    received = []
    for n in (64, 512):
        mesh = build_mesh(2, timeout=timedelta(seconds=60))
        _attend(rank, mesh, n)
        received.append(sum(mesh.sequence.received.values()))
    return received


def _leaks(rank: int, world_size: int) -> list[torch.Tensor]:
    mesh = build_mesh(2, timeout=timedelta(seconds=60))
    plain = _attend(rank, mesh, 64)
    later = _attend(rank, mesh, 64, changed=40)
    packed = _attend(rank, mesh, 64, begins=25)
    other = _attend(rank, mesh, 64, begins=25, changed=20)
    return [plain, later, packed, other]


def test_bytes_do_not_grow_with_the_sequence():
    first, second = run_distributed(_volumes, 2)
    expected = received_per_layer(2, window=W, num_selected=K, support=S, num_kv_heads=G, head_dim=D, pair_bytes=4)
    assert second == [expected, expected]
    # The first rank has no left neighbour, but takes part in the gather of summaries.
    assert first[0] == first[1] < expected


def test_nothing_leaks_from_later_tokens_or_other_documents():
    first, second = run_distributed(_leaks, 2)
    plain, later, packed, other = (torch.cat([a, b], dim=1) for a, b in zip(first, second, strict=True))
    assert torch.equal(plain[:, :40], later[:, :40]) and not torch.equal(plain[:, 40:], later[:, 40:])
    assert torch.equal(packed[:, 25:], other[:, 25:]) and not torch.equal(packed[:, 20:25], other[:, 20:25])
