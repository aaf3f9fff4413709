"""Replaces the attention of a transformers model through transformers' own interface, and nothing else of it.

Each attention module gets a `scorer` and a `ParallelAttention`. A pre-forward hook computes the scores from the input
of the module, the normalised hidden states, and hands them on as a keyword argument, which transformers passes through
to the registered attention function. No class is patched and no module-level state is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsek_dist.attention.exchange import Exchange
from sparsek_dist.attention.parallel import Budget, ParallelAttention, build_scorer
from sparsek_dist.config import AttentionConfig
from sparsek_dist.errors import ConfigError, NumericsError
from sparsek_dist.parallel.mesh import RankGroup

NAME = "sparsek"
"""The `attn_implementation` under which transformers knows this attention."""

SUPPORTED = ("llama",)
"""Architectures (`model_type`) whose attention modules are known to fit."""


def install(
    model: PreTrainedModel, config: AttentionConfig, group: RankGroup, *, seed: int, exchange: Exchange = "auto"
) -> None:
    """Gives every attention layer of `model` a scorer and this rank's attention.

    Raises:
        ConfigError: for an architecture that is not supported, or attention features that cannot be honoured.
    """
    spec = model.config
    if spec.model_type not in SUPPORTED:
        raise ConfigError(f"model.type = {spec.model_type} is not supported: use {' or '.join(SUPPORTED)}")
    if getattr(spec, "attention_dropout", 0.0):
        raise ConfigError(
            f"attention_dropout = {spec.attention_dropout} cannot be honoured by SPARSEK attention: use 0"
        )
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    attention = ParallelAttention(Budget.of(config), group, config.backend, exchange)
    for index, module in enumerate(attention_modules(model)):
        module.scorer = build_scorer(
            config, hidden_size=spec.hidden_size, num_kv_heads=spec.num_key_value_heads, seed=seed, layer=index
        )
        module.parallel_attention = attention
        module.register_forward_pre_hook(_pass_scores, with_kwargs=True)
    model.set_attn_implementation(NAME)


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module (torch.nn.Module) of each decoder layer, in order."""
    return [layer.self_attn for layer in model.get_decoder().layers]


def _pass_scores(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    scores = module.scorer(hidden, kwargs["position_ids"])
    # A NaN would make the selection arbitrary without a trace, so it ends the run here, with the place.
    if not bool(torch.isfinite(scores).all()):
        raise NumericsError(f"layer {module.layer_idx}: attention scores hold NaN or infinity; the run has diverged")
    return args, kwargs | {"scores": scores}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    scores: Tensor,
    position_ids: Tensor,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [b, h, s, d] in, [b, s, h, d] out. The only transposes of the project."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown or dropout or attention_mask is not None:
        raise ConfigError(f"SPARSEK attention cannot honour {unknown or 'dropout or an attention mask'} of this model")
    if key.shape[2] != query.shape[2]:
        raise ConfigError("SPARSEK attention keeps no growing cache: call the model with use_cache=False")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return module.parallel_attention(query, key, value, scores, position_ids, scale=scaling), None


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Causality, window and documents follow from positions: no mask is ever built. Padding is refused, not ignored."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ConfigError("attention_mask marks padding, which SPARSEK attention does not take: pack documents instead")
