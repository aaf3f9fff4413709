"""What decoding keeps of the past: per KV head w + k pairs, S scores and a counter, however long the past is.

    slot   0 ... w - 1      the ring: token t stands in slot t mod w
           w ... w + k - 1  the selected pairs, in no order (a softmax has none)

Keys and values are stored ungated: gates change with every token, so they are applied when a pair is read. A token
becomes a candidate when it leaves the ring. The S best candidates are remembered by score alone: tau needs no more.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsek_kernels.carry import NOWHERE, Carry, merge, summarize
from sparsek_kernels.checks import check_attention, check_finite


@dataclass
class DecodeState:
    """The past of b sequences in one layer. Every tensor keeps its shape and its address; a step writes in place."""

    key: Tensor
    """[b, g, w + k, d], ring then selected; likewise value."""
    value: Tensor
    scores: Tensor
    """[b, g, w + k], at least float32; -inf in empty slots."""
    selected_positions: Tensor
    """[b, g, k] int64, counted from each sequence's first token; NOWHERE in empty slots."""
    support_scores: Tensor
    """[b, g, S], of the S best candidates, in no order; -inf in empty slots."""
    support_positions: Tensor
    """[b, g, S] int64."""
    length: Tensor
    """[b] int64, tokens seen so far, padding included: the position of the next one."""
    document_start: Tensor
    """[b] int64: tokens before it do not exist (left padding)."""
    arrivals: Tensor
    """[b, g + 1] int32: who has finished a step, all zero between steps (the GPU's kernel needs it)."""
    tau: Tensor
    """[b, g], like scores: the threshold of some step before, where the GPU's kernel begins to search; -inf: none."""
    window: int
    """w."""

    @property
    def num_selected(self) -> int:
        """k."""
        return self.key.shape[2] - self.window

    @property
    def support(self) -> int:
        """S."""
        return self.support_scores.shape[2]

    @property
    def window_key(self) -> Tensor:
        """[b, g, w, d], a view of the ring; likewise `window_value` and `window_scores` [b, g, w]."""
        return self.key[:, :, : self.window]

    @property
    def window_value(self) -> Tensor:
        return self.value[:, :, : self.window]

    @property
    def window_scores(self) -> Tensor:
        return self.scores[:, :, : self.window]

    @property
    def selected_key(self) -> Tensor:
        """[b, g, k, d], a view of the selected slots; likewise `selected_value` and `selected_scores` [b, g, k]."""
        return self.key[:, :, self.window :]

    @property
    def selected_value(self) -> Tensor:
        return self.value[:, :, self.window :]

    @property
    def selected_scores(self) -> Tensor:
        return self.scores[:, :, self.window :]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the batch is the first dimension of each."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def copy_(self, other: DecodeState) -> None:
        """Takes over the contents of a state of the same shape; addresses stay, so captured CUDA graphs stay valid."""
        for name, x in self.tensors().items():
            x.copy_(getattr(other, name))


def empty_state(
    b: int,
    g: int,
    d: int,
    *,
    num_selected: int,
    window: int,
    support: int,
    dtype: torch.dtype,
    device: torch.device | str,
    document_start: Tensor | None = None,
) -> DecodeState:
    """The state before the first token.

    Args:
        num_selected: k >= 0.
        window: w >= 1.
        support: S > k (anything if k = 0).
        dtype: of keys and values; scores are at least float32.
        document_start: [b] integers; default 0, no padding.

    Raises:
        ValueError: naming the size that cannot work.
    """
    one = torch.empty(1, 1, 1, 1, dtype=dtype)
    check_attention(one, one, one, one[..., 0], num_selected=num_selected, window=window, support=support, gate="value")
    slots, precise = window + num_selected, torch.promote_types(dtype, torch.float32)

    def integers(*shape: int, fill: int) -> Tensor:
        return torch.full(shape, fill, dtype=torch.int64, device=device)

    state = DecodeState(
        key=torch.zeros(b, g, slots, d, dtype=dtype, device=device),
        value=torch.zeros(b, g, slots, d, dtype=dtype, device=device),
        scores=torch.full((b, g, slots), -torch.inf, dtype=precise, device=device),
        selected_positions=integers(b, g, num_selected, fill=NOWHERE),
        support_scores=torch.full((b, g, support), -torch.inf, dtype=precise, device=device),
        support_positions=integers(b, g, support, fill=NOWHERE),
        length=integers(b, fill=0),
        document_start=integers(b, fill=0),
        arrivals=torch.zeros(b, g + 1, dtype=torch.int32, device=device),
        tau=torch.full((b, g), -torch.inf, dtype=precise, device=device),
        window=window,
    )
    if document_start is not None:
        if document_start.shape != (b,) or document_start.is_floating_point():
            found = f"{document_start.dtype} {list(document_start.shape)}"
            raise ValueError(f"document_start must be integers [b] = [{b}], not {found}")
        state.document_start.copy_(document_start)
    return state


