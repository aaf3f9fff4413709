"""SPARSEK attention: a sliding window and the k best-scored older pairs, one softmax, a constant cost per query."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.carry import Carry, empty_carry
from sparsek_kernels.checks import check_attention, check_finite, document_starts
from sparsek_kernels.chunked import chunked_attention
from sparsek_kernels.columns import Shape
from sparsek_kernels.device_checks import DeviceChecks
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.reference import attention_reference

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
    checks = DeviceChecks()
    check_finite(scores, checks)
    starts = document_starts(document_ids, query, checks)
    support = DEFAULT_SUPPORT_RATIO * num_selected if support is None else support
    chosen = resolve(backend, query, key.shape[2], num_selected)
    # PyTorch's paths wait for the device anyway; the kernels end and stay within bounds whatever the scores are, so
    # there the host looks last, when all is queued.
    if chosen != "triton":
        checks.look()
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
    s = query.shape[1]
    if chosen == "triton":
        # Kernels are compiled for a k: a power of two, so that not every length below k compiles its own.
        most = 1 << (s - 1).bit_length()
        num_selected, support = min(num_selected, most), min(support, most)
        nothing = empty_carry(key, _precise(scores), num_selected=0, support=0)
        out = _run_triton(query, key, value, scores, nothing, starts, num_selected, window, support, gate, scale)
        checks.look()
        return out
    num_selected, support = min(num_selected, s), min(support, s)
    carry = empty_carry(key, _precise(scores), num_selected=num_selected, support=support)
    pad = (0, 0, 0, 0, window - 1, 0)
    return _run(query, F.pad(key, pad), F.pad(value, pad), F.pad(scores, pad[2:]), carry, starts, window, gate, scale)


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
    num_selected, support = carry.key.shape[2], carry.scores.shape[2]
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
        halo=window - 1,
    )
    chosen = resolve(backend, query, key.shape[2], num_selected)
    if chosen == "reference":
        raise ValueError("backend = 'reference' works on whole sequences only: use 'auto' or 'torch' for shards")
    if chosen == "triton":
        return _run_triton(query, key, value, scores, carry, document_start, num_selected, window, support, gate, scale)
    return _run(query, key, value, scores, carry, document_start, window, gate, scale)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    window: int,
    gate: str,
    scale: float | None,
) -> Tensor:
    num_selected, support = carry.key.shape[2], carry.scores.shape[2]
    chunk_size = min(128 if num_selected + window >= 256 else 64, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = Shape(num_selected, window, support, gate, scale, chunk_size)
    return chunked_attention(query, key, value, _precise(scores), document_start, carry, shape)


def _run_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    num_selected: int,
    window: int,
    support: int,
    gate: str,
    scale: float | None,
) -> Tensor:
    # Imported here, as triton exists for few platforms and nothing else needs it.
    from sparsek_kernels.gpu.ops import attention

    # The kernels know two precisions: that of the pairs, and the one they accumulate in.
    precise = torch.promote_types(query.dtype, torch.float32)
    carry = replace(
        carry, scores=carry.scores.to(precise), key=carry.key.to(key.dtype), value=carry.value.to(key.dtype)
    )
    return attention(
        query,
        key,
        value,
        scores.to(precise),
        carry,
        document_start,
        num_selected=num_selected,
        window=window,
        support=support,
        gate=gate,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )


def _precise(scores: Tensor) -> Tensor:
    """Scores decide by their order: never in less than float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
