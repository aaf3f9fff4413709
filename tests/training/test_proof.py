"""The proof: however ranks share the work, one step of training is the step of one process in plain torch.

The product of sequence-parallel and data-parallel degree, ZeRO stage, gradient accumulation, exchange, packing and
gate: all of it in `make test-full`, a fixed sample in every run. Plain SGD, because Adam would hide a wrong scale; no
clipping; a length that no degree divides, so that every shared sequence is padded; targets very unevenly spread.
Compared are all parameters after the step, the global gradient norm, the loss and the held-out loss.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch

from sparsek_dist.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from sparsek_dist.data.loader import Batch
from sparsek_dist.evaluation.perplexity import evaluate
from sparsek_dist.models import build_model
from sparsek_dist.parallel import comm
from sparsek_dist.parallel.loss import IGNORE, count_targets, losses
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_distributed

SEQUENCES, LENGTH, VOCABULARY = 4, 29, 41
MESHES = [(2, 1), (2, 2), (3, 3), (4, 2), (4, 4)]
"""Processes, and how many share a sequence."""
WORLDS = sorted({world for world, _ in MESHES})
GATES = ("straight_through", "value", "key_value")
SAMPLE = 6
"""Combinations of each mesh in an ordinary run."""


@dataclass(frozen=True)
class Combination:
    world: int
    degree: int
    stage: int = 0
    accumulation: int = 1
    exchange: str = "all_gather"
    documents: str = "packed"
    gate: str = "value"
    broken: str = ""


def _combinations() -> list[Combination]:
    rest = itertools.product((0, 1, 2, 3), (1, 2), ("all_gather", "scan"), ("one", "packed"), GATES)
    product = [Combination(*mesh, *values) for values in rest for mesh in MESHES]
    # Where no sequence is shared there is nothing to exchange.
    return [c for c in product if c.degree > 1 or c.exchange == "all_gather"]


ALL = _combinations()
BY_MESH = [[c for c in ALL if (c.world, c.degree) == mesh] for mesh in MESHES]
CHOSEN = [c for same in BY_MESH for c in random.Random(0).sample(same, SAMPLE)]


def _config(c: Combination) -> Config:
    return Config(
        model=ModelConfig(
            hidden_size=12,
            intermediate_size=16,
            num_layers=2,
            num_query_heads=6,
            num_kv_heads=3,
            head_dim=4,
            init_std=0.3,
        ),
        attention=AttentionConfig(num_selected=4, window=3, support=9, gate=c.gate),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(sequence_degree=c.degree, zero_stage=c.stage, exchange=c.exchange),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=0.0),
        train=TrainConfig(
            micro_batch_size=SEQUENCES * c.degree // c.world // c.accumulation,
            accumulation_steps=c.accumulation,
            # Not a dimension of its own: half of everything recomputes.
            activation_checkpointing=c.accumulation == 2,
            precision="float32",
        ),
    )


def _whole(documents: str) -> Batch:
    generator = torch.Generator().manual_seed(11)
    # No token twice: equal tokens have equal scores in the first layer, and in float32 equal up to rounding, which
    # depends on the shape of the batch. The later of two equals wins, but of two nearly equals either may.
    tokens = torch.rand(SEQUENCES, VOCABULARY, generator=generator).argsort(dim=1)[:, : LENGTH + 1]
    begins = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    if documents == "packed":
        # None, one or many in a shard.
        begins = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.tensor([[0.0], [0.05], [0.15], [0.5]])
    index = torch.arange(LENGTH).expand(SEQUENCES, -1)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    labels = tokens[:, 1:].clone()
    labels[:, :-1][begins[:, 1:]] = IGNORE
    # One sequence is nearly without targets, and the first third of another has none.
    labels[0, 2:] = IGNORE
    labels[1, : LENGTH // 3] = IGNORE
    return Batch(tokens[:, :-1].contiguous(), labels, positions)


class FixedLoader:
    def __init__(self, documents: str) -> None:
        self.whole = _whole(documents)

    def micro_batch(self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> Batch:
        begin = (micro * data_degree + data_rank) * micro_batch_size
        rows = slice(begin, begin + micro_batch_size)
        return Batch(self.whole.input_ids[rows], self.whole.labels[rows], self.whole.position_ids[rows])


@functools.cache
def _expected(documents: str, gate: str) -> dict:
    """The same step in one process, in plain torch."""
    config = _config(Combination(1, 1, documents=documents, gate=gate))
    model, batch = build_model(config, Mesh(), vocab_size=VOCABULARY), _whole(documents)

    def nats() -> torch.Tensor:
        return losses(model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits, batch.labels).sum()

    loss = nats() / count_targets(batch.labels)
    loss.backward()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= config.optimizer.learning_rate * parameter.grad
        held_out = nats() / count_targets(batch.labels)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, value in weights.items():
        assert (value - start[name]).abs().max() > 1e-5, f"{name} does not move: the comparison would be empty"
    return {"weights": weights, "loss": float(loss.detach()), "norm": float(norm), "held_out": float(held_out)}


def _errors(found: dict, c: Combination) -> dict[str, float]:
    """Absolute for parameters, relative for the numbers."""
    expected = _expected(c.documents, c.gate)
    errors = {name: abs(found[name] / expected[name] - 1) for name in ("loss", "norm", "held_out")}
    weights = expected["weights"]
    return errors | {"weights": max(float((found["weights"][n] - x).abs().max()) for n, x in weights.items())}


def _steps(rank: int, world_size: int, combinations: list[Combination]) -> list[dict]:
    from sparsek_dist.training import loop
    from sparsek_dist.training.engine import build_engine, gather_weights

    degrees = sorted({c.degree for c in combinations})
    meshes = {degree: build_mesh(degree, timeout=timedelta(seconds=60)) for degree in degrees}
    results = []
    for c in combinations:
        config, mesh, loader = _config(c), meshes[c.degree], FixedLoader(c.documents)
        engine = build_engine(build_model(config, mesh, vocab_size=VOCABULARY), config, mesh)
        with pytest.MonkeyPatch.context() as patch:
            _break(c.broken, patch)
            batches = loop.micro_batches(loader, 0, config, mesh, engine.device)
            outcome = loop.train_step(engine, batches, 0, config, mesh)
        batch = loader.micro_batch(
            0, 0, data_rank=mesh.data_rank, data_degree=mesh.data_degree, micro_batch_size=SEQUENCES // mesh.data_degree
        )
        held_out = evaluate(engine, [batch], mesh, count_bytes=count_targets, device=engine.device)
        weights = gather_weights(engine, mesh)
        engine.destroy()
        # The first rank holds the weights; the others agree about the numbers.
        numbers = {"loss": outcome.loss, "norm": outcome.grad_norm, "held_out": held_out.loss}
        results.append(numbers | {"weights": weights})
    return results


def _break(what: str, patch: pytest.MonkeyPatch) -> None:
    shift, scatter = comm._shift, comm._reduce_scatter
    if what == "loss scale":
        from sparsek_dist.training import loop

        scaled = loop.engine_loss
        patch.setattr(loop, "engine_loss", lambda *args, **kwargs: scaled(*args, **kwargs) * 2)
    if what == "gather adjoint":
        patch.setattr(comm, "_reduce_scatter", lambda rows, *args: scatter(rows, *args) * 0 + rows[args[0].rank])
    if what in ("halo adjoint", "scan adjoint"):
        kind = "halo" if what == "halo adjoint" else "carry"

        def without_adjoint(message, group, distance, of, flight):
            received = shift(message, group, distance, of, flight)
            return torch.zeros_like(received) if distance < 0 and of == kind else received

        patch.setattr(comm, "_shift", without_adjoint)


def _check(combinations: list[Combination], by_rank: list[list[dict]]) -> None:
    for index, c in enumerate(combinations):
        assert len({tuple(rank[index][name] for name in ("loss", "norm", "held_out")) for rank in by_rank}) == 1, c
        errors = _errors(by_rank[0][index], c)
        assert max(errors.values()) < 2e-6, f"{c}: {errors}"


@functools.cache
def _sample(world: int) -> tuple[list[Combination], list[list[dict]]]:
    """The sample of one world size, with the broken ones behind it: one start of processes for both tests."""
    chosen = [c for c in CHOSEN + BROKEN if c.world == world]
    return chosen, run_distributed(_steps, world, chosen, timeout=280)


@pytest.mark.parametrize("world", WORLDS)
def test_sample_of_combinations(world):
    combinations, by_rank = _sample(world)
    _check([c for c in combinations if not c.broken], by_rank)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", WORLDS)
def test_all_combinations(world):
    combinations = [c for c in ALL if c.world == world]
    _check(combinations, run_distributed(_steps, world, combinations, timeout=1700))


def test_there_are_enough_combinations():
    assert len(set(ALL)) == len(ALL) == 432 and len(CHOSEN) == SAMPLE * len(MESHES)


BREAKS = {"loss scale": "all_gather", "gather adjoint": "all_gather", "halo adjoint": "scan", "scan adjoint": "scan"}
BROKEN = [Combination(2, 2, stage, exchange=BREAKS[what], broken=what) for what in BREAKS for stage in (1, 3)]


def test_a_wrong_gradient_would_be_noticed():
    combinations, by_rank = _sample(2)
    broken = [(found, c) for found, c in zip(by_rank[0], combinations, strict=True) if c.broken]
    assert len(broken) == len(BROKEN)
    for found, c in broken:
        errors = _errors(found, replace(c, broken=""))
        assert errors["loss"] < 2e-6, "the step's own loss is computed before anything breaks"
        assert errors["weights"] > 1e-4 and errors["norm"] > 1e-4, f"{c}: {errors}"
