"""SPARSEK attention inside a transformers model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig
from sparsek_dist.errors import NumericsError
from sparsek_dist.models import build_model, count_parameters
from sparsek_dist.models.families import attention_modules
from sparsek_dist.parallel.mesh import Mesh

VOCABULARY = 13
SMALL = ModelConfig(hidden_size=18, intermediate_size=24, num_layers=2, num_query_heads=6, num_kv_heads=2, head_dim=4)


def _model(**attention):
    config = Config(model=SMALL, attention=AttentionConfig(**attention), data=DataConfig(sequence_length=64))
    return build_model(config, Mesh(), vocab_size=VOCABULARY).double()


def _tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(seed))


def _logits(model, tokens, positions=None):
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1) if positions is None else positions
    return model(input_ids=tokens, position_ids=positions).logits


@pytest.mark.parametrize(
    "attention",
    [
        {"num_selected": 4, "window": 40},
        {"num_selected": 39, "window": 1},
        {"num_selected": 8, "window": 32, "kind": "random"},
        {"num_selected": 8, "window": 32, "kind": "sink_window"},
        {"num_selected": 8, "window": 32, "kind": "window"},
    ],
    ids=str,
)
def test_equals_dense_attention_where_the_budget_covers_the_sequence(attention):
    model = _model(**attention)
    dense = _model(kind="full")
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "scorer" not in k})
    tokens = _tokens(40)
    torch.testing.assert_close(_logits(model, tokens), _logits(dense, tokens), rtol=0, atol=1e-12)
    longer = _tokens(64)
    assert not torch.allclose(_logits(model, longer), _logits(dense, longer), atol=1e-6)


@pytest.mark.parametrize("kind", ["sparsek", "random", "sink_window", "window", "full"])
def test_packed_documents_equal_separate_ones(kind):
    model = _model(kind=kind, num_selected=6, window=5, support=10)
    first, second = _tokens(23, seed=1), _tokens(31, seed=2)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(23), torch.arange(31)]).expand(2, -1)
    apart = torch.cat([_logits(model, first), _logits(model, second)], dim=1)
    torch.testing.assert_close(_logits(model, packed, positions), apart, rtol=0, atol=1e-12)


def test_every_parameter_learns_and_unselected_scores_too():
    model = _model(num_selected=6, window=5, support=40)
    _logits(model, _tokens(60)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(float(module.scorer.weight.grad.abs().sum()) > 0 for module in attention_modules(model))


def test_activation_checkpointing_changes_no_gradient():
    config = Config(model=SMALL, attention=AttentionConfig(num_selected=6, window=5), data=DataConfig())
    grads = []
    for recompute in (False, True):
        changed = replace(config, train=replace(config.train, activation_checkpointing=recompute))
        model = build_model(changed, Mesh(), vocab_size=VOCABULARY).double().train()
        _logits(model, _tokens(60)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-12)


def test_same_seed_gives_the_same_weights_and_spares_the_callers_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = _model(), _model()
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_counted_parameters_are_those_of_the_model():
    config = Config(model=SMALL)
    built = build_model(config, Mesh(), vocab_size=VOCABULARY)
    assert count_parameters(config, vocab_size=VOCABULARY) == sum(p.numel() for p in built.parameters())


def test_nan_scores_end_with_the_layer_named():
    model = _model()
    with torch.no_grad():
        attention_modules(model)[1].scorer.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer 1: attention scores hold NaN"):
        _logits(model, _tokens(20))
