"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsek_dist.config import Config, OptimizerConfig


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine from the peak to `final_ratio` of it at the last step.

    A function, not a scheduler object: nothing to save, and a resumed run cannot be one step off.

    Args:
        step: optimizer steps already taken; 0 at the first.
    """
    settings = config.optimizer
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    remaining = config.train.steps - 1 - settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / remaining) if remaining > 0 else 1.0
    share = settings.final_ratio + (1 - settings.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * share


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets it on every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay; vectors (norms, biases, scores) and embeddings without.

    A matrix that is tied to an embedding counts as the embedding. Empty groups are left out.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed wraps. Without momentum, the decay of SGD is the decoupled one, as AdamW's."""
    groups = parameter_groups(model, settings.weight_decay)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
