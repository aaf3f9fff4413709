"""The learning rate and the parameter groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsek_dist.config import Config, OptimizerConfig, TrainConfig
from sparsek_dist.errors import ConfigError
from sparsek_dist.training.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    scorer_learning_rate,
    set_learning_rate,
)
from tests.training.toys import seeded_model


def _config(steps: int, warmup: int, peak: float = 1.0, final: float = 0.1) -> Config:
    optimizer = OptimizerConfig(learning_rate=peak, warmup_steps=warmup, final_ratio=final)
    return Config(optimizer=optimizer, train=TrainConfig(steps=steps))


def test_learning_rate_literally() -> None:
    config = _config(steps=9, warmup=4)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5), 0.55]
    assert [learning_rate(step, config) for step in range(7)] == pytest.approx(expected)
    assert learning_rate(8, config) == pytest.approx(0.1)


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0, 1))
def test_learning_rate_properties(steps, warmup, final) -> None:
    config = _config(steps, warmup, final=final)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 or (final == 0 and rate >= 0) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < steps - 1:
        assert rates[-1] == pytest.approx(final, abs=1e-9)


def test_groups() -> None:
    model = seeded_model()
    decayed, plain = parameter_groups(model, 0.3)
    assert [id(p) for p in decayed["params"]] == [id(model.hidden.weight), id(model.head.weight)]
    assert [id(p) for p in plain["params"]] == [id(model.position), id(model.embed.weight), id(model.hidden.bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_scorers_have_a_group_only_for_a_rate_of_their_own(rate) -> None:
    model = seeded_model(scored=True)
    decayed, plain, *apart = parameter_groups(model, 0.3, rate)
    matrices = [model.hidden.weight, model.head.weight] + ([model.scorer.weight] if rate == 1 else [])
    assert [id(p) for p in decayed["params"]] == [id(p) for p in matrices]
    assert decayed.keys() == plain.keys() == {"params", "weight_decay"}
    if rate == 1:
        assert not apart
        return
    (scorers,) = apart
    assert [id(p) for p in scorers["params"]] == [id(model.scorer.weight)]
    assert scorers["weight_decay"] == 0.3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_rate_of_their_own_stays_a_multiple(name) -> None:
    settings = OptimizerConfig(name=name, learning_rate=0.5, scorer_rate=10.0)
    optimizer = build_optimizer(seeded_model(scored=True), settings)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 5.0]
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125, 1.25]
    assert scorer_learning_rate(optimizer) == 1.25
    assert scorer_learning_rate(build_optimizer(seeded_model(scored=True), OptimizerConfig())) is None


def test_a_rate_for_scorers_that_do_not_learn_is_refused() -> None:
    model = seeded_model(scored=True)
    model.scorer.weight.requires_grad_(False)
    for without in (model, seeded_model()):
        with pytest.raises(
            ConfigError, match=r"optimizer.scorer_rate = 10.0, but no scorer of this model learns: use 1"
        ):
            build_optimizer(without, OptimizerConfig(scorer_rate=10.0))
        build_optimizer(without, OptimizerConfig())


def test_nothing_but_scorers_may_learn() -> None:
    model = seeded_model(scored=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "scorer.weight")
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.5, scorer_rate=10.0))
    assert [group["lr"] for group in optimizer.param_groups] == [5.0]


def test_tied_matrix_counts_as_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    (only,) = parameter_groups(model, 0.3)
    assert only["weight_decay"] == 0.0 and len(only["params"]) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = seeded_model()
    model.head.weight.requires_grad_(False)
    assert all(id(p) != id(model.head.weight) for group in parameter_groups(model, 0.3) for p in group["params"])


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizer(name, kind) -> None:
    optimizer = build_optimizer(seeded_model(), replace(OptimizerConfig(), name=name))
    assert type(optimizer) is kind
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
