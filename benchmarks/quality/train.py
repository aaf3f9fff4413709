"""A training on one device by the project's own loss, optimizer and schedule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsek_dist.config import Config
from sparsek_dist.data.loader import Batch
from sparsek_dist.parallel.head import token_losses
from sparsek_dist.parallel.loss import count_targets
from sparsek_dist.training.optim import build_optimizer, learning_rate, set_learning_rate


class MasterWeights:
    """The optimizer over float32 copies of the weights: bfloat16 ones could not move by less than their spacing."""

    def __init__(self, model: Any, config: Config) -> None:
        self.optimizer = build_optimizer(model, config.optimizer)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        copies = {id(weight): master for weight, master in zip(self.weights, self.masters, strict=True)}
        for group in self.optimizer.param_groups:
            group["params"] = [copies[id(weight)] for weight in group["params"]]

    @torch.no_grad()
    def step(self, rate: float, clip_norm: float) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, clip_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)


def train(model: Any, config: Config, batch_at: Callable[[int], Batch]) -> dict[str, Any]:
    """Trains `model` in place.

    Returns:
        Steps, tokens, the median seconds of a step after the first five (of this process's CPU time on CPUs, so that
        neighbours do not count), and the mean loss over tenths of the training, in nats per target.
    """
    device, steps = model.device, config.train.steps
    weights = MasterWeights(model, config)
    model.train()
    losses: list[Tensor] = []
    seconds: list[float] = []
    tokens = 0
    for step in range(steps):
        batch = batch_at(step).to(device)
        began = _clock(device)
        nats = token_losses(model, batch.input_ids, batch.position_ids, batch.labels).sum()
        loss = nats / count_targets(batch.labels).clamp_min(1).float()
        loss.backward()
        weights.step(learning_rate(step, config), config.optimizer.clip_norm)
        losses.append(loss.detach())
        tokens += batch.input_ids.numel()
        seconds.append(_clock(device) - began)
    curve = torch.stack(losses).tolist()
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "tokens": tokens,
        "step_seconds": statistics.median(seconds[5:] or seconds),
        "train_loss": [statistics.mean(curve[i : i + tenth]) for i in range(0, steps, tenth)],
    }


def _clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
