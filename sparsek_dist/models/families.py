"""Which transformers architectures SPARSEK attention fits into: a table, not code per family.

A family fits if its attention goes through transformers' AttentionInterface, receives the normalised hidden states of
its block, and hands unknown keyword arguments on. Head counts, rotary or learned positions, query and key norms, biases
and tied embeddings stay in transformers' own code and need no entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from sparsek_dist.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what the adapter needs."""

    layers: str = "layers"
    """Attribute of the decoder: its blocks."""
    attention: str = "self_attn"
    """Attribute of a block: its attention module, whose first argument the scorer reads."""
    cache: str = "past_key_values"
    """Keyword under which the attention module receives the cache."""
    grouped: bool = True
    """Whether query heads may share a KV head; if not, there are as many of one as of the other."""


FAMILIES = {
    "gemma": Family(),
    "gemma3_text": Family(),
    "gpt2": Family(layers="h", attention="attn", grouped=False),
    "gpt_neox": Family(attention="attention", cache="layer_past", grouped=False),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "starcoder2": Family(),
}
"""By transformers' `model_type`. tests/models/test_families.py holds each against its own dense attention."""

REFUSED = {
    "attn_logit_softcapping": "a cap on the logits",
    "add_cross_attention": "cross attention",
    "use_bidirectional_attention": "attention to later tokens",
}
"""Fields of a model's config that change what attention computes in a way that SPARSEK attention does not."""

DROPOUTS = ("attention_dropout", "attn_pdrop")
"""Names under which configs keep the dropout on attention weights."""


def family_of(spec: PreTrainedConfig) -> Family:
    """The table's row for a model's config.

    Raises:
        ConfigError: for an architecture that is not in the table, or an attention feature that cannot be honoured.
    """
    for field, meaning in REFUSED.items():
        if getattr(spec, field, None):
            raise ConfigError(
                f"{field} = {getattr(spec, field)} of this {spec.model_type} model is {meaning}, which SPARSEK "
                "attention cannot honour: take a model without it"
            )
    if spec.model_type not in FAMILIES:
        raise ConfigError(f"model_type = {spec.model_type} is not supported: use one of {', '.join(sorted(FAMILIES))}")
    for field in DROPOUTS:
        if getattr(spec, field, 0.0):
            raise ConfigError(
                f"{field} = {getattr(spec, field)} cannot be honoured by SPARSEK attention, which has no dropout on "
                "its weights: set it to 0, or convert with attention_dropout='off' (--no-attention-dropout)"
            )
    return FAMILIES[spec.model_type]


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module (torch.nn.Module) of each decoder layer, in order."""
    family = FAMILIES[model.config.model_type]
    return [getattr(layer, family.attention) for layer in getattr(model.get_decoder(), family.layers)]


def num_kv_heads(spec: PreTrainedConfig) -> int:
    """g."""
    return spec.num_key_value_heads if FAMILIES[spec.model_type].grouped else spec.num_attention_heads


def sliding_window(module: Any) -> int | None:
    """Newest tokens that an attention module sees as it was trained; None for all of them."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None)


def turn_dropout_off(model: PreTrainedModel) -> None:
    """Sets the dropout on attention weights to 0, in the config and in every module that has read it."""
    for field in DROPOUTS:
        if hasattr(model.config, field):
            setattr(model.config, field, 0.0)
    for module in attention_modules(model):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.0


def plan_layers(modules: list[Any], full_layers: str, *, keep_sliding: bool) -> list[str]:
    """What each layer becomes: `sparsek`, `full` (dense, as it was) or `sliding` (its own window, as it was).

    Args:
        modules: attention modules, in order.
        full_layers: `none`, `every_other` (1, 3, 5, ...) or layer indices, as in `0,5,11`.
        keep_sliding: leave layers that were trained with a sliding window as they are.

    Raises:
        ConfigError: for an index that is no layer, or if no layer is left for SPARSEK.
    """
    full = set(_full_indices(full_layers, len(modules)))
    slides = [keep_sliding and sliding_window(module) is not None for module in modules]
    clash = sorted(full & {index for index, slide in enumerate(slides) if slide})
    if clash and full_layers != "every_other":
        raise ConfigError(
            f"attention.full_layers = {full_layers} names layer {clash[0]}, which slides a window: leave it out, it "
            "stays as it is"
        )
    plan = ["sliding" if slides[i] else "full" if i in full else "sparsek" for i in range(len(modules))]
    if "sparsek" not in plan:
        cure = "attention.sliding_layers = replace" if "sliding" in plan else "fewer attention.full_layers"
        raise ConfigError(
            f"attention.full_layers = {full_layers} and the model's sliding layers leave none of {len(modules)} "
            f"layers for SPARSEK: use {cure}"
        )
    return plan


def _full_indices(full_layers: str, count: int) -> Iterator[int]:
    if full_layers == "none":
        return
    if full_layers == "every_other":
        yield from range(1, count, 2)
        return
    for word in full_layers.split(","):
        index = int(word)
        if index >= count:
            raise ConfigError(
                f"attention.full_layers = {full_layers} names layer {index}, but the model has {count}: "
                f"use 0 to {count - 1}"
            )
        yield index
