"""What a checkpoint says about the run that made it, and whether another run may continue it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparsek_dist.config import AttentionConfig, Config, flatten
from sparsek_dist.errors import CheckpointError
from sparsek_dist.training.manifest import write_durably

STATE = "state.json"
FORMAT = 1

FREE_TO_CHANGE = frozenset(
    {
        "run.name",
        "run.root",
        "train.steps",
        "train.log_every",
        "train.eval_every",
        "train.eval_sequences",
        "train.observe_every",
        "train.compare_every",
        "train.save_every",
        "train.keep_checkpoints",
        "train.resume",
        "data.cache",
        "parallel.exchange",
        "parallel.timeout_minutes",
    }
)
"""Settings that a resumed run may change: none of them enters the next step. (`train.steps` moves the end of the
learning rate's cosine, which is what someone who asks for more steps wants.)"""


RESIZABLE = frozenset({"parallel.sequence_degree", "train.micro_batch_size", "train.accumulation_steps"})
"""Settings that a resumed run may change together with the number of processes, as long as every optimizer step still
trains on as many contexts: who computes what changes then, not what is computed."""


_NAMES = [entry.name for entry in fields(AttentionConfig)]


@dataclass(frozen=True)
class State:
    """The part of a checkpoint that people may want to read."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens read, over all ranks."""
    world_size: int
    """Processes that wrote it."""
    settings: dict[str, Any]
    """Dotted key -> value."""


def write_state(checkpoint: Path, *, step: int, tokens: int, world_size: int, config: Config) -> None:
    """Writes state.json."""
    settings = flatten(replace(config, attention=config.attention.settled()))
    content = {"format": FORMAT, "step": step, "tokens": tokens, "world_size": world_size, "settings": settings}
    write_durably(checkpoint / STATE, json.dumps(content, indent=1))


def read_state(checkpoint: Path) -> State:
    """Reads state.json; the manifest has already confirmed that it is as written.

    Raises:
        CheckpointError: if it is of another format.
    """
    content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{checkpoint} is of format {content['format']}, and this version reads format {FORMAT}: continue with the "
            "version of sparsek-dist that wrote it"
        )
    return State(content["step"], content["tokens"], content["world_size"], content["settings"])


def check_compatible(checkpoint: Path, state: State, config: Config, world_size: int) -> None:
    """Refuses to continue a run with other settings, or with processes that would train on other contexts per step.

    Raises:
        CheckpointError: listing every difference as `key: then -> now`.
    """
    changed = differences(state.settings, flatten(config))
    if changed:
        raise CheckpointError(
            f"{checkpoint} was made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nGive the old values to continue it, or another run.name to start afresh"
        )
    then, now = _sequences_per_step(state), config.sequences_per_step(world_size)
    if then != now:
        raise CheckpointError(
            f"{checkpoint} trains on {then} contexts per optimizer step, but {world_size} processes with "
            f"parallel.sequence_degree = {config.parallel.sequence_degree}, train.micro_batch_size = "
            f"{config.train.micro_batch_size} and train.accumulation_steps = {config.train.accumulation_steps} make "
            f"{now}: change these to make {then}, or choose another run.name to start afresh"
        )
    if state.world_size != world_size and config.parallel.zero_stage > 0 and config.optimizer.name != "adamw":
        raise CheckpointError(
            f"{checkpoint} was made by {state.world_size} processes, and DeepSpeed cannot divide the state of "
            f"optimizer.name = {config.optimizer.name} anew: start {state.world_size} processes"
        )
    if state.step > config.train.steps:
        raise CheckpointError(
            f"{checkpoint} is at step {state.step}, beyond train.steps = {config.train.steps}: raise train.steps, or "
            "choose another run.name to start afresh"
        )


def _sequences_per_step(state: State) -> int:
    degree, *factors = (state.settings[key] for key in sorted(RESIZABLE))
    return state.world_size // degree * math.prod(factors)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: then -> now` for every setting that differs and must not."""
    # A setting that is newer than the checkpoint gets its default, which must do what was done before there was one.
    then = flatten(Config()) | then
    # Through JSON, as what was saved went: tuples become lists.
    now = json.loads(json.dumps(now))
    keys = sorted((set(then) | set(now)) - {f"attention.{name}" for name in _NAMES})
    differ = [key for key in keys if key not in FREE_TO_CHANGE | RESIZABLE and _shown(then, key) != _shown(now, key)]
    differ += [f"attention.{name}" for name in _attention(then).apart(_attention(now))]
    then, now = (x | flatten(_attention(x).settled(), "attention.") for x in (then, now))
    return [f"{key}: {_shown(then, key)} -> {_shown(now, key)}" for key in differ]


def _attention(settings: dict[str, Any]) -> AttentionConfig:
    return AttentionConfig(**{name: settings[f"attention.{name}"] for name in _NAMES})


def _shown(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "(not a setting)"
