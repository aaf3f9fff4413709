"""Scores: their scale at the start, their precision, and the fixed rules of the baselines."""

from __future__ import annotations

import inspect

import pytest
import torch

from sparsek_dist.attention.parallel import budget_of, build_scorer
from sparsek_dist.attention.scorer import RandomScores, ScoringNetwork, SinkScores
from sparsek_dist.config import AttentionConfig
from sparsek_kernels.attention import DEFAULT_SUPPORT_RATIO, sparsek_attention
from sparsek_kernels.reference import attention_reference
from sparsek_kernels.shards import shard_attention


def _positions(n: int) -> torch.Tensor:
    return torch.arange(n).unsqueeze(0)


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_learned_scores_start_with_the_asked_deviation(std):
    torch.manual_seed(0)
    scores = ScoringNetwork(256, 4, std=std, slope=0.0)(torch.randn(1, 4000, 256), _positions(4000))
    assert scores.shape == (1, 4000, 4)
    assert float(scores.detach().std()) == pytest.approx(std, rel=0.1)


def test_slope_prefers_newer_tokens_by_its_amount():
    scorer = ScoringNetwork(8, 2, std=1.0, slope=0.25)
    hidden = torch.randn(1, 1, 8).expand(1, 5, 8)
    steps = scorer(hidden, _positions(5)).diff(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.25))


def test_slopes_of_heads_fall_in_equal_ratios():
    scorer = ScoringNetwork(8, 4, std=1.0, slope=0.5, slope_ratio=1 / 64)
    hidden = torch.randn(1, 1, 8).expand(1, 5, 8)
    steps = scorer(hidden, _positions(5)).diff(dim=1)
    expected = torch.tensor([1 / 2, 1 / 8, 1 / 32, 1 / 128])
    torch.testing.assert_close(steps, expected.expand_as(steps), atol=1e-6, rtol=1e-4)
    # The first of one head is the last, too.
    alone = ScoringNetwork(8, 1, std=1.0, slope=0.5, slope_ratio=1 / 64)
    assert alone.slopes(torch.zeros(())).tolist() == [0.5]


def test_slopes_are_those_of_the_settings():
    config = AttentionConfig(slope=0.5, slope_ratio=0.25)
    scorer = build_scorer(config, hidden_size=8, num_kv_heads=3, seed=0, layer=0)
    torch.testing.assert_close(scorer.slopes(torch.zeros(())), torch.tensor([0.5, 0.25, 0.125]))


@pytest.mark.parametrize(("k", "window", "expected"), [(256, 256, 1 / 1024), (0, 10, 1 / 20), (30, 1, 1 / 62)])
def test_the_default_slope_is_one_point_in_twice_what_a_query_sees(k, window, expected):
    config = AttentionConfig(num_selected=k, window=window)
    assert build_scorer(config, hidden_size=8, num_kv_heads=2, seed=0, layer=0).slopes(torch.zeros(())) == expected
    assert AttentionConfig(num_selected=k, window=window, slope=0).score_slope == 0


def test_equal_slopes_are_exact_and_survive_bfloat16_weights():
    scorer = ScoringNetwork(8, 3, std=1.0, slope=0.3).to(torch.bfloat16)
    scores = scorer(torch.zeros(1, 5, 8), _positions(5))
    assert torch.equal(scores, (torch.tensor(0.3) * torch.arange(5.0))[None, :, None].expand(1, 5, 3))


def test_scores_are_float32_at_least_whatever_the_model():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        scorer = ScoringNetwork(8, 2, std=1.0, slope=0.0).to(dtype)
        assert scorer(torch.randn(1, 3, 8, dtype=dtype), _positions(3)).dtype == expected


@pytest.mark.parametrize("seed", [0, 7, 123_456_789])
def test_random_scores_are_uniform_and_the_same_for_every_shard(seed):
    scorer = RandomScores(3, seed=seed, layer=1)
    hidden = torch.zeros(1, 30_000, 1)
    whole = scorer(hidden, _positions(30_000))
    assert torch.equal(whole[:, 9000:], scorer(hidden[:, 9000:], _positions(30_000)[:, 9000:]))
    assert float(whole.min()) >= 0 and float(whole.max()) < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(whole.std()) == pytest.approx(12**-0.5, abs=0.01)
    heads = torch.corrcoef(whole[0].T)
    assert float((heads - torch.eye(3)).abs().max()) < 0.03
    other = RandomScores(3, seed=seed, layer=2)(hidden, _positions(30_000))
    assert abs(float(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1])) < 0.03


def test_sinks_are_the_first_tokens_of_a_document():
    scores = SinkScores(2)(torch.zeros(1, 7, 1), torch.tensor([[5, 0, 1, 2, 3, 4, 0]]))
    assert scores[0, :, 0].tolist() == [0, 1, 1, 1, 1, 0, 1]


def test_settings_and_kernels_agree_on_their_defaults():
    config = AttentionConfig(num_selected=24)
    assert config.support_size == DEFAULT_SUPPORT_RATIO * config.num_selected
    for function in (sparsek_attention, shard_attention, attention_reference):
        assert inspect.signature(function).parameters["gate"].default == config.gate


def test_all_kinds_see_as_many_pairs():
    for kind in ("sparsek", "random", "sink_window", "window"):
        budget = budget_of(AttentionConfig(kind=kind, num_selected=40, window=24))
        assert budget.num_selected + budget.window == 64, kind
        assert kind == "sparsek" or budget.gate == "none"
