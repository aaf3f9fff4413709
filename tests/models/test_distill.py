"""The warm start finds the keys that a dense model attends to, against a count over all its attention weights."""

from __future__ import annotations

import pytest
import torch

from sparsek_dist.models.distill import LayerFit, fit_scorers
from sparsek_dist.models.families import attention_modules, num_kv_heads
from tests.models.tiny import MODELS, tiny_model, tokens

WINDOW = 4


def _targets(model, text) -> list[torch.Tensor]:
    """Log lift [b, s - w, g] of every layer, from transformers' own eager attention weights."""
    model.set_attn_implementation("eager")
    weights = model(text, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    s, targets = text.shape[1], []
    for layer in weights:
        rows = []
        for j in range(s - WINDOW):
            later = torch.arange(j + WINDOW, s)
            rows.append((layer[:, :, later, j] * (later + 1)).mean(-1))
        heads = torch.stack(rows, dim=1)
        targets.append((heads.unflatten(-1, (num_kv_heads(model.config), -1)).mean(-1) + 1e-6).log())
    return targets


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen2 with sliding layers"])
def test_scores_are_the_least_squares_fit(name):
    model, text = tiny_model(name), tokens(60, batch=8)
    before = model(text).logits
    weights = fit_scorers(model, [text[:4], text[4:]], window=WINDOW, std=1.0)
    assert torch.equal(model(text).logits, before) and model.config._attn_implementation == "sdpa"

    caught: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
            with_kwargs=True,
        )
        for module in attention_modules(model)
    ]
    targets = _targets(model, text)
    for hook in hooks:
        hook.remove()
    for weight, inputs, target in zip(weights, caught, targets, strict=True):
        x = inputs[:, : 60 - WINDOW].flatten(0, 1).double()
        t = target.flatten(0, 1).double()
        x, t = x - x.mean(0), t - t.mean(0)
        e = x.shape[1]
        ridge = 0.01 * x.square().mean() * len(x) * torch.eye(e, dtype=torch.float64)
        expected = x @ torch.linalg.solve(x.T @ x + ridge, x.T @ t)
        found = x @ weight.T
        torch.testing.assert_close(found, expected / expected.square().mean(0).sqrt(), rtol=0, atol=1e-3)


def test_scale_of_the_scores():
    fit = LayerFit(5, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator) + 3
    fit.add(x, x[:, :2] * 7 + torch.randn(400, 2, generator=generator))
    scores = x.double() @ fit.weight(0.5).T
    torch.testing.assert_close(scores.std(dim=0, correction=0), torch.full((2,), 0.5, dtype=torch.float64))
    assert float(torch.corrcoef(torch.stack([scores[:, 1], x[:, 1].double()]))[0, 1]) > 0.99


def test_every_family_can_be_watched():
    for name in MODELS:
        model = tiny_model(name)
        weights = fit_scorers(model, [tokens(30)], window=WINDOW, std=1.0)
        assert all(bool(weight.isfinite().all()) for weight in weights)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_square_of_the_length_on_a_gpu():
    """At 16,384 tokens a matrix of all pairs would take 1 GiB a head in float32."""
    model = tiny_model("llama", hidden_size=64, max_position_embeddings=16384).float().cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fit_scorers(model, [tokens(16384)], window=WINDOW, std=1.0)
    assert torch.cuda.max_memory_allocated() - before < 1e9
