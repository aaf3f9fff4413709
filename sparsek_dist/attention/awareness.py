"""No layer that mixes tokens may work on a shard as if it were the whole sequence: it would train, silently wrong."""

from __future__ import annotations

import re

from torch import nn

from sparsek_dist.errors import ConfigError

AWARE = ("parallel_attention", "ulysses_attention")
"""What an attention module carries that exchanges with other ranks."""

MIXES_TOKENS = re.compile(r"Attention|Attn|Mixer|Mamba|DeltaNet|RetNet|Rwkv|Recurrent|LongConv|ShortConv|SSM")
MIXES_TOKENS_TYPES = (nn.MultiheadAttention, nn.RNNBase, nn.Conv1d)


def refuse_unaware_layers(model: nn.Module) -> None:
    """Every module that mixes tokens must be, or be part of, one that exchanges with other ranks.

    Raises:
        ConfigError: naming the first that is not.
    """
    refused = _first_unaware(model, "")
    if refused:
        raise ConfigError(
            f"model layer {refused} mixes tokens but knows nothing of other ranks, so it would see one shard as the "
            "whole sequence: set parallel.sequence_degree to 1, or choose a model.type with plain attention layers"
        )


def _first_unaware(module: nn.Module, path: str) -> str:
    if any(hasattr(module, name) for name in AWARE):
        return ""
    kind = type(module).__name__
    if isinstance(module, MIXES_TOKENS_TYPES) or MIXES_TOKENS.search(kind):
        return f"{path} ({kind})"
    children = (_first_unaware(child, f"{path}.{name}".lstrip(".")) for name, child in module.named_children())
    return next((found for found in children if found), "")
