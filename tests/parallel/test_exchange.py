"""The exchange: its size is the formula's and has no n in it, recomputing adds nothing to it, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparsek_dist.attention import parallel
from sparsek_dist.attention.exchange import exchange_carry, received_per_layer, resolve_exchange
from sparsek_dist.attention.parallel import ParallelAttention
from sparsek_dist.parallel import comm
from sparsek_dist.parallel.layout import shard
from sparsek_dist.parallel.mesh import Mesh, RankGroup, build_mesh
from sparsek_dist.parallel.recompute import keep_received
from sparsek_kernels import Budget
from tests.distributed import run_distributed

K, W, S, G, D = 6, 5, 16, 2, 4
EXCHANGES = ("all_gather", "scan")
BUDGET = Budget(K, W, S, "value")
HALO, PAIRS, SCORES = (W - 1) * G * (2 * D * 4 + 4), K * G * 2 * D * 4, S * G * 8
"""Bytes of each message."""


def _inputs(n: int, *, changed: int | None = None, begins: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, n, 4, D), (1, n, G, D), (1, n, G, D), (1, n, G)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if changed is not None:
        for x in tensors:
            x[:, changed] += 1.0
    positions = torch.arange(n) if begins is None else torch.cat([torch.arange(begins), torch.arange(n - begins)])
    return [*tensors, positions.unsqueeze(0)]


def _attend(mesh: Mesh, exchange: str, inputs: list[torch.Tensor], *, recompute: str = "") -> dict:
    """Output, gradients and received bytes, forward and in all."""
    group = replace(mesh.sequence, received=type(mesh.sequence.received)())
    parts = [shard(x, group.rank, group.size).clone() for x in inputs]
    leaves = [x.requires_grad_() for x in parts[:4]]
    attention = ParallelAttention(BUDGET, group, exchange=exchange)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return attention(*tensors, scale=0.5)

    if recompute:
        keep = {"context_fn": keep_received} if recompute == "kept" else {}
        output = checkpoint(run, *parts, use_reentrant=False, **keep)
    else:
        output = run(*parts)
    forward = sum(group.received.values())
    output.square().sum().backward()
    gradients = [x.grad for x in leaves]
    return {"output": output.detach(), "gradients": gradients, "forward": forward, "all": sum(group.received.values())}


def _measure(rank: int, world_size: int) -> dict[str, dict]:
    mesh = build_mesh(world_size, timeout=timedelta(seconds=60))
    results = {}
    for exchange in EXCHANGES:
        results[exchange] = {
            "n": _attend(mesh, exchange, _inputs(48)),
            "8n": _attend(mesh, exchange, _inputs(8 * 48)),
            "kept": _attend(mesh, exchange, _inputs(48), recompute="kept"),
            "again": _attend(mesh, exchange, _inputs(48), recompute="again"),
            "later": _attend(mesh, exchange, _inputs(48, changed=29)),
            "packed": _attend(mesh, exchange, _inputs(48, begins=19)),
            "other": _attend(mesh, exchange, _inputs(48, begins=19, changed=17)),
        }
    return results


def _order(rank: int, world_size: int) -> dict[str, list[str]]:
    """What this rank did, in order: starting messages, and waiting for them, selecting, attending."""
    mesh, told = build_mesh(world_size, timeout=timedelta(seconds=60)), []
    patch = pytest.MonkeyPatch()

    def tell(owner: object, name: str, word: Callable[..., str]) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: (told.append(word(*args)), original(*args, **kwargs))[1])

    content = {HALO: "halo", SCORES: "scores", PAIRS: "pairs"}
    tell(comm.Flight, "start", lambda flight, requests, message, received: content.get(message.numel(), ""))
    tell(comm.Flight, "land", lambda flight: "wait")
    tell(parallel, "select_shard", lambda *args: "select")
    tell(parallel, "attend_shard", lambda *args: "attend")
    results = {}
    for exchange in EXCHANGES:
        told.clear()
        _attend(mesh, exchange, _inputs(48))
        results[exchange] = told[: told.index("attend")]
    patch.undo()
    return results


def test_pairs_travel_while_scores_select():
    first, middle, last = run_distributed(_order, 3)
    for done in (first, middle, last):
        # Scores start before pairs: a group that carries one message after another must not keep them waiting.
        expected = ["halo", "wait", "scores", "wait", "pairs", "select", "wait"]
        assert done["all_gather"] == expected
    for done in (first, last):
        # Pairs of the scan's second round, which the middle rank has no part in, are known when the first have arrived.
        assert done["scan"] == [*expected[:4], *expected[2:], "pairs", "wait"]


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def by_rank(request) -> list[dict]:
    return run_distributed(_measure, request.param)


def _whole(by_rank: list[dict], exchange: str, name: str) -> torch.Tensor:
    return torch.cat([rank[exchange][name]["output"] for rank in by_rank], dim=1)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_received_bytes_are_the_formula_whatever_the_length(by_rank, exchange):
    degree = len(by_rank)
    for rank, results in enumerate(by_rank):
        summaries = degree - 1 if exchange == "all_gather" else rank.bit_length()
        expected = (HALO if rank else 0) + summaries * (PAIRS + SCORES)
        assert results[exchange]["n"]["forward"] == expected, rank
        # Backward, each rank's entries send their gradients back, but no positions.
        senders = degree - 1 if exchange == "all_gather" else (degree - 1 - rank).bit_length()
        expected += (HALO if rank < degree - 1 else 0) + senders * (PAIRS + SCORES // 2)
        assert results[exchange]["n"]["all"] == results[exchange]["8n"]["all"] == expected, rank
    told = received_per_layer(
        degree,
        window=W,
        num_selected=K,
        support=S,
        num_kv_heads=G,
        head_dim=D,
        pair_bytes=4,
        exchange=exchange,
    )
    assert by_rank[-1][exchange]["n"]["forward"] == told


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_recomputing_receives_nothing(by_rank, exchange):
    for rank, results in enumerate(by_rank):
        plain, kept, again = (results[exchange][name] for name in ("n", "kept", "again"))
        assert kept["all"] == plain["all"]
        assert again["all"] == plain["all"] + plain["forward"], "or the comparison would show nothing"
        assert torch.equal(kept["output"], plain["output"])
        for mine, expected in zip(kept["gradients"], plain["gradients"], strict=True):
            assert torch.equal(mine, expected), rank


def test_both_exchanges_compute_the_same(by_rank):
    for results in by_rank:
        gathered, scanned = (results[exchange]["packed"] for exchange in EXCHANGES)
        assert torch.equal(gathered["output"], scanned["output"])
        for mine, expected in zip(scanned["gradients"], gathered["gradients"], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nothing_leaks_from_later_tokens_or_other_documents(by_rank, exchange):
    plain, later = _whole(by_rank, exchange, "n"), _whole(by_rank, exchange, "later")
    assert torch.equal(plain[:, :29], later[:, :29]) and not torch.equal(plain[:, 29:], later[:, 29:])
    packed, other = _whole(by_rank, exchange, "packed"), _whole(by_rank, exchange, "other")
    assert torch.equal(packed[:, 19:], other[:, 19:]) and not torch.equal(packed[:, 17:19], other[:, 17:19])


def test_gradients_of_gathered_pairs_are_laid_together_once():
    """A gradient of each summary by itself would be as large as all: p^2 of them in a backward pass."""
    key, scores = torch.randn(1, 9 + W - 1, G, D, requires_grad=True), torch.randn(1, 9 + W - 1, G)
    start, sizes = torch.zeros(1, 9, dtype=torch.int64), {"num_selected": K, "support": S}
    *_, incoming = exchange_carry(key, key, scores, start, RankGroup(), **sizes, exchange="all_gather")
    names, nodes = [], [incoming.carry().key.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert "UnbindBackward0" in names and "SelectBackward0" not in names


def test_what_needs_no_gradient_does_not_get_one_from_its_company():
    """Fixed scores travel with keys: their gradients would be sent back through every exchange, for nothing."""
    key, scores, group = torch.randn(1, 4, G, requires_grad=True), torch.randn(1, 4), RankGroup()
    received = comm.receive([key, scores], group, distance=1, kind="halo")
    gathered = comm.gather_all([key, scores], group, kind="carry")
    assert [x.requires_grad for x in (*received, *gathered)] == [True, False, True, False]


def test_auto_gathers_up_to_eight():
    chosen = [resolve_exchange("auto", degree) for degree in (1, 2, 8, 9, 64)]
    assert chosen == ["all_gather"] * 3 + ["scan"] * 2
    assert resolve_exchange("scan", 2) == "scan" and resolve_exchange("all_gather", 64) == "all_gather"
