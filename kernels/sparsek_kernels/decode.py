"""One more token at constant cost: the attention of the newest query over a `DecodeState`, and the state's update.

A step: the new token enters the window, the token of w steps ago leaves it and becomes a candidate. It takes the place
of the worst of the k selected pairs, and of the worst of the S scores, if it ranks higher; of two equal scores the
later ranks higher. That, and tau over the S scores, is all that `sparsek_attention` over the whole past would find out
anew (the k and S best of a prefix are those of the shorter prefix and one more). Nothing waits for the device.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sparsek_kernels.checks import check_attention, check_finite
from sparsek_kernels.decode_state import (
    DecodeState,
    carry_after,
    empty_state,
    prefill,
    reorder,
    state_after,
    state_bytes,
    with_ring,
)
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.shards import shard_attention
from sparsek_kernels.threshold import solve_threshold

logger = logging.getLogger(__name__)
__all__ = ["DecodeState", "decode_step", "empty_state", "extend", "prefill", "reorder", "state_bytes"]


@torch.no_grad()
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    state: DecodeState,
    *,
    gate: str,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one new token; `state` then includes it. Equals the last row of `sparsek_attention` to rounding.

    Shapes and addresses never change and nothing waits for the device, so a step can be captured in a CUDA graph. For
    the same reason scores are checked on CPU only: on a GPU a NaN or infinite score makes the output of its heads NaN.
    With the kernel, torch.compile takes a step as one operator, `sparsek::decode_step`.

    Args:
        query: [b, 1, h, d].
        key: [b, 1, g, d], in the dtype of the state; likewise value.
        scores: [b, 1, g].
        state: updated in place.
        gate: as in `sparsek_attention`; `straight_through` and `none` leave values ungated.
        scale: of the logits; default 1 / sqrt(d).
        backend: `auto`, `triton` or `torch`.

    Returns:
        [b, 1, h, d], in the dtype of `query`. A token before `document_start` sees itself alone.

    Raises:
        ValueError: naming the argument that cannot work, or a backend that cannot run here.
    """
    _check(query, key, value, scores, state, gate)
    if query.shape[1] != 1:
        raise ValueError(f"query holds {query.shape[1]} tokens: decode_step takes one, extend takes more")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if _implementation(backend, query, state) == "triton":
        if torch.compiler.is_compiling():
            from sparsek_kernels.gpu.ops import decode_op

            return decode_op(query, key, value, scores, *state.tensors().values(), state.window, gate, scale)
        from sparsek_kernels.gpu.decode import decode_step_triton

        return decode_step_triton(query, key, value, scores, state, gate=gate, scale=scale)
    if not scores.is_cuda:
        check_finite(scores)
    position = state.length.clone()
    _enter(key, value, scores, state)
    return _attend(query, scores, position, state, gate, scale)


@torch.no_grad()
def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    state: DecodeState,
    *,
    gate: str,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`decode_step` for m new tokens at once (the next part of a prompt): [b, m, h, d] -> [b, m, h, d]."""
    _check(query, key, value, scores, state, gate)
    check_finite(scores)
    stream = with_ring(state, key, value, scores)
    # The oldest token of the ring leaves the window as the first new one enters.
    carry = carry_after(state, 1, *stream)
    index = torch.arange(query.shape[1], device=query.device)
    # What does not exist (padding) is a document of one token each.
    start = torch.minimum((state.document_start - state.length).unsqueeze(-1), index)
    stream_key, stream_value, stream_scores = (x[:, 1:] for x in stream)
    # Slots that no token has filled score -inf; no query sees them, but a difference of infinities would be NaN.
    stream_scores = stream_scores.masked_fill(stream_scores == -torch.inf, 0.0)
    out = shard_attention(
        query,
        stream_key,
        stream_value,
        stream_scores,
        carry,
        start,
        window=state.window,
        gate=gate,
        scale=scale,
        backend=backend,
    )
    state.copy_(state_after(state, *stream))
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, state: DecodeState, gate: str) -> None:
    sizes = {"num_selected": state.num_selected, "window": state.window, "support": state.support}
    check_attention(query, key, value, scores, **sizes, gate=gate)
    b, _, g, d = key.shape
    if state.key.shape[:2] != (b, g) or state.key.shape[3] != d:
        found, expected = list(state.key.shape), ["b", "g", "w + k", "d"]
        raise ValueError(f"state of {expected} = {found} does not fit key with b = {b}, g = {g}, d = {d}")
    if key.dtype != state.key.dtype or key.device != state.key.device:
        raise ValueError(
            f"state holds {state.key.dtype} on {state.key.device}, key is {key.dtype} on {key.device}: convert one"
        )


def _implementation(backend: str, query: Tensor, state: DecodeState) -> str:
    """`triton` or `torch`."""
    chosen = resolve(backend, query, state.key.shape[1])
    if chosen == "reference":
        raise ValueError("backend = 'reference' works on whole sequences only: use 'auto', 'triton' or 'torch'")
    if chosen == "triton":
        from sparsek_kernels.gpu.decode import why_not

        hindrance = why_not(query, state)
        if hindrance and backend == "triton":
            raise ValueError(f"backend = 'triton' cannot run: {hindrance}; use 'auto' or 'torch'")
        if hindrance:
            _say_once(hindrance)
            return "torch"
    return chosen


@functools.cache
def _say_once(hindrance: str) -> None:
    logger.info("SPARSEK decoding: the torch implementation (%s)", hindrance)


def _enter(key: Tensor, value: Tensor, scores: Tensor, state: DecodeState) -> None:
    """The new token takes its slot of the ring; whom it replaces becomes a candidate."""
    slot = (state.length % state.window).view(-1, 1, 1).expand(-1, key.shape[2], 1)
    position = (state.length - state.window).view(-1, 1, 1).expand_as(slot)
    exists = position >= state.document_start.view(-1, 1, 1)
    score, leaving_key, leaving_value = (_at(x, slot) for x in (state.scores, state.key, state.value))
    if state.support > 0:
        worst, wins = _worst(state.support_scores, state.support_positions, score, exists)
        _put(state.support_scores, worst, score, wins)
        _put(state.support_positions, worst, position, wins)
    if state.num_selected > 0:
        worst, wins = _worst(state.selected_scores, state.selected_positions, score, exists)
        _put(state.selected_positions, worst, position, wins)
        for table, entry in ((state.scores, score), (state.key, leaving_key), (state.value, leaving_value)):
            _put(table, worst + state.window, entry, wins)
    everywhere = torch.ones_like(exists)
    # Adding 0.0 turns -0.0 into 0.0: equal scores, then equal bits.
    for table, entry in ((state.scores, scores + 0.0), (state.key, key), (state.value, value)):
        _put(table, slot, entry.transpose(1, 2).to(table.dtype), everywhere)
    state.length += 1


def _worst(scores: Tensor, positions: Tensor, candidate: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Slot [b, g, 1] of the lowest (score, position), and whether a later candidate [b, g, 1] takes it."""
    lowest = scores.amin(-1, keepdim=True)
    tied = torch.where(scores == lowest, positions, torch.iinfo(torch.int64).max)
    return tied.argmin(-1, keepdim=True), exists & (candidate >= lowest)


