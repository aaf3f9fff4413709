"""SPARSEK attention: a sliding window and the k best-scored older pairs, one softmax, a constant cost per query."""

from __future__ import annotations

from torch import Tensor

from sparsek_kernels.budget import Budget
from sparsek_kernels.checks import check_attention, check_finite, document_starts
from sparsek_kernels.device_checks import DeviceChecks
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.reference import attention_reference
from sparsek_kernels.shards import attend_on, select_on

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
    gate: str = "value",
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
    budget = Budget(num_selected, window, support, gate)
    selection = select_on(chosen, query, scores, None, starts, budget)
    out = attend_on(chosen, query, key, value, scores, None, starts, selection, budget, scale)
    checks.look()
    return out
