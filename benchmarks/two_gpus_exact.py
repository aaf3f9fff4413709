"""Of two_gpus.py: what a shared sequence computes, against float64, and the bytes it takes, against the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsek_dist.attention.exchange import received_per_layer
from sparsek_dist.attention.parallel import ParallelAttention
from sparsek_dist.parallel.comm import all_reduce_sum
from sparsek_dist.parallel.layout import shard
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Budget
from two_gpus_lab import Lab

EXCHANGES = ("all_gather", "scan")
NAMES = ("out", "dq", "dk", "dv", "du")
FLOOR = 2e-7
"""Relative errors below this are rounding of float32, of which twice as much says nothing."""


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    h: int
    g: int
    d: int
    budget: Budget
    begins: tuple[int, ...] = (0,)
    """Where documents begin."""

    def inputs(self, lab: Lab) -> list[Tensor]:
        """Query, key, value, scores, positions and the weight of every output: the same on all ranks."""
        generator = torch.Generator().manual_seed(5)

        def random(heads: int, *width: int) -> Tensor:
            return torch.randn(1, self.n, heads, *width, generator=generator)

        pairs = [random(self.h, self.d), random(self.g, self.d), random(self.g, self.d)]
        scores, weights = random(self.g), random(self.h, self.d)
        index = torch.arange(self.n)
        starts = torch.zeros(self.n, dtype=torch.long)
        starts[list(self.begins)] = torch.tensor(self.begins)
        positions = (index - starts.cummax(0).values).unsqueeze(0)
        half = [x.to(lab.device, lab.dtype) for x in (*pairs, weights)]
        return [*half[:3], scores.to(lab.device), positions.to(lab.device), half[3]]


def cases(lab: Lab) -> list[Case]:
    if not lab.gpu:
        sizes = [("value", (0, 9, 40)), ("straight_through", (0,))]
        return [Case(f"{gate}, n = 64", 64, 4, 2, 8, Budget(6, 5, 16, gate), begins) for gate, begins in sizes]
    packed = (0, 700, 2500, 2900)
    small = [
        Case(f"{gate}, packed, n = 4096, k = 100", 4096, 8, 2, 128, Budget(100, 130, 333, gate), packed)
        for gate in ("straight_through", "value", "key_value")
    ]
    large = Budget(1024, 1024, 4096, "straight_through")
    return [Case("straight_through, n = 16384, k = 1024", 16384, 32, 8, 128, large), *small]


def measure_errors(lab: Lab) -> None:
    """Relative errors in the Frobenius norm, over all ranks."""
    group = lab.mesh(lab.size).sequence
    for case in cases(lab):
        whole = case.inputs(lab)
        exact = [x.double() if x.is_floating_point() else x for x in whole]
        expected = attend(case, exact, RankGroup(), "torch")
        alone = attend(case, whole, RankGroup(), lab.backend)
        parts = [shard(x, group.rank, group.size, dim=1) for x in whole]
        mine = [[shard(x, group.rank, group.size, dim=1) for x in tensors] for tensors in (expected, alone)]
        for exchange in EXCHANGES:
            shared = attend(case, parts, group, lab.backend, exchange)
            for name, found, reference, one in zip(NAMES, shared, *mine, strict=True):
                row = {"case": case.name, "exchange": exchange, "tensor": name}
                row["one"] = relative(one, reference, group)
                row["shared"] = relative(found, reference, group)
                row["between"] = relative(found, one, group)
                row["within"] = row["shared"] <= max(2 * row["one"], FLOOR)
                lab.add("errors", row)
        lab.forget()


def attend(case: Case, tensors: list[Tensor], group: RankGroup, backend: str, exchange: str = "auto") -> list[Tensor]:
    """Output and gradients of query, key, value and scores."""
    *values, positions, weights = (x.detach() for x in tensors)
    leaves = [x.clone().requires_grad_() for x in values]
    attention = ParallelAttention(case.budget, group, backend, exchange)
    out = attention(*leaves, positions, scale=case.d**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def relative(found: Tensor, reference: Tensor, group: RankGroup) -> float:
    squares = torch.stack([(found.double() - reference.double()).square().sum(), reference.double().square().sum()])
    error, norm = all_reduce_sum(squares, group).sqrt().tolist()
    return error / norm


def measure_bytes(lab: Lab) -> None:
    """Counted on every rank, forward and backward, at n and 8 n."""
    group = lab.mesh(lab.size).sequence
    budget = Budget(100, 130, 333, "straight_through") if lab.gpu else Budget(6, 5, 16, "value")
    h, g, d, length = (8, 2, 128, 512) if lab.gpu else (4, 2, 8, 24)
    for exchange in EXCHANGES:
        told = formulas(lab, budget, g, d, exchange)
        for n in (length * lab.size, 8 * length * lab.size):
            case = Case("", n, h, g, d, budget)
            counted = replace(group, received=Counter())
            parts = [shard(x, group.rank, group.size, dim=1) for x in case.inputs(lab)]
            *values, positions, weights = parts
            leaves = [x.detach().clone().requires_grad_() for x in values]
            out = ParallelAttention(budget, counted, lab.backend, exchange)(*leaves, positions, scale=d**-0.5)
            forward = sum(counted.received.values())
            torch.autograd.grad(out, leaves, weights)
            found = (forward, sum(counted.received.values()) - forward)
            equal = found == told[group.rank]
            row = {"exchange": exchange, "n": n, "equal": lab.largest(float(not equal)) == 0}
            row["last_rank"] = {"forward": told[-1][0], "backward_rank_0": told[0][1]}
            row["received"] = {"forward": int(lab.largest(found[0])), "backward": int(lab.largest(found[1]))}
            lab.add("bytes", row)


def formulas(lab: Lab, budget: Budget, g: int, d: int, exchange: str) -> list[tuple[int, int]]:
    """Bytes that each rank receives forward and backward.

    Backward no positions travel, and the sum of a gather's gradients is taken in float32, so they travel in it.
    """
    p, width = lab.size, lab.dtype.itemsize
    halo = g * (budget.window - 1) * (2 * d * width + 4)
    pairs, entry = 2 * g * d * budget.num_selected, 4 * g * budget.support
    gathers = exchange == "all_gather"
    back = pairs * (max(width, 4) if gathers else width) + entry
    found = []
    for rank in range(p):
        arrive = p - 1 if gathers else rank.bit_length()
        leave = p - 1 if gathers else (p - 1 - rank).bit_length()
        forward = halo * (rank > 0) + arrive * (pairs * width + 2 * entry)
        found.append((forward, halo * (rank < p - 1) + leave * back))
    sizes = {"window": budget.window, "num_selected": budget.num_selected, "support": budget.support}
    last = received_per_layer(p, **sizes, num_kv_heads=g, head_dim=d, pair_bytes=width, exchange=exchange)
    assert found[-1][0] == last, "the formula of the exchange is another one now"
    return found
