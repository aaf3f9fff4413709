"""A warm start of the scorers: pairs score high if the dense model attended to them after they left the window.

For key j and KV head, the target is the logarithm of its lift: the attention it gets from queries w or more later,
relative to uniform attention, mean_i (i + 1) P_ij over i >= j + w and the heads of the group. The scorer is linear in
the layer's input, so the best fit is a ridge regression in closed form: no step size, no epochs, one pass over a text.
The rule is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_dist.attention.dense import causal_attention
from sparsek_dist.models.families import attention_modules, family_of, num_kv_heads

NAME = "sparsek_distill"
RIDGE = 1e-2
"""Added to the diagonal of the inputs' covariance, as a share of its mean."""
ROWS = 256
"""Queries whose attention weights are in memory at once."""


@dataclass
class LayerFit:
    """Sums of a regression with an intercept, in float64: all that is kept of the text."""

    hidden_size: int
    heads: int
    inputs: Tensor | None = None
    """The input [b, s, e] of the layer, on its way to the attention function."""
    count: int = 0
    moments: Tensor = field(init=False)
    """[e + 1, e + 1]: sum of x x^T with x = (input, 1)."""
    products: Tensor = field(init=False)
    """[e + 1, g]: sum of x t^T."""

    def __post_init__(self) -> None:
        self.moments = torch.zeros(self.hidden_size + 1, self.hidden_size + 1, dtype=torch.float64)
        self.products = torch.zeros(self.hidden_size + 1, self.heads, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Inputs [n, e] and their targets [n, g]."""
        x = torch.nn.functional.pad(inputs.double(), (0, 1), value=1.0).cpu()
        self.count += len(x)
        self.moments += x.T @ x
        self.products += x.T @ targets.double().cpu()

    def weight(self, std: float) -> Tensor:
        """[g, e] of the best fit, scaled so that scores have the standard deviation `std` over the text seen."""
        e = self.hidden_size
        mean = self.moments[:e, e] / self.count
        covariance = self.moments[:e, :e] / self.count - mean.outer(mean)
        relation = self.products[:e] / self.count - mean.outer(self.products[e] / self.count)
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(e, dtype=torch.float64)
        fitted = torch.linalg.solve(covariance + ridge, relation)
        spread = (fitted * (covariance @ fitted)).sum(dim=0).clamp_min(1e-24).sqrt()
        return (fitted / spread * std).T


@torch.no_grad()
def fit_scorers(model: PreTrainedModel, batches: list[Tensor], *, window: int, std: float) -> list[Tensor]:
    """Weights [g, e] of a scorer for every layer of a dense model; the model is left as it was.

    Args:
        model: dense, of a supported family.
        batches: token ids [b, s], s > window; without padding.
        window: w of the attention that the scorers are for.
        std: of the scores, as `attention.score_std`.
    """
    family_of(model.config)
    modules = attention_modules(model)
    spec, before = model.config, model.config._attn_implementation
    fits = [LayerFit(spec.hidden_size, num_kv_heads(spec)) for _ in modules]
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    hooks = [
        module.register_forward_pre_hook(_hand_on(fit, window), with_kwargs=True)
        for module, fit in zip(modules, fits, strict=True)
    ]
    training = model.training
    try:
        model.eval()
        model.set_attn_implementation(NAME)
        for tokens in batches:
            model(tokens.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [fit.weight(std) for fit in fits]


@torch.no_grad()
def start_scorers(model: PreTrainedModel, fitted: list[Tensor]) -> None:
    """Gives the scorers of a converted model the weights that `fit_scorers` found for all its layers."""
    for module, weight in zip(attention_modules(model), fitted, strict=True):
        if module.layer_kind == "sparsek":
            module.scorer.weight.copy_(weight)


def _hand_on(fit: LayerFit, window: int) -> Any:
    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        fit.inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, kwargs | {"fit": fit, "distill_window": window}

    return hook


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    fit: LayerFit,
    distill_window: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: dense attention [b, h, s, d] -> [b, s, h, d], watched."""
    s = query.shape[2]
    assert fit.inputs is not None
    if s > distill_window:
        seen = s - distill_window
        lift = _lift(query, key, scaling, fit.heads, window=distill_window, sliding=sliding_window or s)
        fit.add(fit.inputs[:, :seen].flatten(0, 1), lift.flatten(0, 1))
    if sliding_window is None or sliding_window >= s:
        return causal_attention(query, key, value, scale=scaling).transpose(1, 2), None
    index = torch.arange(s, device=query.device)
    age = index.unsqueeze(-1) - index
    mask = ((age >= 0) & (age < sliding_window)).expand(1, 1, s, s)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling)


def _lift(query: Tensor, key: Tensor, scaling: float, heads: int, *, window: int, sliding: int) -> Tensor:
    """Log of the mean lift [b, s - w, g] of the keys that some query sees from outside its window."""
    b, h, s, d = query.shape
    grouped = query.float().view(b, heads, h // heads, s, d)
    keys = key.float().unsqueeze(2)
    index = torch.arange(s, device=query.device)
    total = torch.zeros(b, heads, s, device=query.device)
    for rows in index.split(ROWS):
        logits = (grouped[:, :, :, rows] @ keys.transpose(-1, -2)) * scaling
        age = rows.unsqueeze(-1) - index
        weights = logits.masked_fill((age < 0) | (age >= sliding), -torch.inf).softmax(-1)
        weights = torch.where(age >= window, weights * (rows.unsqueeze(-1) + 1), 0)
        total += weights.mean(dim=2).sum(dim=-2)
    queries = s - window - index[: s - window]
    return (total[..., : s - window] / queries + 1e-6).log().transpose(1, 2)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and sliding windows are seen to by `_attend`; batches have no padding."""
