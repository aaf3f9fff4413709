"""Scorers that learn at ten times the rate: on every ZeRO stage AdamW's steps in plain torch, resumed to the bit."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsek_dist.config import OptimizerConfig
from sparsek_dist.parallel.loss import count_targets, losses
from sparsek_dist.parallel.mesh import build_mesh
from sparsek_dist.training.checkpoint import Checkpoints, Position
from tests.distributed import run_distributed
from tests.training.toys import ToyLoader, seeded_model, toy_config

KINDS = [*((stage, "float32") for stage in (0, 1, 2, 3)), (0, "bfloat16"), (2, "bfloat16")]
"""ZeRO stage and precision; stage 0 in bfloat16 has an optimizer of its own."""
STEPS, SAVED, FACTOR = 4, 2, 10.0
RATES = [0.005, 0.01, 0.01, 0.001]
"""Two steps of warm-up, then from the peak to a tenth of it."""
DECAY = 0.5


def _config(stage: int, precision: str):
    config = toy_config(zero_stage=stage, steps=STEPS, precision=precision)
    optimizer = OptimizerConfig(
        learning_rate=0.01, warmup_steps=2, weight_decay=DECAY, clip_norm=0.0, scorer_rate=FACTOR
    )
    return replace(config, optimizer=optimizer)


def _train(config, mesh, folder: Path, *, resume: bool) -> tuple[dict, list[list[float]]]:
    """The last weights, on rank 0, and the learning rates of all groups at each step."""
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import micro_batches, train_step

    checkpoints = Checkpoints(folder, config, mesh, lambda state, into: save_file(state, into / "model.safetensors"))
    engine = build_engine(seeded_model(scored=True), config, mesh)
    position, rates = Position(), []
    if resume:
        position = checkpoints.restore(engine, checkpoints.find())
        assert position.step == SAVED
    for step in range(position.step, STEPS):
        batches = micro_batches(ToyLoader(config), step, config, mesh, engine.device)
        position = position.after(train_step(engine, batches, step, config, mesh).tokens)
        rates.append([group["lr"] for group in engine.optimizer.param_groups])
        if position.step == SAVED and not resume:
            checkpoints.save(engine, position)
    weights = gather_weights(engine, mesh)
    engine.destroy()
    return weights, rates


def _on_ranks(rank: int, world_size: int, folder: str) -> dict:
    mesh, found = build_mesh(1, timeout=timedelta(seconds=60)), {}
    for stage, precision in KINDS:
        config, place = _config(stage, precision), Path(folder) / f"{stage}-{precision}"
        found[stage, precision] = [_train(config, mesh, place, resume=resume) for resume in (False, True)]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    return run_distributed(_on_ranks, 2, str(tmp_path_factory.mktemp("rates")), timeout=120)[0]


def _in_torch(factor: float) -> dict[str, torch.Tensor]:
    """The same steps in one process, by torch's own optimizer with the rates written down."""
    model, loader = seeded_model(scored=True), ToyLoader(_config(0, "float32"))
    decayed = [model.hidden.weight, model.head.weight]
    plain = [model.position, model.embed.weight, model.hidden.bias]
    groups = [(decayed, DECAY, 1.0), (plain, 0.0, 1.0), ([model.scorer.weight], DECAY, factor)]
    optimizer = torch.optim.AdamW([{"params": p, "weight_decay": d} for p, d, _ in groups], betas=(0.9, 0.95))
    for step, rate in enumerate(RATES):
        batches = [loader.micro_batch(step, 0, data_rank=r, data_degree=2, micro_batch_size=1) for r in range(2)]
        targets = sum(count_targets(batch.labels) for batch in batches)
        nats = sum(losses(model(batch.input_ids, batch.position_ids).logits, batch.labels).sum() for batch in batches)
        optimizer.zero_grad()
        (nats / targets).backward()
        for group, (_, _, times) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * times
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_steps_equal_torch(runs, stage, precision) -> None:
    (weights, rates), _ = runs[stage, precision]
    assert rates == [pytest.approx([rate, rate, FACTOR * rate]) for rate in RATES]
    expected, without = _in_torch(FACTOR), _in_torch(1.0)
    assert (expected["scorer.weight"] - without["scorer.weight"]).abs().max() > 0.1, "the factor would not show"
    tolerance = 2e-5 if precision == "float32" else 3e-2
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name].float(), value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_resume_is_bit_exact(runs, stage, precision) -> None:
    (golden, golden_rates), (weights, rates) = runs[stage, precision]
    assert rates == golden_rates[SAVED:]
    assert all(torch.equal(weights[name], value) for name, value in golden.items())
