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

from sparsek_dist.attention import exchange
from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig, ParallelConfig
from sparsek_dist.data.loader import Batch
from sparsek_dist.models import build_model
from sparsek_dist.parallel import comm
from sparsek_dist.parallel.loss import IGNORE, losses
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from sparsek_kernels.carry import NOWHERE
from tests.distributed import run_distributed

LENGTH, BATCH, VOCABULARY, STEPS = 48, 4, 11, 5


@dataclass(frozen=True)
class Case:
    attention: AttentionConfig
    documents: str = "one"
    """`one` per sequence, `two` with a boundary in the second shard of 4, `random` boundaries, `many` of them,
    or `edges`: boundaries at shard edges, and one rank without targets."""
    activation_checkpointing: bool = False
    length: int = LENGTH


def _attention(**changes) -> AttentionConfig:
    return replace(AttentionConfig(num_selected=5, window=4, support=12), **changes)


CASES = {
    "defaults": Case(_attention()),
    "straight_through": Case(_attention(gate="straight_through", slope=0.0)),
    "value packed": Case(_attention(gate="value"), "random"),
    "many documents": Case(_attention(gate="value"), "many"),
    "key_value edges": Case(_attention(gate="key_value"), "edges"),
    "not recomputed": Case(_attention(slope=0.01), "random"),
    "recomputed": Case(_attention(slope=0.01), "random", activation_checkpointing=True),
    # What breaks it below must leave the old the better ones here and there, or it would change nothing.
    "all but one supported": Case(_attention(support=6, gate="value", slope=0.0), "two"),
    "more selected than exist": Case(_attention(num_selected=60, support=None, gate="value"), "random"),
    "window of one": Case(_attention(window=1, gate="value"), "random"),
    "window as long as a shard": Case(_attention(window=12)),
    "padded": Case(_attention(gate="value"), "random", length=LENGTH - 1),
    "selected nothing": Case(_attention(num_selected=0)),
    "baseline random": Case(_attention(kind="random"), "random"),
    "baseline sink_window": Case(_attention(kind="sink_window")),
    "baseline window": Case(_attention(kind="window"), "random"),
    "baseline full": Case(_attention(kind="full"), "random"),
    "one layer stays dense": Case(_attention(gate="value", full_layers="1"), "random", length=LENGTH - 1),
    "baseline full in one document": Case(
        _attention(kind="full", num_selected=0), length=LENGTH - 1, activation_checkpointing=True
    ),
}


def _config(case: Case, exchange: str) -> Config:
    # Only Ulysses needs heads that the degree divides; 3 KV heads divide by neither 2 nor 4.
    dense = case.attention.kind == "full" or case.attention.full_layers != "none"
    hidden, heads, head_dim = (24, 24, 2) if dense else (12, 6, 4)
    config = Config(
        model=ModelConfig(
            hidden_size=hidden,
            intermediate_size=20,
            num_layers=2,
            num_query_heads=heads,
            num_kv_heads=heads // 2,
            head_dim=head_dim,
        ),
        attention=case.attention,
        data=DataConfig(sequence_length=case.length),
        parallel=ParallelConfig(exchange=exchange),
    )
    return replace(config, train=replace(config.train, activation_checkpointing=case.activation_checkpointing))


def _batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    begins = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    if case.documents == "random":
        begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.08
    if case.documents == "many":
        begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.5
    if case.documents == "two":
        begins[:, 18] = True
    if case.documents == "edges":
        begins[:, 12::12] = True
    index = torch.arange(LENGTH).expand(BATCH, -1)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    labels = tokens[:, 1:].clone()
    labels[:, :-1][begins[:, 1:]] = IGNORE
    if case.documents == "edges":
        labels[:, 12:24] = IGNORE
    return Batch(*(x[:, : case.length] for x in (tokens, labels, positions)))


def _train(mesh: Mesh, case: Case, steps: int, exchange: str = "auto") -> dict[str, object]:
    """Steps of plain gradient descent on this rank's shards of this rank's sequences."""
    model = build_model(_config(case, exchange), mesh, vocab_size=VOCABULARY).double()
    share, whole = BATCH // mesh.data_degree, _batch(case)
    rows = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    targets = (whole.labels != IGNORE).sum()
    batch = Batch(whole.input_ids[rows], whole.labels[rows], whole.position_ids[rows])
    batch = batch.shard(mesh.sequence.rank, mesh.sequence.size)
    result: dict[str, object] = {"losses": []}
    received_before = sum(mesh.sequence.received.values())
    for step in range(steps):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        loss = losses(logits, batch.labels).sum() / targets
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
    result["received"] = sum(mesh.sequence.received.values()) - received_before
    return result


@dataclass(frozen=True)
class Run:
    degree: int
    case: str
    exchange: str = "auto"
    broken: str | None = None

    @property
    def steps(self) -> int:
        """Of plain gradient descent. One is enough to see a break, and two to see what steps add to each other."""
        return 1 if self.broken else STEPS if self.case == "value packed" else 2


def _worker(rank: int, world_size: int, runs: list[Run]) -> list[dict[str, object]]:
    meshes = {degree: build_mesh(degree, timeout=timedelta(seconds=60)) for degree in sorted({r.degree for r in runs})}
    results = []
    for run in runs:
        with _break(run.broken):
            results.append(_train(meshes[run.degree], CASES[run.case], run.steps, run.exchange))
    return results


