"""Which settings can stand together. Pure: reads values, changes none, touches nothing outside, and asks of the machine
only whether it can run Triton.

Each function yields one message per mistake: `field = value` first, the cure after the colon.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from sparsek_dist.config import Config
from sparsek_dist.errors import ConfigError
from sparsek_kernels.dispatch import no_triton

DEEPSPEED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "comet",
        "comms_logger",
        "compile",
        "csv_monitor",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "memory_breakdown",
        "timers",
        "wall_clock_breakdown",
        "wandb",
    }
)
"""DeepSpeed's top-level settings that `parallel.deepspeed` may hold. DeepSpeed itself ignores a mistyped one, and some
others, such as `gradient_allreduce_op`, would change what gradients are divided by."""

AT_LEAST_ONE = frozenset(
    {
        "attention.window",
        "data.sequence_length",
        "model.head_dim",
        "model.hidden_size",
        "model.intermediate_size",
        "model.max_positions",
        "model.num_kv_heads",
        "model.num_layers",
        "model.num_query_heads",
        "parallel.sequence_degree",
        "train.accumulation_steps",
        "tune.lora_alpha",
        "tune.lora_rank",
        "train.keep_checkpoints",
        "train.log_every",
        "train.micro_batch_size",
        "train.save_every",
        "train.steps",
    }
)
ABOVE_ZERO = frozenset(
    {
        "attention.score_std",
        "attention.slope_ratio",
        "model.init_std",
        "model.rope_theta",
        "optimizer.learning_rate",
        "optimizer.scorer_rate",
        "parallel.timeout_minutes",
    }
)
ANY_SIGN = frozenset({"attention.slope"})


def problems(config: Config, flat: dict[str, Any]) -> list[str]:
    """All ranges and relations that do not hold.

    Args:
        flat: dotted key -> value, of all settings.
    """
    # Relations between values that are wrong by themselves would only confuse.
    alone = [*_ranges(flat)] or [*_growth(config)]
    if config.model.source is not None:
        # The shape of a pretrained model is known when its config is read; models/sharing.py then asks of it.
        return alone or [*_source(config), *_attention(config), *_rest(config)]
    return alone or [*_model(config), *sharding(config), *_attention(config), *_rest(config)]


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError if `world_size` processes cannot be divided into sequence-parallel groups."""
    degree = config.parallel.sequence_degree
    if world_size % degree:
        raise ConfigError(
            f"parallel.sequence_degree = {degree} must divide the number of processes, {world_size}: "
            f"start {near_multiple(world_size, degree)} processes, or set it to {divisors(world_size)}"
        )


def _ranges(flat: dict[str, Any]) -> Iterator[str]:
    for key, value in flat.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            yield f"{key} = {value} is not a finite number: give one"
        elif key in AT_LEAST_ONE and value < 1:
            yield f"{key} = {value} must be at least 1: raise it"
        elif key in ABOVE_ZERO and value <= 0:
            yield f"{key} = {value} must be above 0: raise it"
        elif key not in ANY_SIGN and value < 0:
            yield f"{key} = {value} must not be negative: use 0 or more"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_query_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads = {model.num_kv_heads} must divide model.num_query_heads = {model.num_query_heads}: "
            f"use {divisors(model.num_query_heads)}"
        )
    if model.hidden_size % model.num_query_heads:
        yield (
            f"model.hidden_size = {model.hidden_size} must be a multiple of model.num_query_heads = "
            f"{model.num_query_heads}, as transformers insists: use "
            f"{near_multiple(model.hidden_size, model.num_query_heads)}"
        )
    if model.head_dim % 2:
        yield f"model.head_dim = {model.head_dim} must be even for rotary positions: use {model.head_dim + 1}"
    length = config.data.sequence_length
    if model.max_positions is not None and model.max_positions < length:
        yield f"model.max_positions = {model.max_positions} is less than data.sequence_length = {length}: raise it"


