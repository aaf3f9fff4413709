"""The loop: numbers that are not finite stop all ranks at the same step, before they can be saved."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from sparsek_dist.errors import NumericsError, PeerError
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from sparsek_dist.training import loop
from sparsek_dist.training.checkpoint import Position
from sparsek_dist.training.checksum import checksum
from sparsek_dist.training.loop import Run, StepOutcome, fit, micro_batches, train_step
from tests.distributed import run_distributed
from tests.training.toys import ToyLoader, ToyModel, seeded_model, toy_config

STAGES = (0, 1, 2, 3)


def _poison(where: str, model: ToyModel) -> None:
    """From now on, NaN in this rank's loss, or only in its gradient."""
    if where == "loss":
        model.head.register_forward_hook(lambda module, args, output: output * float("nan"))
    else:
        model.hidden.weight.register_hook(lambda gradient: gradient * float("nan"))


def _stop_on_ranks(rank: int, world_size: int) -> list:
    from sparsek_dist.training.engine import build_engine, gather_weights

    mesh, results = build_mesh(2, timeout=timedelta(seconds=30)), []
    for where in ("loss", "gradient"):
        for stage in STAGES:
            config = toy_config(zero_stage=stage, sequence_degree=2, accumulation_steps=2)
            model = seeded_model()
            if rank == 1:
                _poison(where, model)
            engine = build_engine(model, config, mesh)
            before = gather_weights(engine, mesh)
            batches = micro_batches(ToyLoader(config), 6, config, mesh, engine.device)
            try:
                train_step(engine, batches, 6, config, mesh)
                told = "nothing"
            except NumericsError as error:
                told = str(error)
            after = gather_weights(engine, mesh)
            results.append((where, stage, told, all(torch.equal(after[name], before[name]) for name in before)))
            engine.destroy()
    return results


def test_not_finite_on_one_rank_stops_all() -> None:
    by_rank = run_distributed(_stop_on_ranks, 2, timeout=90)
    for rank, results in enumerate(by_rank):
        assert len(results) == 2 * len(STAGES)
        for where, stage, told, unchanged in results:
            name = "loss" if where == "loss" else "gradient norm"
            assert told.startswith(f"step 7: the {name} is "), (rank, where, stage, told)
            if where == "loss":
                assert unchanged, f"stage {stage} took a step with a NaN loss"


def _compare_on_ranks(rank: int, world_size: int) -> list:
    from sparsek_dist.training.checksum import require_equal_parameters
    from sparsek_dist.training.engine import build_engine

    mesh, told = build_mesh(2, timeout=timedelta(seconds=30)), []
    for stage in STAGES:
        config = toy_config(zero_stage=stage, sequence_degree=2)
        engine = build_engine(seeded_model(), config, mesh)
        train_step(engine, micro_batches(ToyLoader(config), 0, config, mesh, engine.device), 0, config, mesh)
        require_equal_parameters(engine, mesh.world, 1)
        # On stage 3 a rank holds no copy that could differ: only a part that all take from it.
        if stage < 3:
            if rank == 1:
                with torch.no_grad():
                    weight = engine.module.hidden.weight
                    weight[3, 2] = torch.nextafter(weight[3, 2], weight.new_tensor(9.0))
            try:
                require_equal_parameters(engine, mesh.world, 1)
            except PeerError as error:
                told.append(str(error))
        engine.destroy()
    return told


def test_one_bit_of_one_rank_is_noticed_by_all() -> None:
    first, second = run_distributed(_compare_on_ranks, 2, timeout=90)
    assert first == second and len(first) == 3
    assert all("1 of 5 parameters differ" in told and "hidden.weight" in told and "ranks [1]" in told for told in first)


def test_checksum_sees_bits_and_order() -> None:
    x = torch.tensor([1.0, 2.0, -0.0])
    assert len({int(checksum(y)) for y in (x, x.flip(0), -x, x.bfloat16(), x + 0.0)}) == 5
    assert checksum(x) == checksum(x.clone().view(3, 1))
    assert checksum(torch.randn(3, 5, dtype=torch.float64).T).dtype == torch.int64


def _fit(monkeypatch, start: int = 0, **train) -> list[str]:
    """What `fit` does in which order, with everything around it replaced by notes."""
    notes: list[str] = []

    def take_step(engine, batches, step, config, mesh):
        notes.append(f"step {step + 1}")
        return StepOutcome(loss=1.0, grad_norm=1.0, tokens=16, exchanged_bytes=0)

    def evaluate() -> dict[str, float]:
        notes.append("evaluate")
        return {"loss": float(len(notes))}

    def note(word: str):
        return lambda *args: notes.append(word)

    monkeypatch.setattr(loop, "train_step", take_step)
    monkeypatch.setattr(loop, "require_equal_parameters", note("compare"))
    config = toy_config(**train)
    result = fit(
        Run(
            config=config,
            mesh=Mesh(),
            engine=SimpleNamespace(device=torch.device("cpu"), optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}])),
            loader=ToyLoader(config),
            log=SimpleNamespace(step=note("log"), figure=note("figure")),
            progress=SimpleNamespace(start=note("start"), step=lambda *args: None),
            checkpoints=SimpleNamespace(save=lambda engine, position: notes.append(f"save {position.tokens}")),
            evaluate=evaluate,
            observe=lambda batch: (notes.append("observe"), ({}, {"picture": None}))[1],
        ),
        Position(start, 16 * start),
    )
    assert result == {"loss": float(max(i for i, word in enumerate(notes) if word == "evaluate") + 1)}
    return notes


def test_order(monkeypatch) -> None:
    assert _fit(monkeypatch, steps=3, observe_every=2, eval_every=2, save_every=2, compare_every=2) == [
        "start",
        *["step 1", "log"],
        *["step 2", "compare", "observe", "figure", "evaluate", "log", "save 32"],
        # The last step is always evaluated and saved.
        *["step 3", "evaluate", "log", "save 48"],
    ]


def test_zero_means_never(monkeypatch) -> None:
    notes = _fit(monkeypatch, start=1, steps=3, observe_every=0, eval_every=0, save_every=9)
    assert notes == ["start", "step 2", "log", "step 3", "evaluate", "log", "save 48"]


def test_finished_run_is_only_evaluated(monkeypatch) -> None:
    assert _fit(monkeypatch, start=3, steps=3) == ["start", "evaluate"]


def test_micro_batches_are_shards() -> None:
    config = toy_config(sequence_degree=2, accumulation_steps=3, micro_batch_size=2)
    (whole, *_), loader = micro_batches(ToyLoader(config), 4, config, Mesh(), torch.device("cpu")), ToyLoader(config)
    second = replace(Mesh(), sequence=SimpleNamespace(rank=1, size=2), world=SimpleNamespace(rank=1, size=2))
    shards = micro_batches(loader, 4, config, second, torch.device("cpu"))
    assert len(shards) == 3 and shards[0].input_ids.shape == (2, 8)
    assert torch.equal(shards[0].labels, whole.labels[:, 8:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_not_finite(value) -> None:
    with pytest.raises(NumericsError, match="step 9: the gradient norm"):
        loop._require_finite("gradient norm", value, 9)
