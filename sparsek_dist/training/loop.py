"""The training loop: load, step, observe, evaluate, log, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsek_dist.config import Config
from sparsek_dist.errors import NumericsError
from sparsek_dist.parallel.comm import all_reduce_sum
from sparsek_dist.parallel.head import token_losses
from sparsek_dist.parallel.loss import engine_loss, step_targets
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.training.checkpoint import Checkpoints, Position
from sparsek_dist.training.checksum import require_equal_parameters
from sparsek_dist.training.engine import optimizer_step
from sparsek_dist.training.metrics import MetricsLog, peak_memory
from sparsek_dist.training.optim import learning_rate, scorer_learning_rate, set_learning_rate
from sparsek_dist.training.progress import Progress


class Batch(Protocol):
    """What the loop reads of a batch; all [b, s]."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def position_ids(self) -> Tensor: ...

    def shard(self, rank: int, degree: int) -> Batch: ...

    def to(self, device: torch.device) -> Batch: ...


class Loader(Protocol):
    """A pure function of the step, so that a resumed run reads what the interrupted one would have read."""

    def micro_batch(
        self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int
    ) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `fit` works with. The callables come from floors that training does not know."""

    config: Config
    mesh: Mesh
    engine: Any
    """From training.engine.build_engine."""
    loader: Loader
    log: MetricsLog
    progress: Progress
    checkpoints: Checkpoints
    evaluate: Callable[[], dict[str, float]]
    """Held-out numbers of the model as it is, the same on all ranks; every rank calls it."""
    observe: Callable[[Batch], tuple[dict[str, float], dict[str, Any]]] | None = None
    """Statistics and figures of what the model does on one batch of this rank; every rank calls it."""
    bytes_per_target: float = 1.0
    """Bytes of text behind one target token, for bits per byte."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step was; all but the bytes are the same on every rank."""

    loss: float
    """Mean cross entropy over the step's targets, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens: int
    """Tokens read, over all ranks."""
    exchanged_bytes: int
    """Bytes that this rank received from its sequence-parallel group, forward and backward."""


def fit(run: Run, start: Position) -> dict[str, float]:
    """Trains from `start` to the last step and returns the last evaluation.

    Raises:
        NumericsError: if the loss or the gradient is not finite; what was saved before stays.
        PeerError: if ranks no longer hold the same parameters.
    """
    train, position, held_out = run.config.train, start, {}
    run.progress.start(start.step)
    for step in range(start.step, train.steps):
        began = time.perf_counter()
        batches = micro_batches(run.loader, step, run.config, run.mesh, run.engine.device)
        outcome = train_step(run.engine, batches, step, run.config, run.mesh)
        position = position.after(outcome.tokens)
        if _due(train.compare_every, position.step):
            require_equal_parameters(run.engine, run.mesh.world, position.step)
        record = _record(run, position, outcome, time.perf_counter() - began)
        if _due(train.observe_every, position.step):
            record |= _observe(run, batches[0], position.step)
        if _due(train.eval_every, position.step) or position.step == train.steps:
            held_out = run.evaluate()
            record |= {f"held_out/{name}": value for name, value in held_out.items()}
        run.log.step(position.step, record)
        run.progress.step(position.step, record)
        if _due(train.save_every, position.step) or position.step == train.steps:
            run.checkpoints.save(run.engine, position)
    return held_out or run.evaluate()


def micro_batches(loader: Loader, step: int, config: Config, mesh: Mesh, device: torch.device) -> list[Batch]:
    """This rank's shards of the contexts of one optimizer step, one batch per forward pass."""
    return [
        loader.micro_batch(
            step,
            micro,
            data_rank=mesh.data_rank,
            data_degree=mesh.data_degree,
            micro_batch_size=config.train.micro_batch_size,
        )
        .shard(mesh.sequence.rank, mesh.sequence.size)
        .to(device)
        for micro in range(config.train.accumulation_steps)
    ]


def train_step(engine: Any, batches: list[Batch], step: int, config: Config, mesh: Mesh) -> StepOutcome:
    """One optimizer step: the gradient of the mean over all targets of all micro-batches and all ranks.

    Args:
        engine: from build_engine.
        batches: this rank's shards, [b, s/p] each.
        step: optimizer steps taken before; 0 at the first.

    Raises:
        NumericsError: on all ranks, at the same step; a loss that is not finite stops before the weights change.
    """
    engine.train()
    received_before = sum(mesh.sequence.received.values())
    # Counted first: each micro-batch's loss is already divided by the targets of the whole step.
    targets = step_targets([batch.labels for batch in batches], mesh.world)
    set_learning_rate(engine.optimizer, learning_rate(step, config))
    nats = torch.zeros((), dtype=torch.float64, device=targets.device)
    for index, batch in enumerate(batches):
        if index > 0:
            engine.step()
        mine = token_losses(engine, batch.input_ids, batch.position_ids, batch.labels).sum()
        engine.backward(engine_loss(mine, targets, world_size=mesh.world.size, accumulation_steps=len(batches)))
        nats += mine.detach()
    loss = float(all_reduce_sum(nats, mesh.world) / targets)
    _require_finite("loss", loss, step + 1)
    grad_norm = optimizer_step(engine)
    _require_finite("gradient norm", grad_norm, step + 1)
    # From the settings: a shard may hold padding.
    tokens = config.sequences_per_step(mesh.world.size) * config.data.sequence_length
    return StepOutcome(loss, grad_norm, tokens, sum(mesh.sequence.received.values()) - received_before)


def _require_finite(name: str, value: float, step: int) -> None:
    # Every rank holds the same value, so every rank stops here.
    if not math.isfinite(value) or value < 0:
        raise NumericsError(
            f"step {step}: the {name} is {value}, so training stops; earlier checkpoints are intact. Lower "
            "optimizer.learning_rate, raise optimizer.warmup_steps, or train with train.precision=float32"
        )


def _record(run: Run, position: Position, outcome: StepOutcome, seconds: float) -> dict[str, float | int]:
    """The step's line in metrics.jsonl; losses in nats, memory in bytes on this rank."""
    of_scorers = scorer_learning_rate(run.engine.optimizer)
    return {
        "tokens": position.tokens,
        "loss": outcome.loss,
        "bits_per_byte": outcome.loss / math.log(2) / run.bytes_per_target,
        "lr": learning_rate(position.step - 1, run.config),
        **({} if of_scorers is None else {"scorer_lr": of_scorers}),
        "grad_norm": outcome.grad_norm,
        "tokens_per_second": outcome.tokens / seconds,
        "memory": peak_memory(run.engine.device),
        "exchanged_bytes": outcome.exchanged_bytes,
    }


def _observe(run: Run, batch: Batch, step: int) -> dict[str, float]:
    if run.observe is None:
        return {}
    scalars, figures = run.observe(batch)
    for tag, figure in figures.items():
        run.log.figure(tag, figure, step)
    return scalars


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