def _source(config: Config) -> Iterator[str]:
    shaped = type(config.model)(source=config.model.source, rope=config.model.rope)
    for name, value in vars(config.model).items():
        if value != getattr(shaped, name):
            yield f"model.{name} = {value} has no place beside model.source = {config.model.source}: leave it out"


def sharding(config: Config) -> Iterator[str]:
    """How the sequence is shared among ranks, given the shape of the model."""
    attention, model, degree = config.attention, config.model, config.parallel.sequence_degree
    if degree == 1:
        return
    dense = _dense_layers(config)
    # DeepSpeed-Ulysses gives each rank a share of the heads; the sparse kinds do not divide them.
    if dense and (model.num_kv_heads % degree or model.num_query_heads % degree):
        field, cure = dense
        yield (
            f"parallel.sequence_degree = {degree} must divide model.num_kv_heads = {model.num_kv_heads} and "
            f"model.num_query_heads = {model.num_query_heads}, because {field} shares heads among ranks: use "
            f"{divisors(math.gcd(model.num_kv_heads, model.num_query_heads))}, or {cure}"
        )
    length, told = shortest_context(config)
    if attention.kind != "full" and (problem := short_shards(length, degree, attention.reach, told=told)):
        yield problem


def _growth(config: Config) -> Iterator[str]:
    """Contexts that grow: to the last length, each a divisor of it so that steps are of equal size, within the run."""
    data = config.data
    told = f"data.growth = {data.growth!r}"
    if not re.fullmatch(r"none|[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", data.growth):
        yield f"{told} is not a list of lengths and steps: use none, or for instance 1024x150,2048x100"
        return
    lengths = [length for length, _ in data.first_lengths]
    if any(data.sequence_length % length for length in lengths):
        yield f"{told}: each length must divide data.sequence_length = {data.sequence_length}, as its powers of two do"
    elif any(long <= short for short, long in pairwise([*lengths, data.sequence_length])):
        yield f"{told}: each length must exceed the one before, and data.sequence_length = {data.sequence_length} all"
    steps = sum(steps for _, steps in data.first_lengths)
    if lengths and steps >= config.train.steps:
        yield (
            f"{told} takes {steps} steps, which leaves none of train.steps = {config.train.steps} for contexts of "
            f"data.sequence_length = {data.sequence_length}: raise train.steps, or take fewer"
        )


def _dense_layers(config: Config) -> tuple[str, str] | None:
    """The setting that leaves layers dense, and what to do without it."""
    if config.attention.kind == "full":
        return "attention.kind = full", "another kind"
    if config.attention.full_layers != "none":
        return f"attention.full_layers = {config.attention.full_layers}", "attention.full_layers=none"
    return None


def shortest_context(config: Config) -> tuple[int, str]:
    """Tokens of the shortest contexts that are trained on, and words that name them and the degree."""
    data, degree = config.data, config.parallel.sequence_degree
    length, _ = data.first_lengths[0] if data.first_lengths else (data.sequence_length, 0)
    told = f"data.growth = {data.growth!r}" if data.first_lengths else f"data.sequence_length = {length}"
    return length, f"{told} over parallel.sequence_degree = {degree}"


