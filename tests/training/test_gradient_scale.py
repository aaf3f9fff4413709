"""The pin under everything: one optimizer step on two ranks that share a sequence equals one step of plain torch.

DeepSpeed divides gradients differently depending on how it learns of sequence parallelism, and a wrong scale hides
behind Adam and behind clipping. So: plain SGD, no clipping, very uneven targets, every ZeRO stage.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from sparsek_dist.config import OptimizerConfig
from sparsek_dist.parallel import head
from sparsek_dist.parallel.loss import count_targets, losses
from tests.distributed import run_distributed
from tests.training.toys import VOCABULARY, ToyLoader, seeded_model, toy_config

STAGES = (0, 1, 2, 3)
ACCUMULATION = 2
SCALE = 8.0
"""Brings the gradient norm above 1, where DeepSpeed clips unless it is told not to."""


def _config(zero_stage: int, *, sequence_degree: int, clip_norm: float = 0.0, precision: str = "float32"):
    config = toy_config(
        zero_stage=zero_stage, sequence_degree=sequence_degree, accumulation_steps=ACCUMULATION, precision=precision
    )
    sgd = OptimizerConfig(name="sgd", learning_rate=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=clip_norm)
    return replace(config, optimizer=sgd)


def _step_in_torch(config, data_degree: int) -> tuple[dict[str, torch.Tensor], float]:
    """The same step with all tokens in one process: gradient of sum(nats) / sum(targets)."""
    model, loader = seeded_model(scale=SCALE), ToyLoader(config)
    batches = [
        loader.micro_batch(0, micro, data_rank=rank, data_degree=data_degree, micro_batch_size=1)
        for micro in range(ACCUMULATION)
        for rank in range(data_degree)
    ]
    targets = sum(count_targets(batch.labels) for batch in batches)
    for batch in batches:
        (losses(model(batch.input_ids, batch.position_ids).logits, batch.labels).sum() / targets).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    scale = min(1.0, config.optimizer.clip_norm / float(norm)) if config.optimizer.clip_norm else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= config.optimizer.learning_rate * scale * parameter.grad
    return dict(model.state_dict()), float(norm)


def _step_on_ranks(rank: int, world_size: int, configs: list) -> list:
    from sparsek_dist.parallel.mesh import build_mesh
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import micro_batches, train_step

    results = []
    giving, tiled_calls = head._giving_losses, []
    head._giving_losses = lambda module, labels: tiled_calls.append(labels.numel()) or giving(module, labels)
    head.NUMBERS_AT_ONCE = 3 * VOCABULARY
    for config, tiled in configs:
        head._worth_tiles = lambda module, n, tiled=tiled: tiled
        tiled_calls.clear()
        mesh = build_mesh(config.parallel.sequence_degree, timeout=timedelta(seconds=30))
        engine = build_engine(seeded_model(scale=SCALE), config, mesh)
        batches = micro_batches(ToyLoader(config), 0, config, mesh, engine.device)
        outcome = train_step(engine, batches, 0, config, mesh)
        assert tiled_calls == [8] * ACCUMULATION * tiled
        results.append((gather_weights(engine, mesh), outcome.grad_norm, outcome.loss, engine.train_batch_size()))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def cases() -> dict[tuple, tuple]:
    """Every case in one start of two processes."""
    keys = [(stage, degree, clip, "float32") for stage in STAGES for degree in (1, 2) for clip in (0.0, 0.05)]
    keys += [(stage, 2, 0.0, precision) for stage in STAGES for precision in ("bfloat16", "float32 in tiles")]
    configs = [_config(s, sequence_degree=d, clip_norm=c, precision=p.split()[0]) for s, d, c, p in keys]
    tiled = ["tiles" in precision for *_, precision in keys]
    by_rank = run_distributed(_step_on_ranks, 2, list(zip(configs, tiled, strict=True)), timeout=120)
    return {
        key: (config, by_rank[0][i], by_rank[1][i]) for i, (key, config) in enumerate(zip(keys, configs, strict=True))
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("degree", [1, 2], ids=["data_parallel", "sequence_parallel"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_step_equals_torch(cases, stage, degree, clip_norm) -> None:
    _equals_torch(*cases[stage, degree, clip_norm, "float32"], degree)


@pytest.mark.parametrize("stage", STAGES)
def test_a_head_in_tiles_equals_torch(cases, stage) -> None:
    """Shards of 8 tokens, 3 at a time: one backward pass uses the weights of the head in three tiles."""
    _equals_torch(*cases[stage, 2, 0.0, "float32 in tiles"], 2)


def _equals_torch(config, mine: tuple, others: tuple, degree: int) -> None:
    weights, norm, loss, batch_size = mine
    _, other_norm, other_loss, _ = others
    expected, expected_norm = _step_in_torch(config, data_degree=2 // degree)
    start = seeded_model(scale=SCALE).state_dict()
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    assert (norm, loss) == (other_norm, other_loss)
    assert expected_norm > 1, "or neither clipping nor its absence would show"
    assert type(batch_size) is int
    for name, value in expected.items():
        assert (value - start[name]).abs().max() > 1e-4, f"{name} does not move: the comparison would be empty"
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_scale(cases, stage) -> None:
    """In bfloat16 the norm must still be right to the precision of the format: a factor of 2 would show."""
    config, (weights, norm, _, _), _ = cases[stage, 2, 0.0, "bfloat16"]
    expected, expected_norm = _step_in_torch(config, data_degree=1)
    assert norm == pytest.approx(expected_norm, rel=2e-2)
    for name, value in expected.items():
        assert weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(weights[name].float(), value, rtol=2e-2, atol=2e-2, msg=name)
