"""SPARSEK attention in its plainest form: the ground truth that every faster path is tested against.

Dense masks, O(n^3) time, pure torch, differentiable by autograd, nothing imported from the rest of the package. Meant
for float64 and short sequences. The operator is that of arXiv 2406.16747; window, support, ties and gates are ours.

Dims: b batch, s queries, t keys (s = t), h query heads, g KV heads, d head dim, n entries of one projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceSelection:
    """What every query sees besides its window.

    Attributes:
        selected: [b, g, s, t] bool, key t is one of the k best candidates of query s.
        gates: [b, g, s, t], SPARSEK over the S best candidates of query s; 0 for every other key.
        tau: [b, g, s], the threshold: gates = clip(score - tau, 0, 1) within the support; -inf where at most k
            candidates exist and all gates are 1.
        support_size: [b, g, s] int64, number of gates above 0.
    """

    selected: Tensor
    gates: Tensor
    tau: Tensor
    support_size: Tensor


def sparsek_reference(scores: Tensor, num_selected: int) -> Tensor:
    """Projects scores onto {p : 0 <= p <= 1, sum p = k}, the SPARSEK operator.

    p = clip(scores - tau, 0, 1), with tau such that the sum is k; all ones where there are at most k entries. Its
    Jacobian is Diag(s) - s s^T / |s| with s = 1{0 < p < 1}, which is zero where p is exactly hard top-k.

    Args:
        scores: [..., n], finite, or -inf for an entry that does not exist: its p is 0 and it is not counted.
        num_selected: k >= 0.
    """
    return _project(scores, num_selected)[0]


def _project(scores: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """The gates [..., n] and the threshold tau [...] (-inf where at most k entries exist)."""
    present = scores > -math.inf
    few = present.sum(-1, keepdim=True) <= num_selected
    with torch.no_grad():
        # Every fractional entry lies within 1 of the k-th best score: measured from there nothing is lost to rounding,
        # however large the scores are.
        rank = min(max(num_selected, 1), scores.shape[-1])
        kth_best = scores.topk(rank).values[..., -1:].masked_fill(few, 0.0)
        centred = scores - kth_best
        left = _last_breakpoint_with_mass(centred, num_selected)
        # Between `left` and the next breakpoint the mass falls linearly to k; or it is k at `left` itself, and then an
        # entry whose gate is exactly 1 there is saturated, not interior.
        at_left = _mass(centred, left) == num_selected
        saturated = torch.where(at_left, centred - 1 >= left, centred - 1 > left)
        interior = (centred > left) & ~saturated
        num_interior = interior.sum(-1, keepdim=True)
        remaining_mass = num_selected - saturated.sum(-1, keepdim=True)

    # With the two sets known, tau is linear in the interior scores: autograd then yields exactly the stated Jacobian.
    centred = scores - kth_best
    interior_sum = torch.where(interior, centred, 0.0).sum(-1, keepdim=True)
    tau = torch.where(num_interior > 0, (interior_sum - remaining_mass) / num_interior.clip(min=1), left)
    gates = torch.where(interior, centred - tau, saturated.to(scores.dtype))
    gates = torch.where(few, present.to(scores.dtype), gates)
    tau = torch.where(few, -math.inf, kth_best + tau)
    return gates, tau.squeeze(-1)


def _mass(scores: Tensor, tau: Tensor) -> Tensor:
    """sum clip(scores - tau, 0, 1) over the last dim, which is kept: [..., n] and [..., 1] -> [..., 1]."""
    return (scores - tau).clip(0, 1).sum(-1, keepdim=True)


def _last_breakpoint_with_mass(centred: Tensor, num_selected: int) -> Tensor:
    """The largest tau among all z_j and z_j - 1 with a mass of at least k, for z with z_(k) = 0; [..., n] -> [..., 1].

    The mass falls with tau: at least k at tau = -1, where k entries reach 1, and below k at tau = 0, where at most
    k - 1 stay above 0 (but k = 0 has its tau there). So everything outside is clipped.
    """
    breakpoints = torch.cat([centred, centred - 1], dim=-1).clip(-1, 0).sort(dim=-1).values
    low = torch.zeros_like(breakpoints[..., :1], dtype=torch.int64)
    high = torch.full_like(low, breakpoints.shape[-1])
    for _ in range(breakpoints.shape[-1].bit_length()):
        middle = (low + high) // 2
        enough = _mass(centred, breakpoints.gather(-1, middle)) >= num_selected
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return breakpoints.gather(-1, low)


def selection_reference(
    scores: Tensor, *, num_selected: int, window: int, support: int | None = None, document_ids: Tensor | None = None
) -> ReferenceSelection:
    """Which keys each query selects, and how strongly.

    Candidates of query i are the keys j <= i - w of its document. The k best by (score, index) are selected, so of
    two equal scores the later wins. Gates come from SPARSEK over the S best in the same order.

    Args:
        scores: [b, s, g], one score for each key and KV head.
        num_selected: k; 0 selects nothing.
        window: w >= 1, the newest keys, which are no candidates.
        support: S > k; None means 4k.
        document_ids: [b, s] integers that never decrease along s; None means one document per row.

    `gates` and `tau` of the result are differentiable in `scores`.
    """
    support = 4 * num_selected if support is None else support
    _, candidates = _window_and_candidates(scores, window, document_ids)
    key_scores = scores.transpose(1, 2)

    challenger, holder = key_scores[:, :, None, :], key_scores[:, :, :, None]
    index = torch.arange(scores.shape[1], device=scores.device)
    beats = (challenger > holder) | ((challenger == holder) & (index[None, :] > index[:, None]))
    # num_better[b, g, i, j]: how many candidates of query i rank above key j.
    num_better = torch.einsum("bit,bgjt->bgij", candidates.double(), beats.double())
    selected = candidates[:, None] & (num_better < num_selected)
    supported = candidates[:, None] & (num_better < support)

    gates, tau = _project(torch.where(supported, key_scores[:, :, None, :], -math.inf), num_selected)
    return ReferenceSelection(selected=selected, gates=gates, tau=tau, support_size=(gates > 0).sum(-1))


def attention_reference(
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
) -> Tensor:
    """Causal attention over a window of w keys, ungated, and k selected older keys, gated by m. One softmax over both.

    - `value`: o = sum_window P v + sum_selected P m v
    - `key_value`: as `value`, and the logit of a selected pair is m q.k too
    - `straight_through`: forward as if m = 1, backward exactly that of `value`
    - `none`: m = 1 in both directions, so the scores get no gradient

    Args:
        query: [b, s, h, d].
        key: [b, s, g, d]; g divides h, and query head i reads KV head i // (h / g).
        value: [b, s, g, d].
        scores: [b, s, g].
        num_selected, window, support, document_ids: see `selection_reference`.
        gate: one of the four names above.
        scale: factor of the logits; None means 1 / sqrt(d).

    Returns:
        [b, s, h, d].

    Raises:
        ValueError: `gate` is unknown.
    """
    if gate not in ("value", "key_value", "straight_through", "none"):
        raise ValueError(f"gate is {gate!r}: use 'value', 'key_value', 'straight_through' or 'none'")
    group = query.shape[2] // key.shape[2]
    in_window, _ = _window_and_candidates(query, window, document_ids)
    selection = selection_reference(
        scores, num_selected=num_selected, window=window, support=support, document_ids=document_ids
    )
    selected = selection.selected.repeat_interleave(group, dim=1)
    gates = torch.where(selected, selection.gates.repeat_interleave(group, dim=1), 1.0)

    visible = in_window[:, None] | selected
    logits = _logits(query, key, scale)
    if gate == "key_value":
        logits = gates * logits
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf), dim=-1)
    output_hard = _weighted_values(weights, value)
    if gate == "none":
        return output_hard
    output_gated = _weighted_values(weights * gates, value)
    if gate == "straight_through":
        return output_gated + (output_hard - output_gated).detach()
    return output_gated


def dense_reference(
    query: Tensor, key: Tensor, value: Tensor, *, document_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Full causal attention within each document. Shapes as in `attention_reference`; returns [b, s, h, d]."""
    visible, _ = _window_and_candidates(query, query.shape[1], document_ids)
    logits = _logits(query, key, scale).masked_fill(~visible[:, None], -math.inf)
    return _weighted_values(torch.softmax(logits, dim=-1), value)


def _window_and_candidates(tokens: Tensor, window: int, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two masks [b, s, t]: keys in (i - w, i], and keys j <= i - w, both of query i's document; tokens [b, s, ...]."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    document_ids = torch.zeros_like(index).expand(tokens.shape[:2]) if document_ids is None else document_ids
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    age = index[:, None] - index[None, :]
    return same_document & (age >= 0) & (age < window), same_document & (age >= window)


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """scale * q.k for every query head, [b, h, s, t]."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return scale * torch.einsum("bshd,bthd->bhst", query, key)


def _weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Sums the values [b, t, g, d] with the weights [b, h, s, t] into [b, s, h, d]."""
    value = value.repeat_interleave(weights.shape[1] // value.shape[2], dim=2)
    return torch.einsum("bhst,bthd->bshd", weights, value)
