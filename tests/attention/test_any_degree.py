"""The carry of every rank for many degrees, powers of two or not, against a plain sort of the whole prefix.

The ranks are threads that hand each other tensors, so autograd runs through the exchange by itself: the merges and
their gradients are what is tested here. Real processes and adjoints: tests/parallel/.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from sparsek_dist.attention import exchange
from sparsek_dist.parallel.mesh import RankGroup

B, G, D, K, W, S, SHARD = 5, 2, 2, 3, 2, 4, 6


class Ranks:
    """A mailbox with the calls of parallel/comm.py that the carry makes."""

    def __init__(self, size: int) -> None:
        self.size, self.box, self.rounds = size, {}, [0] * size
        self.barrier = threading.Barrier(size)

    def _swap(self, rank: int, tensors) -> dict:
        self.rounds[rank] += 1
        self.box[rank] = tensors
        self.barrier.wait(30)
        seen = dict(self.box)
        self.barrier.wait(30)
        return seen

    def receive(self, tensors, group, *, distance, kind):
        seen = self._swap(group.rank, tensors)
        if group.rank < distance:
            return tuple(torch.zeros_like(x) for x in tensors)
        return tuple(seen[group.rank - distance])

    def gather_all(self, tensors, group, *, kind):
        seen = self._swap(group.rank, tensors)
        return tuple(torch.stack([seen[r][i] for r in range(self.size)]) for i in range(len(tensors)))

    def receive_later(self, x, group, *, distance, kind):
        return Here(self.receive([x], group, distance=distance, kind=kind)[0])

    def gather_later(self, x, group, *, kind):
        return Here(self.gather_all([x], group, kind=kind)[0])


@dataclass
class Here:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


def _inputs(p: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = p * SHARD
    # Few different scores, so that most decisions are ties; rows in one document, in few and in many.
    scores = torch.randint(0, 4, (B, n, G), generator=generator).double()
    # In two rows earlier tokens score higher: documents that have ended would push out those that have not.
    scores[2:4] -= (torch.arange(n) // 2).unsqueeze(-1)
    begins = torch.rand(B, n, generator=generator) < torch.tensor([[0.0], [0.03], [0.06], [0.1], [0.3]])
    starts = torch.where(begins, torch.arange(n), 0).cummax(1).values
    key, value = (torch.randn(B, n, G, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"key": key, "value": value, "scores": scores, "starts": starts}


def _carry(rank: int, p: int, x: dict[str, torch.Tensor], strategy: str):
    begin, end = rank * SHARD, (rank + 1) * SHARD

    def with_halo(whole: torch.Tensor) -> torch.Tensor:
        pad = whole.new_zeros(B, W - 1, *whole.shape[2:])
        return torch.cat([pad, whole], dim=1)[:, begin : end + W - 1]

    _, _, incoming = exchange.exchange_carry(
        with_halo(x["key"]),
        with_halo(x["value"]),
        with_halo(x["scores"]),
        x["starts"][:, begin:end] - begin,
        RankGroup(tuple(range(p)), rank),
        num_selected=K,
        support=S,
        exchange=strategy,
    )
    return incoming.carry()


def _best(rank: int, x: dict[str, torch.Tensor], row: int, head: int) -> list[int]:
    """Global positions of the S best candidates of this rank's first query that lie before the shard's own stream."""
    first = rank * SHARD
    candidates = range(int(x["starts"][row, first]), first - W + 1)
    return sorted(candidates, key=lambda j: (x["scores"][row, j, head].item(), j), reverse=True)[:S]


@pytest.mark.parametrize("strategy", ["all_gather", "scan"])
@pytest.mark.parametrize("p", [2, 3, 5, 6, 7, 8, 9, 17])
def test_carry_is_the_best_of_the_prefix(p, strategy, monkeypatch):
    ranks, x = Ranks(p), _inputs(p, seed=p)
    for name in ("receive", "receive_later", "gather_all", "gather_later"):
        monkeypatch.setattr(exchange, name, getattr(ranks, name))
    leaves = [x[name].requires_grad_() for name in ("key", "value", "scores")]
    with ThreadPoolExecutor(p) as pool:
        carries = list(pool.map(lambda rank: _carry(rank, p, x, strategy), range(p)))
    # Scores and pairs travel apart.
    assert ranks.rounds == [2 * (1 if strategy == "all_gather" else (p - 1).bit_length())] * p

    expected, found, filled = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for rank, carry in enumerate(carries):
        for row in range(B):
            for head in range(G):
                best = _best(rank, x, row, head)
                filled += len(best)
                assert (carry.positions[row, head, : len(best)] + rank * SHARD).tolist() == best, (rank, row, head)
                assert (carry.scores[row, head, len(best) :] == -torch.inf).all()
                for slot, j in enumerate(best):
                    weight = 1 + rank + 10 * slot
                    expected = expected + weight * x["scores"][row, j, head]
                    found = found + weight * carry.scores[row, head, slot]
                    if slot < K:
                        pair = torch.cat([x["key"][row, j, head], x["value"][row, j, head]])
                        carried = torch.cat([carry.key[row, head, slot], carry.value[row, head, slot]])
                        assert torch.equal(pair, carried)
                        expected, found = expected + weight * pair.sum(), found + weight * carried.sum()
    assert filled > p * G
    for mine, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
