"""Another number of processes continues a run: the losses are those of the run that was never interrupted.

Two ranks train six steps; then two again, one, and four continue from step three, with data and sequences shared out
in other ways.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsek_dist.errors import CheckpointError
from sparsek_dist.parallel.mesh import build_mesh
from sparsek_dist.training.checkpoint import Checkpoints, Position
from tests.distributed import run_distributed
from tests.training.toys import Batch, ToyLoader, seeded_model, toy_config

STAGES = (0, 1, 2, 3)
SEQUENCES, STEPS, SAVED = 4, 6, 3
FIRST = (2, 1)
"""Processes and sequence-parallel degree of the interrupted run."""
RESIZED = [(1, 1), (2, 2), (4, 2), (4, 4)]


class GlobalLoader(ToyLoader):
    """The same sequences at a step, however they are shared out."""

    def micro_batch(self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> Batch:
        begin = (micro * data_degree + data_rank) * micro_batch_size
        rows = [
            super(GlobalLoader, self).micro_batch(step, begin + i, data_rank=0, data_degree=1, micro_batch_size=1)
            for i in range(micro_batch_size)
        ]
        names = ("input_ids", "labels", "position_ids")
        return Batch(*(torch.cat([getattr(row, name) for row in rows]) for name in names))


def _config(stage: int, world_size: int, degree: int):
    accumulation = 2 if world_size == 2 else 1
    share = SEQUENCES * degree // world_size // accumulation
    config = toy_config(
        zero_stage=stage, sequence_degree=degree, accumulation_steps=accumulation, micro_batch_size=share, steps=STEPS
    )
    return replace(config, optimizer=replace(config.optimizer, weight_decay=5.0))


def _export(state: dict, folder: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")


def _run(config, mesh, folder: Path, *, resume: bool) -> tuple[list[float], dict]:
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import micro_batches, train_step

    checkpoints = Checkpoints(folder / "checkpoints", config, mesh, _export)
    found = checkpoints.find() if resume else None
    engine = build_engine(seeded_model(), config, mesh)
    position = checkpoints.restore(engine, found) if found else Position()
    assert position.step == (SAVED if resume else 0)
    losses = []
    for step in range(position.step, STEPS):
        outcome = train_step(
            engine, micro_batches(GlobalLoader(config), step, config, mesh, engine.device), step, config, mesh
        )
        position = position.after(outcome.tokens)
        losses.append(outcome.loss)
        if position.step == SAVED:
            checkpoints.save(engine, position)
    decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
    assert decay == [5.0, 0.0], decay
    weights = gather_weights(engine, mesh)
    engine.destroy()
    return losses, weights


def _first(rank: int, world_size: int, folder: str) -> list:
    mesh = build_mesh(FIRST[1], timeout=timedelta(seconds=60))
    return [_run(_config(stage, *FIRST), mesh, Path(folder) / str(stage), resume=False) for stage in STAGES]


def _again(rank: int, world_size: int, folder: str) -> dict:
    results = {}
    for degree in [degree for size, degree in RESIZED if size == world_size]:
        mesh = build_mesh(degree, timeout=timedelta(seconds=60))
        for stage in STAGES:
            config = _config(stage, world_size, degree)
            results[degree, stage] = _run(config, mesh, Path(folder) / str(stage), resume=True)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[list, dict]:
    folder = tmp_path_factory.mktemp("resize")
    first = run_distributed(_first, FIRST[0], str(folder), timeout=120)[0]
    resumed = {}
    for size in sorted({size for size, _ in RESIZED}):
        outcome = run_distributed(_again, size, str(folder), timeout=280)[0]
        resumed |= {(size, *key): value for key, value in outcome.items()}
    return first, resumed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("size", "degree"), RESIZED)
def test_losses_are_those_of_the_uninterrupted_run(runs, stage, size, degree) -> None:
    (golden, golden_weights), (losses, weights) = runs[0][stage], runs[1][size, degree, stage]
    assert losses == pytest.approx(golden[SAVED:], rel=2e-6)
    assert len(set(golden)) == STEPS
    for name, value in golden_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_a_failed_conversion_is_told_by_all(tmp_path) -> None:
    from sparsek_dist.training.resize import _convert

    (tmp_path / "engine").mkdir()
    with pytest.raises(CheckpointError, match="with as many processes as wrote it"):
        _convert(tmp_path / "engine", tmp_path / "whole")
