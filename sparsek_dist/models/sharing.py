"""What a model asks of ranks that share its sequences, told from its config before a weight is read."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sparsek_dist.config import AttentionConfig
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.families import FAMILIES, attention_modules, num_kv_heads, plan_layers, sliding_window
from sparsek_dist.relations import divisors

CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary positions whose frequencies transformers chooses anew by the largest position that it sees."""


def least_shard(spec: PreTrainedConfig, attention: AttentionConfig, *, degree: int, told: str) -> int:
    """Tokens that a shard must hold at least: the longest window of any layer that has one, else 1.

    Args:
        spec: transformers' config of the model.
        attention: what its layers have or will have; `full` if they are dense.
        degree: ranks that share a sequence. One needs nothing.
        told: names the degree in errors.

    Raises:
        ConfigError: if a layer cannot share a sequence among so many ranks.
    """
    if degree == 1:
        return 1
    if spec.model_type not in FAMILIES:
        cure = f"use one of {', '.join(sorted(FAMILIES))}" + (", or one process" if attention.kind == "full" else "")
        raise ConfigError(f"model_type = {spec.model_type} cannot share its sequences over {told} = {degree}: {cure}")
    _refuse_changing_positions(spec)
    with torch.device("meta"):
        modules = attention_modules(AutoModelForCausalLM.from_config(spec))
    if attention.kind == "full":
        _refuse_sliding(modules)
        check_heads(spec, degree, told=told)
        return 1
    plan = plan_layers(modules, attention.full_layers, keep_sliding=attention.sliding_layers == "keep")
    if "full" in plan:
        check_heads(spec, degree, told=told)
    windows = {"full": 1, "sparsek": attention.reach}
    return max(windows.get(kind) or sliding_window(module) or 1 for module, kind in zip(modules, plan, strict=True))


def check_heads(spec: PreTrainedConfig, degree: int, *, told: str) -> None:
    """Raises ConfigError if dense layers cannot give each of `degree` ranks as many heads (DeepSpeed-Ulysses)."""
    query_heads, kv_heads = spec.num_attention_heads, num_kv_heads(spec)
    common = math.gcd(query_heads, kv_heads)
    if common % degree:
        raise ConfigError(
            f"{told} = {degree} must divide the {query_heads} query heads and {kv_heads} KV heads of this "
            f"{spec.model_type} model, because its dense layers share heads among ranks: use {divisors(common)}"
        )


def _refuse_changing_positions(spec: PreTrainedConfig) -> None:
    """Some rotary frequencies follow from the length of the sequence: transformers would take that of each shard."""
    parameters = getattr(spec, "rope_parameters", None) or {}
    by_layer_type = [entry for entry in parameters.values() if isinstance(entry, dict)]
    for entry in by_layer_type or [parameters]:
        if entry.get("rope_type") in CHANGING_ROPES:
            raise ConfigError(
                f"rope_type = {entry['rope_type']} of this {spec.model_type} model changes with the length of the "
                "sequence, of which each rank holds a shard: use one process (parallel.sequence_degree=1)"
            )


def _refuse_sliding(modules: list[Any]) -> None:
    for index, module in enumerate(modules):
        if (window := sliding_window(module)) is not None:
            raise ConfigError(
                f"layer {index} slides a window of {window} tokens, which dense attention cannot honour over several "
                "ranks: use one process, or convert the model (sparsek sparsify)"
            )
