"""SPARSEK attention: a sliding window and the k best-scored older pairs, one softmax, a constant cost per query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.budget import Budget
from sparsek_kernels.carry import Best, Carry, empty_carry
from sparsek_kernels.checks import check_attention, check_finite, document_starts
from sparsek_kernels.chunked import chunked_attention
from sparsek_kernels.columns import Shape
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.reference import attention_reference
from sparsek_kernels.selection import Selection, select

DEFAULT_SUPPORT_RATIO = 4
"""S / k where the caller names no support."""


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    num_selected: int,
    window: int,
    support: int | None = None,
    gate: str = "straight_through",
    document_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over the w newest tokens and the k best-scored older pairs of each KV head.

    Query i sees the keys (i - w, i] of its document, and of the older ones the k with the highest score (of two equal
    scores the later). One softmax runs over both. Selected pairs are gated by m = clip(u_j - tau_i, 0, 1), the SPARSEK
    projection of the S best candidates, which is what makes the scores trainable (arXiv 2406.16747; the window's
    exemption, the tie rule, S and `straight_through` are this project's own, see kernels/README.md).

    Args:
        query: [b, s, h, d].
        key: [b, s, g, d]; h must be a multiple of g. Likewise value.
        scores: [b, s, g], one per key-value pair, whatever the query; float32 (or float64 in tests).
        num_selected: k; 0 leaves the window alone.
        window: w >= 1, the token itself included.
        support: S > k, candidates that take part in the projection; default 4 k.
        gate: `value` scales v, `key_value` scales k and v; `straight_through` computes as if m = 1 and
            differentiates as `value`; `none` is m = 1 in both directions (the scores then get no gradient).
        document_ids: [b, s] non-decreasing integers; tokens see only their own document. Default: one document.
        scale: of the logits; default 1 / sqrt(d).
        backend: `auto`, `triton`, `torch` (linear in s) or `reference` (quadratic, obviously right).

    Returns:
        [b, s, h, d], in the dtype of `query`.

    Raises:
        ValueError: naming the argument that cannot work; for NaN or infinite scores; for a backend that cannot run.
    """
    check_attention(
        query,
        key,
        value,
        scores,
        num_selected=num_selected,
        window=window,
        support=support,
        gate=gate,
        scale=scale,
    )
    check_finite(scores)
    starts = document_starts(document_ids, query)
    support = DEFAULT_SUPPORT_RATIO * num_selected if support is None else support
    chosen = resolve(backend, query, key.shape[2], num_selected)
    if chosen == "reference":
        return attention_reference(
            query,
            key,
            value,
            scores,
            num_selected=num_selected,
            window=window,
            support=support,
            gate=gate,
            document_ids=document_ids,
            scale=scale,
        )
    # No token has more than s candidates, so a larger k or S selects the same: keep the tables small.
    budget, s = Budget(num_selected, window, support, gate), query.shape[1]
    if chosen == "triton":
        # Kernels are compiled for a k: a power of two, so that not every length below k compiles its own.
        budget = budget.at_most(1 << (s - 1).bit_length())
        carry = empty_carry(key, scores, num_selected=0, support=0)
    else:
        budget = budget.at_most(s)
        carry = empty_carry(key, _precise(scores), num_selected=budget.num_selected, support=budget.support)
        pad = (0, 0, 0, 0, window - 1, 0)
        key, value, scores = F.pad(key, pad), F.pad(value, pad), F.pad(scores, pad[2:])
    selection = _select(chosen, query, scores, carry, starts, budget)
    return _attend(chosen, query, key, value, scores, carry, starts, selection, budget, scale)


def shard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    *,
    window: int,
    gate: str = "straight_through",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sparsek_attention` for a shard whose earlier tokens are elsewhere: what each sequence-parallel rank runs.

    Args:
        query: [b, s, h, d].
        key: [b, w - 1 + s, g, d]: the w - 1 tokens before the shard (anything finite where there are none), then it;
            likewise value.
        scores: [b, w - 1 + s, g], finite: the caller has looked, as it can say which layer they come from.
        carry: summary of all earlier candidates; its shapes give k and S.
        document_start: [b, s] where each query's document begins, counted from the first query (negative if before).
    """
    budget = Budget(carry.key.shape[2], window, carry.scores.shape[2], gate)
    selection = select_shard(query, scores, carry, document_start, budget=budget, backend=backend)
    return attend_shard(
        query, key, value, scores, carry, document_start, selection, budget=budget, scale=scale, backend=backend
    )


def select_shard(
    query: Tensor, scores: Tensor, carried: Best, document_start: Tensor, *, budget: Budget, backend: str = "auto"
) -> Selection:
    """The first step of `shard_attention`: what each query sees. No pair is needed, so they may still be travelling.

    Args:
        query: [b, s, h, d], for its shape, dtype and device alone.
        carried: the S best of all earlier candidates.

    Returns:
        For `attend_shard` with the same query and backend.
    """
    chosen = _resolve_shard(backend, query, scores.shape[2], budget)
    return _select(chosen, query, scores, carried, document_start, budget)


def attend_shard(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    selection: Selection,
    *,
    budget: Budget,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second step of `shard_attention`, whose arguments it takes, with the `selection` of the first."""
    check_attention(
        query,
        key,
        value,
        scores,
        num_selected=budget.num_selected,
        window=budget.window,
        support=budget.support,
        gate=budget.gate,
        scale=scale,
        halo=budget.window - 1,
    )
    chosen = _resolve_shard(backend, query, key.shape[2], budget)
    return _attend(chosen, query, key, value, scores, carry, document_start, selection, budget, scale)


def _resolve_shard(backend: str, query: Tensor, num_kv_heads: int, budget: Budget) -> str:
    chosen = resolve(backend, query, num_kv_heads, budget.num_selected)
    if chosen == "reference":
        raise ValueError("backend = 'reference' works on whole sequences only: use 'auto' or 'torch' for shards")
    return chosen


def _select(
    chosen: str, query: Tensor, scores: Tensor, carried: Best, document_start: Tensor, budget: Budget
) -> Selection:
    if chosen == "triton":
        # Imported here, as triton exists for few platforms and nothing else needs it.
        from sparsek_kernels.gpu.ops import select_for

        return select_for(query, scores, carried, document_start, budget)
    return select(
        _precise(scores.detach()).transpose(1, 2),
        num_selected=budget.num_selected,
        window=budget.window,
        support=budget.support,
        document_start=document_start,
        carry=carried,
        chunk_size=_chunk_size(query, budget),
    )


def _attend(
    chosen: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    selection: Selection,
    budget: Budget,
    scale: float | None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "triton":
        from sparsek_kernels.gpu.ops import attend

        return attend(query, key, value, scores, carry, document_start, selection, budget, scale)
    shape = Shape(**vars(budget), scale=scale, chunk_size=_chunk_size(query, budget))
    return chunked_attention(query, key, value, _precise(scores), carry, selection, shape)


def _chunk_size(query: Tensor, budget: Budget) -> int:
    return min(128 if budget.num_selected + budget.window >= 256 else 64, query.shape[1])


def _precise(scores: Tensor) -> Tensor:
    """Scores decide by their order: never in less than float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
