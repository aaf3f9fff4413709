"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsek_dist.attention.scorer import ScoringNetwork
from sparsek_dist.config import Config, OptimizerConfig
from sparsek_dist.errors import ConfigError

FACTOR = "lr_factor"
"""In a group that learns at a rate of its own: what the learning rate is multiplied by. Checkpoints hold it, too."""


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
    """Sets it on every group, times the factor of those that have one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(FACTOR, 1.0)


def scorer_learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """What the scorers' groups were set to; None where they have none of their own."""
    return next((group["lr"] for group in optimizer.param_groups if FACTOR in group), None)


def parameter_groups(model: nn.Module, weight_decay: float, scorer_rate: float = 1.0) -> list[dict]:
    """Matrices (those of the scorers, too) with weight decay; vectors (norms, biases) and embeddings without.

    A matrix that is tied to an embedding counts as the embedding. Scorers have groups of their own, behind the others,
    only if their rate is another: so checkpoints of before there was one are continued. Empty groups are left out.
    """
    embeddings = _parameters_of(model, nn.Embedding)
    apart = _parameters_of(model, ScoringNetwork) if scorer_rate != 1 else set()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    for members, factor in (
        ([x for x in learning if id(x) not in apart], {}),
        ([x for x in learning if id(x) in apart], {FACTOR: scorer_rate}),
    ):
        decayed = [x for x in members if x.ndim > 1 and id(x) not in embeddings]
        plain = [x for x in members if x.ndim <= 1 or id(x) in embeddings]
        groups += [{"params": decayed, "weight_decay": weight_decay} | factor]
        groups += [{"params": plain, "weight_decay": 0.0} | factor]
    return [group for group in groups if group["params"]]


def _parameters_of(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """Identities of the parameters that modules of this kind hold themselves."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed wraps. Without momentum, the decay of SGD is the decoupled one, as AdamW's.

    Raises:
        ConfigError: the scorers have a rate of their own, and the model has none that learn.
    """
    groups = parameter_groups(model, settings.weight_decay, settings.scorer_rate)
    if settings.scorer_rate != 1 and not any(FACTOR in group for group in groups):
        raise ConfigError(f"optimizer.scorer_rate = {settings.scorer_rate}, but no scorer of this model learns: use 1")
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    set_learning_rate(optimizer, settings.learning_rate)
    return optimizer
