"""The golden rule: any sequence-parallel degree computes what one process computes, to rounding, in float64.

Outputs, every parameter gradient and five steps of training are compared. The same worker then runs with one exchange
broken at a time, and must not agree: what the golden rule would not notice, it does not prove.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch

from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig
from sparsek_dist.models import build_model
from sparsek_dist.parallel import comm
from sparsek_dist.parallel.layout import shard
from sparsek_dist.parallel.loss import IGNORE, loss_sum
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_distributed

LENGTH, BATCH, VOCABULARY, STEPS = 48, 4, 11, 5


@dataclass(frozen=True)
class Case:
    attention: AttentionConfig
    documents: str = "one"
    """`one` per sequence, `random` boundaries, or `edges`: boundaries at shard edges, one rank without targets."""
    activation_checkpointing: bool = False


def _attention(**changes) -> AttentionConfig:
    return replace(AttentionConfig(num_selected=5, window=4, support=12), **changes)


CASES = {
    "straight_through": Case(_attention()),
    "value packed": Case(_attention(gate="value"), "random"),
    "key_value edges": Case(_attention(gate="key_value"), "edges"),
    "recomputed": Case(_attention(slope=0.01), "random", activation_checkpointing=True),
    "more selected than exist": Case(_attention(num_selected=60, support=None, gate="value"), "random"),
    "window of one": Case(_attention(window=1, gate="value"), "random"),
    "window as long as a shard": Case(_attention(window=12)),
    "selected nothing": Case(_attention(num_selected=0)),
    "baseline random": Case(_attention(kind="random"), "random"),
    "baseline sink_window": Case(_attention(kind="sink_window")),
    "baseline window": Case(_attention(kind="window"), "random"),
}


def _config(case: Case) -> Config:
    config = Config(
        model=ModelConfig(
            hidden_size=12, intermediate_size=20, num_layers=2, num_query_heads=6, num_kv_heads=3, head_dim=4
        ),
        attention=case.attention,
        data=DataConfig(sequence_length=LENGTH),
    )
    return replace(config, train=replace(config.train, activation_checkpointing=case.activation_checkpointing))


def _batch(documents: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    begins = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    if documents == "random":
        begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.08
    if documents == "edges":
        begins[:, 12::12] = True
    index = torch.arange(LENGTH).expand(BATCH, -1)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    labels = tokens[:, 1:].clone()
    labels[:, :-1][begins[:, 1:]] = IGNORE
    if documents == "edges":
        labels[:, 12:24] = IGNORE
    return {"input_ids": tokens[:, :-1], "labels": labels, "position_ids": positions}


def _train(mesh: Mesh, case: Case) -> dict[str, object]:
    """Five steps of plain gradient descent on this rank's shards of this rank's sequences."""
    model = build_model(_config(case), mesh, vocab_size=VOCABULARY).double()
    share = BATCH // mesh.data_degree
    rows = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    batch = {name: shard(x[rows], mesh.sequence.rank, mesh.sequence.size) for name, x in _batch(case.documents).items()}
    targets = (_batch(case.documents)["labels"] != IGNORE).sum()
    result: dict[str, object] = {"losses": []}
    for step in range(STEPS):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        loss = loss_sum(logits, batch["labels"]) / targets
        model.zero_grad()
        loss.backward()
        result["losses"].append(comm.all_reduce_sum(loss, mesh.world))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = {name: comm.all_reduce_sum(p.grad, mesh.world) for name, p in trained.items()}
        if step == 0:
            result |= {"logits": logits.detach(), "grads": grads}
        with torch.no_grad():
            for name, p in trained.items():
                p -= 0.3 * grads[name]
    result["losses"] = torch.stack(result["losses"])
    result["received"] = sum(mesh.sequence.received.values())
    return result


def _worker(rank: int, world_size: int, runs: list[tuple[int, str, str | None]]) -> list[dict[str, object]]:
    results = []
    for degree, name, broken in runs:
        mesh = build_mesh(degree, timeout=timedelta(seconds=60))
        with _break(broken):
            results.append(_train(mesh, CASES[name]))
    return results


def _errors(ranks: list[dict], expected: dict, degree: int) -> dict[str, float]:
    """Largest relative error of outputs, of any parameter's gradient, and of the losses, over all ranks."""
    groups = [ranks[start : start + degree] for start in range(0, len(ranks), degree)]
    logits = torch.cat([torch.cat([r["logits"] for r in group], dim=1) for group in groups])

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))

    return {
        "outputs": relative(logits, expected["logits"]),
        "gradients": max(relative(r["grads"][name], grad) for r in ranks for name, grad in expected["grads"].items()),
        "losses": max(relative(r["losses"], expected["losses"]) for r in ranks),
    }


@functools.cache
def _expected(name: str) -> dict[str, object]:
    return _train(Mesh(), CASES[name])


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_degree_equals_one_process(world_size):
    degrees = [degree for degree in (1, 2, 4) if degree <= world_size]
    runs = [(degree, name, None) for degree in degrees for name in CASES if degree > 1 or name == "value packed"]
    ranks = run_distributed(_worker, world_size, runs, timeout=150)
    for index, (degree, name, _) in enumerate(runs):
        errors = _errors([rank[index] for rank in ranks], _expected(name), degree)
        assert max(errors.values()) < 1e-10, f"{name} at degree {degree}: {errors}"


BREAKS = {
    "halo": "outputs",
    "halo adjoint": "gradients",
    "carry": "outputs",
    "carry adjoint": "gradients",
    "carry positions": "outputs",
}


def test_every_exchange_and_adjoint_is_needed():
    runs = [(2, "value packed", broken) for broken in BREAKS]
    ranks = run_distributed(_worker, 2, runs, timeout=100)
    for index, (_, name, broken) in enumerate(runs):
        errors = _errors([rank[index] for rank in ranks], _expected(name), 2)
        assert errors[BREAKS[broken]] > 1e-6, f"without the {broken} nothing changed: {errors}"


class _break:
    """Within it, one exchange does nothing: it keeps its shape and loses its content."""

    def __init__(self, what: str | None) -> None:
        self.patch = pytest.MonkeyPatch()
        self.what = what

    def __enter__(self) -> None:
        shift, gather = comm._shift, comm._Gather.forward

        def no_halo(x, group, *, to, source, kind):
            received = shift(x, group, to=to, source=source, kind=kind)
            forward = to == group.right and source == group.left
            return torch.zeros_like(received) if forward == (self.what == "halo") else received

        def no_gather(ctx, x, group, kind):
            gathered = gather(ctx, x, group, kind)
            positions = not x.is_floating_point()
            if positions == (self.what == "carry positions"):
                gathered[: group.rank] = -7 if positions else 0
            return gathered

        def no_scatter(ctx, grad):
            return grad[ctx.group.rank], None, None

        if self.what in ("halo", "halo adjoint"):
            self.patch.setattr(comm, "_shift", no_halo)
        if self.what in ("carry", "carry positions"):
            self.patch.setattr(comm._Gather, "forward", staticmethod(no_gather))
        if self.what == "carry adjoint":
            self.patch.setattr(comm._Gather, "backward", staticmethod(no_scatter))

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