def _errors(ranks: list[dict], expected: dict, degree: int) -> dict[str, float]:
    """Largest relative error of outputs, of any parameter's gradient, and of the losses, over all ranks."""
    groups = [ranks[start : start + degree] for start in range(0, len(ranks), degree)]
    logits = torch.cat([torch.cat([r["logits"] for r in group], dim=1) for group in groups])
    logits = logits[:, : expected["logits"].shape[1]]

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))

    return {
        "outputs": relative(logits, expected["logits"]),
        "gradients": max(relative(r["grads"][name], grad) for r in ranks for name, grad in expected["grads"].items()),
        "losses": max(relative(r["losses"], expected["losses"]) for r in ranks),
    }


@functools.cache
def _expected(name: str, steps: int) -> dict[str, object]:
    return _train(Mesh(), CASES[name], steps)


@functools.cache
def _outcomes(world_size: int) -> list[tuple[Run, list[dict]]]:
    """Every run with what its ranks found: one start of processes for all tests of one world size."""
    runs = [Run(world_size, name, exchange) for name, case in CASES.items() for exchange in _exchanges(case)]
    if world_size == 4:
        # Beside data parallelism, and data parallelism alone; and broken.
        runs += [Run(2, "value packed", "scan"), Run(1, "value packed")]
        # With k = S - 1 a summary cannot help being full, so that an entry too much pushes out one that was needed.
        runs += [Run(4, "all but one supported", exchange, broken) for broken, (exchange, _) in BREAKS.items()]
    ranks = run_distributed(_worker, world_size, runs, timeout=250)
    return [(run, [rank[index] for rank in ranks]) for index, run in enumerate(runs)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_degree_equals_one_process(world_size):
    outcomes = {run: ranks for run, ranks in _outcomes(world_size) if not run.broken}
    for run, ranks in outcomes.items():
        errors = _errors(ranks, _expected(run.case, run.steps), run.degree)
        assert max(errors.values()) < 1e-10, f"{run}: {errors}"
        if run.case == "recomputed":
            plain = outcomes[replace(run, case="not recomputed")]
            assert [rank["received"] for rank in ranks] == [rank["received"] for rank in plain]
        if run.case == "baseline full":
            # Two layers, forward and backward, float64; and positions as int32, forward.
            tokens, p = BATCH * LENGTH // run.degree, run.degree
            each = 2 * (2 * (2 * 24 + 2 * 12) * 2 * 8 * tokens * (p - 1) // p + 4 * tokens * (p - 1))
            assert [rank["received"] for rank in ranks] == [each * run.steps] * p


def _exchanges(case: Case) -> tuple[str, ...]:
    selects = case.attention.kind not in ("window", "full") and case.attention.num_selected > 0
    return ("all_gather", "scan") if selects else ("auto",)


# What each one breaks, on 4 ranks, and where it must show.
BREAKS = {
    "halo": ("all_gather", "outputs"),
    "halo adjoint": ("all_gather", "gradients"),
    "gather": ("all_gather", "outputs"),
    "gather adjoint": ("all_gather", "gradients"),
    "gather positions": ("all_gather", "outputs"),
    "scan": ("scan", "outputs"),
    "scan adjoint": ("scan", "gradients"),
    "scan positions": ("scan", "outputs"),
    "scan round 2": ("scan", "outputs"),
    "scan round 2 adjoint": ("scan", "gradients"),
    "scan keeps ended documents": ("scan", "outputs"),
    "scan drops unended documents": ("scan", "outputs"),
}


def test_every_exchange_and_adjoint_is_needed():
    broken = [(run, ranks) for run, ranks in _outcomes(4) if run.broken]
    assert len(broken) == len(BREAKS)
    for run, ranks in broken:
        errors = _errors(ranks, _expected(run.case, run.steps), run.degree)
        assert errors[BREAKS[run.broken][1]] > 1e-6, f"without the {run.broken} nothing changed: {errors}"


class _break:
    """Within it, one exchange does nothing: it keeps its shape and loses its content."""

    def __init__(self, what: str | None) -> None:
        self.patch = pytest.MonkeyPatch()
        self.what = what or ""

    def __enter__(self) -> None:
        shift, arrived, scan = comm._shift, exchange._from_wire, exchange._scan_earlier
        name, adjoint = self.what.removesuffix(" adjoint"), self.what.endswith("adjoint")

        def no_shift(message, group, distance, kind, flight):
            received = shift(message, group, distance, kind, flight)
            hit = {"halo": kind == "halo", "scan": kind == "carry", "scan round 2": abs(distance) == 2}[name]
            return torch.zeros_like(received) if hit and adjoint == (distance < 0) else received

        def no_gather(message, group, kind, flight):
            return message.new_zeros(group.size, message.numel())

        def no_scatter(rows, group, kind):
            return rows[group.rank]

        def just_left(message, *, shift):
            part = arrived(message, shift=shift)
            return replace(part, positions=part.positions.clamp(max=NOWHERE).where(part.positions < -LENGTH, -1))

        def with_starts(change):
            return lambda own, mine, starts, group: scan(own, mine, change(starts), group)

        patches = {
            "halo": (comm, "_shift", no_shift),
            "scan": (comm, "_shift", no_shift),
            "scan round 2": (comm, "_shift", no_shift),
            "gather": (comm, "_reduce_scatter", no_scatter) if adjoint else (comm, "_all_gather", no_gather),
            "gather positions": (exchange, "_from_wire", just_left),
            "scan positions": (exchange, "_from_wire", just_left),
            "scan keeps ended documents": (exchange, "_scan_earlier", with_starts(lambda x: x - LENGTH)),
            "scan drops unended documents": (exchange, "_scan_earlier", with_starts(lambda x: x + LENGTH)),
        }
        if name:
            self.patch.setattr(*patches[name])

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