def _at(table: Tensor, slot: Tensor) -> Tensor:
    """table [b, g, m, ...] at slot [b, g, 1] -> [b, g, 1, ...]."""
    if table.dim() == 4:
        return table.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, table.shape[3]))
    return table.gather(2, slot)


def _put(table: Tensor, slot: Tensor, entry: Tensor, where: Tensor) -> None:
    """Writes entry [b, g, 1, ...] into the slot where told to."""
    if table.dim() == 4:
        slot, where = (x.unsqueeze(-1).expand(-1, -1, -1, table.shape[3]) for x in (slot, where))
    table.scatter_(2, slot, torch.where(where, entry, table.gather(2, slot)))


def _attend(query: Tensor, scores: Tensor, position: Tensor, state: DecodeState, gate: str, scale: float) -> Tensor:
    """One softmax over the ring and the selected slots; position [b] of the query."""
    b, _, h, d = query.shape
    g, window = state.key.shape[1], state.window
    work = torch.promote_types(query.dtype, torch.float32)
    slots = torch.arange(window, device=query.device)
    age = (position.unsqueeze(-1) - slots) % window
    in_window = (position.unsqueeze(-1) - age >= state.document_start.unsqueeze(-1)) | (age == 0)
    exists = state.selected_scores > -torch.inf
    visible = torch.cat([in_window.unsqueeze(1).expand(b, g, window), exists], dim=-1)
    logits = (query.reshape(b, g, h // g, d).to(work) * scale) @ state.key.to(work).transpose(-1, -2)
    gates = None
    if gate in ("value", "key_value") and state.num_selected > 0:
        gates = torch.where(exists, state.selected_scores - _tau(state), 0).clamp(0, 1).unsqueeze(-2).to(work)
    if gate == "key_value" and gates is not None:
        logits[..., window:] *= gates
    weights = logits.masked_fill_(~visible.unsqueeze(-2), -torch.inf).softmax(-1)
    if gates is not None:
        weights[..., window:] *= gates
    out = weights @ state.value.to(work)
    out = torch.where(torch.isfinite(scores).view(b, g, 1, 1), out, torch.nan)
    return out.view(b, 1, h, d).to(query.dtype)


def _tau(state: DecodeState) -> Tensor:
    """[b, g, 1], over the S best candidates; -inf where there are at most k."""
    ranked = state.support_scores.sort(dim=-1, descending=True).values
    present = ranked > -torch.inf
    total = present.sum(-1, keepdim=True)
    # Slots of nobody must not bring infinities into the corners of the threshold.
    worst = torch.where(present, ranked, torch.inf).amin(-1, keepdim=True)
    ranked = torch.where(present, ranked, torch.where(total > 0, worst, 0))
    sums = torch.nn.functional.pad(torch.where(present, ranked, 0).double().cumsum(-1), (1, 0))

    def count(rank: Tensor) -> Tensor:
        return torch.minimum(rank, total)

    def sum_(rank: Tensor) -> Tensor:
        return sums.gather(-1, count(rank))

    return solve_threshold(ranked, total, state.num_selected, count=count, sum_=sum_).to(ranked.dtype)
