"""A SPARSEK model on two sequence-parallel ranks, on every ZeRO stage, takes the step of plain torch in one process.

All parameters, the global gradient norm and the loss are compared, in float32.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig
from sparsek_dist.models import build_model
from sparsek_dist.parallel.loss import count_targets, loss_sum
from sparsek_dist.parallel.mesh import Mesh
from tests.distributed import run_distributed
from tests.training.toys import VOCABULARY, ToyLoader

STAGES = (0, 1, 2, 3)
CASES = [(stage, accumulation, recompute) for stage in STAGES for accumulation, recompute in ((1, False), (2, True))]


def _config(stage: int, accumulation: int, recompute: bool) -> Config:
    config = Config(
        model=ModelConfig(
            hidden_size=20,
            intermediate_size=24,
            num_layers=2,
            num_query_heads=5,
            num_kv_heads=5,
            head_dim=4,
            init_std=0.2,
        ),
        attention=AttentionConfig(num_selected=5, window=4, support=14, gate="value"),
        data=DataConfig(sequence_length=40),
        parallel=ParallelConfig(sequence_degree=2, zero_stage=stage),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=0.0),
    )
    train = replace(
        config.train, accumulation_steps=accumulation, activation_checkpointing=recompute, precision="float32"
    )
    return replace(config, train=train)


@functools.cache
def _step_in_torch(accumulation: int) -> tuple[dict[str, torch.Tensor], float, float]:
    config = _config(0, accumulation, False)
    model, loader = build_model(config, Mesh(), vocab_size=VOCABULARY), ToyLoader(config)
    batches = [
        loader.micro_batch(0, micro, data_rank=0, data_degree=1, micro_batch_size=1) for micro in range(accumulation)
    ]
    targets = sum(count_targets(batch.labels) for batch in batches)
    nats = [
        loss_sum(model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits, batch.labels)
        for batch in batches
    ]
    loss = sum(nats) / targets
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= config.optimizer.learning_rate * parameter.grad
    return {name: p.detach() for name, p in model.named_parameters()}, float(norm), float(loss.detach())


def _step_on_ranks(rank: int, world_size: int, configs: list[Config]) -> list:
    from sparsek_dist.parallel.mesh import build_mesh
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import micro_batches, train_step

    results = []
    for config in configs:
        mesh = build_mesh(2, timeout=timedelta(seconds=60))
        engine = build_engine(build_model(config, mesh, vocab_size=VOCABULARY), config, mesh)
        batches = micro_batches(ToyLoader(config), 0, config, mesh, engine.device)
        outcome = train_step(engine, batches, 0, config, mesh)
        results.append((gather_weights(engine, mesh), outcome))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple, tuple]:
    first, _ = run_distributed(_step_on_ranks, 2, [_config(*case) for case in CASES], timeout=150)
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c[0]}-accumulate{c[1]}" + ("-recomputed" if c[2] else ""))
def test_step_equals_one_process(outcomes, case):
    weights, outcome = outcomes[case]
    expected, norm, loss = _step_in_torch(case[1])
    start = dict(build_model(_config(*case), Mesh(), vocab_size=VOCABULARY).named_parameters())
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-6)
    assert outcome.loss == pytest.approx(loss, rel=1e-6)
    assert outcome.exchanged_bytes > 0
    for name, value in expected.items():
        assert (value - start[name]).abs().max() > 1e-5, f"{name} does not move: the comparison would be empty"
        torch.testing.assert_close(weights[name].float(), value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
