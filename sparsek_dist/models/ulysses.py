"""Dense attention of a transformers model over a shared sequence, through transformers' own interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsek_dist.attention.ulysses import UlyssesAttention
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.families import attention_modules
from sparsek_dist.parallel.mesh import RankGroup

NAME = "ulysses"
"""The `attn_implementation` under which transformers knows this attention."""


def install_ulysses(model: PreTrainedModel, group: RankGroup) -> None:
    """Lets every attention layer of `model` exchange heads for tokens with the other ranks of `group`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    attention = UlyssesAttention(group)
    for module in attention_modules(model):
        module.ulysses_attention = attention
    model.set_attn_implementation(NAME)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [b, h, s, d] in, [b, s, h, d] out."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown or dropout or attention_mask is not None:
        raise ConfigError(f"attention.kind = full over several ranks cannot honour {unknown or 'dropout or a mask'}")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return module.ulysses_attention(query, key, value, position_ids, scale=scaling), None


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Causality and documents follow from positions. Padding is refused, not ignored."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ConfigError("attention_mask marks padding, which is not taken here: pack documents instead")
