"""Attention in two steps, of a shard or of a whole sequence: what each query sees, then the attention.

The first step needs scores alone. So the keys and values that other ranks send may still travel while it runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.budget import Budget
from sparsek_kernels.carry import Best, Carry, empty_carry
from sparsek_kernels.checks import check_attention
from sparsek_kernels.chunked import chunked_attention
from sparsek_kernels.columns import Shape
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.selection import Selection, select


def shard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    *,
    window: int,
    gate: str = "value",
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
    _check_shard(query, key, value, scores, carry, budget, scale)
    chosen = _resolve_shard(backend, query, key.shape[2], budget)
    selection = select_on(chosen, query, scores, carry, document_start, budget)
    return attend_on(chosen, query, key, value, scores, carry, document_start, selection, budget, scale)


def select_shard(
    query: Tensor,
    scores: Tensor,
    carried: Best | None,
    document_start: Tensor,
    *,
    budget: Budget,
    backend: str = "auto",
) -> Selection:
    """The first step of `shard_attention`: what each query sees. No pair is needed, so they may still be travelling.

    Args:
        query: [b, s, h, d], for its shape, dtype and device alone.
        scores: [b, w - 1 + s, g], finite; [b, s, g] where nothing comes before.
        carried: the S best of all earlier candidates; None where nothing comes before.

    Returns:
        For `attend_shard` with the same query and backend.
    """
    chosen = _resolve_shard(backend, query, scores.shape[2], budget)
    return select_on(chosen, query, scores, carried, document_start, budget)


def attend_shard(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry | None,
    document_start: Tensor,
    selection: Selection,
    *,
    budget: Budget,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second step of `shard_attention`, whose arguments it takes, with the `selection` of the first.

    Where nothing comes before, there is no halo either: carry None, key [b, s, g, d].
    """
    _check_shard(query, key, value, scores, carry, budget, scale)
    chosen = _resolve_shard(backend, query, key.shape[2], budget)
    return attend_on(chosen, query, key, value, scores, carry, document_start, selection, budget, scale)


def _check_shard(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, carry: Carry | None, budget: Budget, scale: float | None
) -> None:
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
        halo=0 if carry is None else budget.window - 1,
    )


def _resolve_shard(backend: str, query: Tensor, num_kv_heads: int, budget: Budget) -> str:
    chosen = resolve(backend, query, num_kv_heads, budget.num_selected)
    if chosen == "reference":
        raise ValueError("backend = 'reference' works on whole sequences only: use 'auto' or 'torch' for shards")
    return chosen


def select_on(
    chosen: str, query: Tensor, scores: Tensor, carried: Best | None, document_start: Tensor, budget: Budget
) -> Selection:
    """`select_shard` by the implementation `chosen`, `triton` or `torch`; nothing is checked."""
    if carried is None:
        budget, carried = _alone(chosen, query, scores, budget)
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


def attend_on(
    chosen: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry | None,
    document_start: Tensor,
    selection: Selection,
    budget: Budget,
    scale: float | None,
) -> Tensor:
    """`attend_shard` by the implementation `chosen`; nothing is checked."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if carry is None:
        budget, carry = _alone(chosen, query, scores, budget)
    if chosen == "triton":
        from sparsek_kernels.gpu.ops import attend

        return attend(query, key, value, scores, carry, document_start, selection, budget, scale)
    if key.shape[1] == query.shape[1]:
        halo = (0, 0, 0, 0, budget.window - 1, 0)
        key, value, scores = F.pad(key, halo), F.pad(value, halo), F.pad(scores, halo[2:])
    shape = Shape(**vars(budget), scale=scale, chunk_size=_chunk_size(query, budget))
    return chunked_attention(query, key, value, _precise(scores), carry, selection, shape)


def _alone(chosen: str, query: Tensor, scores: Tensor, budget: Budget) -> tuple[Budget, Carry]:
    """The carry of a sequence with nothing before it, and a budget that selects the same out of smaller tables.

    No token has more than s candidates, so a larger k or S selects the same.
    """
    s = query.shape[1]
    like_key = query[:, :, :1].expand(-1, -1, scores.shape[2], -1)
    if chosen == "triton":
        # Kernels are compiled for a k: a power of two, so that not every length below k compiles its own.
        return budget.at_most(1 << (s - 1).bit_length()), empty_carry(like_key, scores, num_selected=0, support=0)
    budget = budget.at_most(s)
    sizes = {"num_selected": budget.num_selected, "support": budget.support}
    return budget, empty_carry(like_key, _precise(scores), **sizes)


def _chunk_size(query: Tensor, budget: Budget) -> int:
    return min(128 if budget.num_selected + budget.window >= 256 else 64, query.shape[1])


def _precise(scores: Tensor) -> Tensor:
    """Scores decide by their order: never in less than float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