@torch.no_grad()
def prefill(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    num_selected: int,
    window: int,
    support: int,
    document_start: Tensor | None = None,
    state: DecodeState | None = None,
) -> DecodeState:
    """The state after s more tokens: what decoding them one by one would leave, computed at once.

    Args:
        key: [b, s, g, d], any s >= 1; likewise value.
        scores: [b, s, g].
        document_start: [b], of a first piece only: tokens before it do not exist (left padding). May be s or more.
        state: of the tokens before; it is left as it was. Default: there are none.

    Raises:
        ValueError: naming the argument that cannot work; for NaN or infinite scores.
    """
    sizes = {"num_selected": num_selected, "window": window, "support": support}
    check_attention(key, key, value, scores, **sizes, gate="value")
    check_finite(scores)
    if state is None:
        b, _, g, d = key.shape
        state = empty_state(b, g, d, **sizes, dtype=key.dtype, device=key.device, document_start=document_start)
    elif document_start is not None:
        raise ValueError("document_start belongs to the first piece: leave it out when continuing a state")
    for name, size in sizes.items():
        if getattr(state, name) != size:
            raise ValueError(f"{name} = {size} is not that of the state, {getattr(state, name)}")
    return state_after(state, *with_ring(state, key, value, scores))


def with_ring(state: DecodeState, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New tokens [b, s, g, ...] with the last w of the past before them, oldest first: [b, w + s, g, ...]."""
    newest = torch.arange(-state.window, 0, device=key.device)
    slots = (state.length.unsqueeze(-1) + newest) % state.window
    batch = torch.arange(key.shape[0], device=key.device).unsqueeze(-1)
    pairs = zip((state.key, state.value, state.scores), (key, value, scores), strict=True)
    key, value, scores = (torch.cat([old[batch, :, slots], new.to(old.dtype)], dim=1) for old, new in pairs)
    return key, value, scores + 0.0  # Adding 0.0 turns -0.0 into 0.0: equal scores, then equal bits.


def carry_after(state: DecodeState, count: int, key: Tensor, value: Tensor, scores: Tensor) -> Carry:
    """The best candidates once `count` more tokens have left the window.

    Args:
        key: [b, w + s, g, d] from `with_ring`, s >= count; likewise value, and scores [b, w + s, g].

    Returns:
        A carry whose positions are counted from the first new token.
    """
    k, support, length = state.num_selected, state.support, state.window + count
    start = (state.document_start - state.length).unsqueeze(-1)
    new = summarize(
        key[:, :length],
        value[:, :length],
        scores[:, :length],
        start.expand(-1, count),
        num_selected=k,
        support=support,
    )
    old = _carry(state)
    parts = Carry(*(torch.cat([getattr(part, field.name) for part in (new, old)], dim=2) for field in fields(Carry)))
    return merge(parts, start, num_selected=k, support=support)


def state_after(state: DecodeState, key: Tensor, value: Tensor, scores: Tensor) -> DecodeState:
    """The state once all tokens of `with_ring` [b, w + s, g, ...] have been seen."""
    window = state.window
    count = key.shape[1] - window
    carry = carry_after(state, count, key, value, scores)
    # Slot r of the ring holds the newest token whose position is r modulo w.
    newest = state.length.unsqueeze(-1) + count - 1
    slots = torch.arange(window, device=key.device)
    row = window + count - 1 - (newest - slots) % window
    batch = torch.arange(key.shape[0], device=key.device).unsqueeze(-1)
    key, value, scores = (x[batch, row].transpose(1, 2) for x in (key, value, scores))
    k, first = state.num_selected, state.length.view(-1, 1, 1)
    positions = torch.where(carry.scores > -torch.inf, carry.positions + first, NOWHERE)
    return DecodeState(
        key=torch.cat([key, carry.key], dim=2),
        value=torch.cat([value, carry.value], dim=2),
        scores=torch.cat([scores, carry.scores[..., :k]], dim=2),
        selected_positions=positions[..., :k].clone(),
        support_scores=carry.scores,
        support_positions=positions,
        length=state.length + count,
        document_start=state.document_start.clone(),
        arrivals=state.arrivals.clone(),
        tau=state.tau.clone(),
        window=window,
    )


def _carry(state: DecodeState) -> Carry:
    """The candidates of a state, best first, with positions counted from the next token."""
    order = _best_first(state.support_scores, state.support_positions)
    chosen = _best_first(state.selected_scores, state.selected_positions).unsqueeze(-1)
    chosen = chosen.expand(-1, -1, -1, state.key.shape[-1])
    scores, positions = state.support_scores.gather(-1, order), state.support_positions.gather(-1, order)
    return Carry(
        scores=scores,
        positions=torch.where(scores > -torch.inf, positions - state.length.view(-1, 1, 1), NOWHERE),
        key=state.selected_key.gather(2, chosen),
        value=state.selected_value.gather(2, chosen),
    )


def _best_first(scores: Tensor, positions: Tensor) -> Tensor:
    """The order (score, position), descending: indices into the last dimension."""
    order = positions.argsort(dim=-1, descending=True)
    return order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))


@torch.no_grad()
def reorder(state: DecodeState, index: Tensor) -> None:
    """Row i of the batch becomes what row index[i] was, in place (beam search). index: [b] integers."""
    for x in state.tensors().values():
        x.copy_(x.index_select(0, index))


def state_bytes(state: DecodeState) -> int:
    """Memory of the state in bytes; the same for every length."""
    return sum(x.numel() * x.element_size() for x in state.tensors().values())
