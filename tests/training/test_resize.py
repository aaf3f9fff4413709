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


def _config(stage: int, world_size: int, degree: int, precision: str):
    accumulation = 2 if world_size == 2 else 1
    share = SEQUENCES * degree // world_size // accumulation
    config = toy_config(
        zero_stage=stage,
        sequence_degree=degree,
        accumulation_steps=accumulation,
        micro_batch_size=share,
        steps=STEPS,
        precision=precision,
    )
    # Three groups, each with settings of its own.
    return replace(config, optimizer=replace(config.optimizer, weight_decay=5.0, scorer_rate=2.0))


def _export(state: dict, folder: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")


def _run(config, mesh, folder: Path, *, resume: bool) -> tuple[list[float], dict]:
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import micro_batches, train_step

    checkpoints = Checkpoints(folder / "checkpoints", config, mesh, _export)
    found = checkpoints.find() if resume else None
    engine = build_engine(seeded_model(scored=True), config, mesh)
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
    groups = [(group["weight_decay"], group.get("lr_factor")) for group in engine.optimizer.param_groups]
    assert groups == [(5.0, None), (0.0, None), (5.0, 2.0)], groups
    weights = gather_weights(engine, mesh)
    engine.destroy()
    return losses, weights


Kind = tuple[int, str]
"""ZeRO stage and precision."""


def _first(rank: int, world_size: int, folder: str, kinds: list[Kind]) -> dict:
    mesh = build_mesh(FIRST[1], timeout=timedelta(seconds=60))
    return {kind: _run(_config(kind[0], *FIRST, kind[1]), mesh, _folder(folder, kind), resume=False) for kind in kinds}


def _again(rank: int, world_size: int, folder: str, kinds: list[Kind], degrees: list[int]) -> dict:
    results = {}
    for degree in degrees:
        mesh = build_mesh(degree, timeout=timedelta(seconds=60))
        for kind in kinds:
            config = _config(kind[0], world_size, degree, kind[1])
            results[world_size, degree, kind] = _run(config, mesh, _folder(folder, kind), resume=True)
    return results


def _folder(folder: str, kind: Kind) -> Path:
    return Path(folder) / f"{kind[0]}-{kind[1]}"


def _compare(folder: Path, kinds: list[Kind], resized: list[tuple[int, int]]) -> None:
    first = run_distributed(_first, FIRST[0], str(folder), kinds, timeout=200)[0]
    for size in sorted({size for size, _ in resized}):
        degrees = [degree for other, degree in resized if other == size]
        found = run_distributed(_again, size, str(folder), kinds, degrees, timeout=400)[0]
        for (_, degree, kind), (losses, weights) in found.items():
            golden, golden_weights = first[kind]
            told = f"ZeRO {kind[0]} in {kind[1]}, {FIRST} -> {size, degree}"
            precise = kind[1] == "float32"
            assert len(set(golden)) == STEPS
            assert losses == pytest.approx(golden[SAVED:], rel=2e-6 if precise else 5e-3), told
            for name, value in golden_weights.items():
                tolerance = {"rtol": 1e-5, "atol": 2e-6} if precise else {"rtol": 2e-2, "atol": 2e-2}
                torch.testing.assert_close(
                    weights[name], value, **tolerance, msg=lambda m, n=name, t=told: f"{t} {n} {m}"
                )


def test_one_process_continues_what_two_began(tmp_path) -> None:
    _compare(tmp_path, [(3, "float32")], [(1, 1)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_process_count_continues_on_every_stage(tmp_path) -> None:
    _compare(tmp_path, [(stage, "float32") for stage in STAGES], RESIZED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bfloat16(tmp_path) -> None:
    _compare(tmp_path, [(stage, "bfloat16") for stage in STAGES], [(1, 1), (4, 4)])


def test_a_failed_conversion_is_told_by_all(tmp_path) -> None:
    from sparsek_dist.training.resize import _convert

    (tmp_path / "engine").mkdir()
    with pytest.raises(CheckpointError, match="with as many processes as wrote it"):
        _convert(tmp_path / "engine", tmp_path / "whole")