def short_shards(length: int, degree: int, window: int, *, told: str) -> str | None:
    """What is wrong with sharing `length` tokens among `degree` ranks, and the cure; None if every shard has a window.

    Args:
        window: newest tokens that a query sees; a shard gets them from one neighbour only.
        told: names length and degree.
    """
    shard = -(-length // degree)
    if degree == 1 or shard >= window:
        return None
    return (
        f"{told} leaves shards of {shard} tokens, shorter than the window of {window}: use a length of at least "
        f"{window * degree}, or a degree of at most {max(1, length // window)}"
    )


def _attention(config: Config) -> Iterator[str]:
    attention = config.attention
    if attention.kind == "sparsek" and 0 < attention.num_selected >= attention.support_size:
        yield (
            f"attention.support = {attention.support} must exceed attention.num_selected = {attention.num_selected}, "
            f"or every gate is 1 and the scores never learn: use {4 * attention.num_selected}"
        )
    if attention.slope_ratio != 1 and attention.slope == 0:
        yield (
            f"attention.slope_ratio = {attention.slope_ratio} changes nothing at attention.slope = 0: set "
            "attention.slope above 0, or leave it to its default"
        )
    if attention.slope_ratio != 1 and config.model.source is None and config.model.num_kv_heads == 1:
        yield (
            f"attention.slope_ratio = {attention.slope_ratio} changes nothing with model.num_kv_heads = 1: set "
            "attention.slope alone, or more heads"
        )
    if attention.kind == "sink_window" and attention.reach < 1:
        yield (
            f"attention.num_selected + attention.window = {attention.num_selected + attention.window} leaves no window "
            "beside the first tokens that sink_window keeps: raise either"
        )
    if not re.fullmatch(r"none|every_other|\d+(,\d+)*", attention.full_layers):
        yield (
            f"attention.full_layers = {attention.full_layers!r} is not a choice of layers: use none, every_other, or "
            "indices such as 0,5,11"
        )
    if attention.backend == "triton" and (hindrance := no_triton()):
        yield f"attention.backend = triton cannot run here: {hindrance}; use auto or torch"
    if attention.backend == "reference":
        yield "attention.backend = reference is quadratic and for tests of the kernels only: use auto or torch"


def _rest(config: Config) -> Iterator[str]:
    if config.model.rope != "keep" and config.model.source is None:
        yield f"model.rope = {config.model.rope} stretches a pretrained model: set model.source, or model.rope_theta"
    if config.tune.parameters != "all" and config.model.source is None:
        yield f"tune.parameters = {config.tune.parameters} would leave random weights as they are: set model.source"
    elif config.tune.parameters == "scorer" and config.attention.kind != "sparsek":
        yield f"tune.parameters = scorer leaves nothing to learn with attention.kind = {config.attention.kind}: use all"
    if config.optimizer.scorer_rate != 1 and (hindrance := _no_scorers_learn(config)):
        yield (
            f"optimizer.scorer_rate = {config.optimizer.scorer_rate} changes nothing with {hindrance}, where no scorer "
            "learns: use 1"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield f"run.name = {config.run.name!r} is not a plain folder name: use letters, digits, '.', '_' and '-'"
    if not 0 < config.data.held_out < 1:
        yield f"data.held_out = {config.data.held_out} must lie between 0 and 1: for instance 0.05"
    if config.parallel.zero_stage > 3:
        yield f"parallel.zero_stage = {config.parallel.zero_stage} is not a ZeRO stage: use 0, 1, 2 or 3"
    for key in config.parallel.deepspeed:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
            cure = f"did you mean {near[0]}?" if near else f"remove it, or use {', '.join(sorted(DEEPSPEED_KEYS))}"
            yield f"parallel.deepspeed.{key} is derived from other settings or unknown: {cure}"


def _no_scorers_learn(config: Config) -> str | None:
    """The setting that leaves no scorer, or nothing that it could learn from. Every `tune.parameters` trains them."""
    if config.attention.kind != "sparsek":
        return f"attention.kind = {config.attention.kind}"
    if config.attention.num_selected == 0:
        return "attention.num_selected = 0"
    visible = config.attention.num_selected + config.attention.window
    if config.data.sequence_length <= visible:
        return f"data.sequence_length = {config.data.sequence_length}, all of it visible (k + w = {visible})"
    return None


def divisors(number: int) -> str:
    """All divisors, as words: `1, 2 or 4`."""
    values = [str(d) for d in range(1, number + 1) if number % d == 0]
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]


def near_multiple(number: int, factor: int) -> str:
    """The multiples of `factor` on both sides of a number, as words."""
    below, above = number // factor * factor, (number // factor + 1) * factor
    return f"{below} or {above}" if below else str(above)
