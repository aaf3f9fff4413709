"""Which settings can stand together. Pure: reads values, changes none, touches nothing outside."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsek_dist.config import Config


def problems(config: Config, flat: dict[str, Any]) -> list[str]:
    """All ranges and relations that do not hold: `field = value` first, the cure after the colon.

    Args:
        flat: dotted key -> value, of all settings.
    """
    found: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    for key, value in flat.items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{key} = {value} is not a finite number: give one")
    for key in _AT_LEAST_ONE:
        require(flat[key] >= 1, f"{key} = {flat[key]} must be at least 1: raise it")
    for key in _NOT_NEGATIVE:
        require(flat[key] >= 0, f"{key} = {flat[key]} must not be negative: use 0 or more")
    for key in _ABOVE_ZERO:
        require(flat[key] > 0, f"{key} = {flat[key]} must be above 0: raise it")
    if found:  # relations between values that are wrong by themselves would only confuse
        return found

    run, model, attention, data = config.run, config.model, config.attention, config.data
    degree, length = config.parallel.sequence_degree, config.data.sequence_length
    require(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name)),
        f"run.name = {run.name!r} is not a plain folder name: use letters, digits, '.', '_' and '-'",
    )
    require(
        model.num_query_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads = {model.num_kv_heads} must divide model.num_query_heads = {model.num_query_heads}: "
        f"use {divisors(model.num_query_heads)}",
    )
    require(model.head_dim % 2 == 0, f"model.head_dim = {model.head_dim} must be even for rotary positions: add 1")
    require(0 < data.held_out < 1, f"data.held_out = {data.held_out} must lie between 0 and 1: for instance 0.05")
    require(
        config.parallel.zero_stage in (0, 1, 2, 3),
        f"parallel.zero_stage = {config.parallel.zero_stage} is not a ZeRO stage: use 0, 1, 2 or 3",
    )
    require(
        length % degree == 0,
        f"data.sequence_length = {length} must be a multiple of parallel.sequence_degree = {degree}: "
        f"use {near_multiple(length, degree)}",
    )
    if attention.kind == "full":
        require(
            degree == 1,
            f"attention.kind = full cannot share a sequence over parallel.sequence_degree = {degree} ranks: "
            "set the degree to 1, or choose sparsek, random, sink_window or window",
        )
    else:
        require(
            length // degree >= attention.reach,
            f"data.sequence_length = {length} over parallel.sequence_degree = {degree} leaves shards of "
            f"{length // degree} tokens, shorter than the window of {attention.reach}: use a length of at least "
            f"{attention.reach * degree}, or a degree of at most {max(1, length // attention.reach)}",
        )
    if attention.kind in ("sparsek", "random") and attention.num_selected > 0:
        require(
            attention.support_size > attention.num_selected,
            f"attention.support = {attention.support} must exceed attention.num_selected = {attention.num_selected}, "
            f"or every gate is 1 and the scores never learn: use {4 * attention.num_selected}",
        )
    if attention.kind == "sink_window":
        require(
            attention.reach >= 1,
            f"attention.num_selected + attention.window = {attention.num_selected + attention.window} leaves no window "
            "beside the first tokens that sink_window keeps: raise either",
        )
    derived = sorted(set(config.parallel.deepspeed) & DERIVED_DEEPSPEED_KEYS)
    require(
        not derived,
        f"parallel.deepspeed sets {derived}, which sparsek-dist derives from the other settings: remove them there",
    )
    return found


DERIVED_DEEPSPEED_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "sequence_parallel_size",
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "fp16",
        "optimizer",
        "scheduler",
        "communication_data_type",
        "steps_per_print",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "tensorboard",
    ]
)
"""DeepSpeed settings that follow from this tree; see training/engine.py."""

_AT_LEAST_ONE = [
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_layers",
    "model.num_query_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "attention.window",
    "data.sequence_length",
    "parallel.sequence_degree",
    "train.steps",
    "train.micro_batch_size",
    "train.accumulation_steps",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
]

_NOT_NEGATIVE = [
    "attention.num_selected",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.final_ratio",
    "train.eval_every",
    "train.eval_sequences",
    "train.observe_every",
    "run.seed",
]

_ABOVE_ZERO = ["model.rope_theta", "attention.score_std", "parallel.timeout_minutes", "optimizer.learning_rate"]


def divisors(number: int) -> str:
    """All divisors, as words: `1, 2 or 4`."""
    values = [str(d) for d in range(1, number + 1) if number % d == 0]
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]


def near_multiple(number: int, factor: int) -> str:
    """The multiples of `factor` on both sides of a number, as words."""
    below, above = number // factor * factor, (number // factor + 1) * factor
    return f"{below} or {above}" if below else str(above)
