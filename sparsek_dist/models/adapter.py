"""Replaces the attention of a transformers model through transformers' own interface, and nothing else of it.

Each attention module gets a `scorer` and a `ParallelAttention`. A pre-forward hook computes the scores from the input
of the module, the normalised hidden states, and hands them on as a keyword argument, which transformers passes through
to the registered attention function. No class is patched and no module-level state is kept.

Positions say everything about visibility: document positions [b, s] restart where a packed document begins and where
left padding ends. A padding token is a document of its own, so nobody else sees it and its softmax is never empty.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_dist.attention.dense import causal_attention
from sparsek_dist.attention.exchange import Exchange
from sparsek_dist.attention.parallel import ParallelAttention, budget_of, build_scorer
from sparsek_dist.attention.ulysses import UlyssesAttention
from sparsek_dist.config import AttentionConfig
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.cache import KeptLayer, kept_layer
from sparsek_dist.models.families import attention_modules, family_of, num_kv_heads, plan_layers, sliding_window
from sparsek_dist.models.sharing import check_heads
from sparsek_dist.models.watch import ScoreWatch
from sparsek_dist.parallel.mesh import RankGroup

NAME = "sparsek"
"""The `attn_implementation` under which transformers knows this attention."""

FORMAT = 1
"""Version of the `sparsek` entry in a saved model's config.json."""


def install(
    model: PreTrainedModel, config: AttentionConfig, group: RankGroup, *, seed: int, exchange: Exchange = "auto"
) -> None:
    """Gives the attention layers of `model` scorers and this rank's attention. No weight of the model changes.

    Raises:
        ConfigError: for an architecture that is not supported, or attention features that cannot be honoured.
    """
    spec = model.config
    family = family_of(spec)
    modules = attention_modules(model)
    if any(hasattr(module, "layer_kind") for module in modules):
        raise ConfigError("this model has SPARSEK attention already: start from the dense model")
    plan = plan_layers(modules, config.full_layers, keep_sliding=config.sliding_layers == "keep")
    ulysses = None
    if group.size > 1 and "full" in plan:
        check_heads(spec, group.size, told="parallel.sequence_degree")
        ulysses = UlyssesAttention(group)
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _padding)
    attention = ParallelAttention(budget_of(config), group, config.backend, exchange)
    prepare = partial(_prepare, cache_name=family.cache, watch=ScoreWatch(model))
    for index, (module, kind) in enumerate(zip(modules, plan, strict=True)):
        module.layer_kind = kind
        module.register_forward_pre_hook(prepare, with_kwargs=True)
        if kind == "full":
            if ulysses is not None:
                module.ulysses_attention = ulysses
            continue
        settings = config
        if kind == "sliding":
            settings = AttentionConfig(kind="window", num_selected=0, window=sliding_window(module) or 1)
        weight = next(module.parameters())
        module.scorer = build_scorer(
            settings, hidden_size=spec.hidden_size, num_kv_heads=num_kv_heads(spec), seed=seed, layer=index
        ).to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
        module.parallel_attention = replace(attention, budget=budget_of(settings))
    model.set_attn_implementation(NAME)
    spec.sparsek = section(config, seed=seed)


def section(config: AttentionConfig, *, seed: int) -> dict[str, Any]:
    """What the `sparsek` entry of a saved model's config.json says: everything but where it runs."""
    return {"format": FORMAT, "seed": seed, **asdict(config.settled(), dict_factory=_without_backend)}


def _without_backend(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in entries if name != "backend"}


def _prepare(
    module: Any, args: tuple, kwargs: dict[str, Any], *, cache_name: str, watch: ScoreWatch
) -> tuple[tuple, dict[str, Any]]:
    """What the attention function needs beyond queries, keys and values: positions, scores, this layer's cache."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    positions = document_positions(kwargs["position_ids"].expand(len(hidden), -1), kwargs.get("attention_mask"))
    added: dict[str, Any] = {"position_ids": positions}
    if module.layer_kind != "full":
        added["scores"] = scores = module.scorer(hidden, positions)
        cache = kwargs.get(cache_name)
        # A cache keeps scores for later, and waits for the device anyway.
        watch.add(module.layer_idx, scores, now=cache is not None)
        if cache is not None:
            added["kept"] = kept_layer(cache, module.layer_idx, module.parallel_attention)
    return args, kwargs | added


def document_positions(position_ids: Tensor, padding: Tensor | None) -> Tensor:
    """Positions [b, s] counted from the first token that is seen: 0 in left padding.

    Args:
        position_ids: [b, s] as the model got them, which may or may not have been told of the padding.
        padding: [b, t] with t >= s, from `_padding`: whether each token so far is a real one; None if all are.
    """
    if padding is None:
        return position_ids
    if padding.ndim != 2:
        raise ConfigError("SPARSEK attention takes no attention_mask of its own shape: give [b, s], or pack documents")
    index = torch.arange(padding.shape[1] - position_ids.shape[1], padding.shape[1], device=padding.device)
    # Of rows that are padding alone, all is padding.
    first = torch.where(padding.any(dim=1), padding.int().argmax(dim=1), padding.shape[1])
    since_padding = index - first.unsqueeze(1)
    return torch.minimum(position_ids, since_padding).clamp_min(0)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    scores: Tensor | None = None,
    kept: KeptLayer | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [b, h, s, d] in, [b, s, h, d] out. The only transposes of the project."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise ConfigError(f"SPARSEK attention cannot honour {', '.join(unknown) or 'attention dropout'} of this model")
    if scores is None:
        return _dense(module, query, key, value, position_ids, scaling), None
    attend = module.parallel_attention if kept is None else kept.attend
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(query, key, value, scores, position_ids, scale=scaling), None


def _dense(module: Any, query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scaling: float) -> Tensor:
    """A layer that stays as it was: all earlier tokens of the document, by torch's attention or, if shared, Ulysses."""
    if hasattr(module, "ulysses_attention"):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return module.ulysses_attention(query, key, value, position_ids, scale=scaling)
    s, t = query.shape[2], key.shape[2]
    index = torch.arange(t - s, t, device=query.device)
    starts = (index - position_ids).clamp_min(0)
    mask = None
    if bool(starts.any()) or 1 < s < t:
        keys = torch.arange(t, device=query.device)
        mask = ((keys <= index.unsqueeze(-1)) & (keys >= starts.unsqueeze(-1))).unsqueeze(1)
    if mask is None and s == t:
        return causal_attention(query, key, value, scale=scaling).transpose(1, 2)
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling)
    return output


def _padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Causality, window and documents follow from positions: no [s, s] mask is built, padding goes on as [b, t].

    Raises:
        ConfigError: for holes. Padding to the right needs no care, as nobody looks at later tokens.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    seen = attention_mask.bool()
    resumes = (seen[:, 1:] & ~seen[:, :-1]).sum(dim=1) + seen[:, 0].int()
    if bool((resumes > 1).any()):
        raise ConfigError(
            "attention_mask hides tokens between others, which SPARSEK attention does not take: pad to the left only"
        )
    return seen
