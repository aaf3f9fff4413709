"""The exchanges of sequence parallelism as autograd functions, each with its adjoint, and a plain sum.

All traffic goes through `deepspeed.comm`, so that DeepSpeed's communication logger sees it, and every byte received is
counted on the group. Tensors that travel together are packed into one message. Global ranks address point-to-point
messages: group ranks would be wrong in a subgroup. What a caller does not need at once is `Arriving`: other work runs
until it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.parallel.recompute import received_once


def all_reduce_sum(x: Tensor, group: RankGroup) -> Tensor:
    """Sum over the group, same shape; not differentiable."""
    total = x.detach().clone()
    if group.handle is not None:
        dist.all_reduce(total, group=group.handle)
    return total


def gather(x: Tensor, group: RankGroup, *, kind: str) -> Tensor:
    """[...] on each rank -> [p, ...] on all. Adjoint: reduce-scatter (sum)."""
    return gather_all([x], group, kind=kind)[0]


def gather_all(tensors: Sequence[Tensor], group: RankGroup, *, kind: str) -> tuple[Tensor, ...]:
    """Each [...] on each rank -> [p, ...] on all, in one message.

    Adjoint: a reduce-scatter, whose sums are taken in float32 at least. Integers have none.
    """
    return _Gather.apply(group, kind, None, *tensors)


def receive(tensors: Sequence[Tensor], group: RankGroup, *, distance: int, kind: str) -> tuple[Tensor, ...]:
    """Sends to the rank `distance` to the right and returns what came from as far left, or zeros; in one message.

    Adjoint: the gradients of what was received travel back. Integers have none.
    """
    return _Receive.apply(group, distance, kind, None, *tensors)


@dataclass(frozen=True)
class Arriving:
    """A tensor that a message in flight is still to fill."""

    _tensor: Tensor
    _flight: Flight

    def wait(self) -> Tensor:
        """The tensor, once it is there. On a GPU the device waits, not the host."""
        self._flight.land()
        return self._tensor


def gather_later(x: Tensor, group: RankGroup, *, kind: str) -> Arriving:
    """`gather`, of which nothing is needed yet."""
    flight = Flight()
    return Arriving(_Gather.apply(group, kind, flight, x)[0], flight)


def receive_later(x: Tensor, group: RankGroup, *, distance: int, kind: str) -> Arriving:
    """`receive`, of which nothing is needed yet."""
    flight = Flight()
    return Arriving(_Receive.apply(group, distance, kind, flight, x)[0], flight)


class Flight:
    """Messages that were started and not yet waited for. What they read and write stays in memory until then."""

    def __init__(self) -> None:
        self._requests: list[Any] = []
        self._tensors: tuple[Tensor, ...] = ()

    def start(self, requests: Sequence[Any], *tensors: Tensor) -> None:
        self._requests, self._tensors = list(requests), tensors

    def land(self) -> None:
        for request in self._requests:
            request.wait()
        self._requests, self._tensors = [], ()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: RankGroup, kind: str, flight: Flight | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.kind, ctx.dtypes = group, kind, [x.dtype for x in tensors]
        rows = _communicate(lambda message, during: _all_gather(message, group, kind, during), flight, tensors)
        return _mark(ctx, rows, ctx.needs_input_grad[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen = _differentiable(ctx.needs_input_grad[3:], ctx.dtypes)
        if not chosen:
            return (None,) * (3 + len(grads))
        # Summed in float32 at least: p gradients in bfloat16 would lose what they add up to.
        wide = torch.float64 if any(ctx.dtypes[i] == torch.float64 for i in chosen) else torch.float32
        rows = torch.cat([grads[i].flatten(1).to(wide) for i in chosen], dim=1)
        summed = _reduce_scatter(rows, ctx.group, ctx.kind)
        parts = summed.split([grads[i][0].numel() for i in chosen])
        mine = {i: part.view(grads[i].shape[1:]).to(ctx.dtypes[i]) for i, part in zip(chosen, parts, strict=True)}
        return None, None, None, *(mine.get(i) for i in range(len(grads)))


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, group: RankGroup, distance: int, kind: str, flight: Flight | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.distance, ctx.kind, ctx.dtypes = group, distance, kind, [x.dtype for x in tensors]
        rows = _communicate(lambda message, during: _shift(message, group, distance, kind, during), flight, tensors)
        return _mark(ctx, tuple(x[0] for x in rows), ctx.needs_input_grad[4:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen = _differentiable(ctx.needs_input_grad[4:], ctx.dtypes)
        if not chosen:
            return (None,) * (4 + len(grads))
        back = [grads[i] for i in chosen]
        flight = Flight()
        packed = _shift(_pack(back), ctx.group, -ctx.distance, ctx.kind, flight)
        flight.land()
        mine = dict(zip(chosen, (x[0] for x in _unpack(packed, back)), strict=True))
        return None, None, None, None, *(mine.get(i) for i in range(len(grads)))


def _mark(ctx: Any, received: tuple[Tensor, ...], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """`received`, of which only what is needed gets a gradient: else fixed scores would, for travelling with keys."""
    ctx.mark_non_differentiable(*(x for x, need in zip(received, needed, strict=True) if not need))
    return received


def _communicate(
    exchange: Callable[[Tensor, Flight], Tensor], flight: Flight | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Starts an exchange of packed bytes [m] -> [p, m], and waits for it unless a `flight` is to be waited for later.

    Several tensors may be copied out of one message, which reads it: only one alone can be waited for later.
    """
    assert flight is None or len(tensors) == 1
    during = Flight() if flight is None else flight
    packed = received_once(lambda: exchange(_pack(tensors), during))
    if flight is None:
        during.land()
        return _unpack(packed, tensors)
    # Its own version counter: for autograd, what fills the buffer later does not change what is returned now.
    return _unpack(packed.data, tensors)


def _all_gather(message: Tensor, group: RankGroup, kind: str, flight: Flight) -> Tensor:
    """[m] on each rank -> [p, m] on all, once the flight has landed."""
    gathered = message.new_empty(group.size, message.numel())
    if group.handle is None:
        return gathered.copy_(message)
    request = dist.all_gather_into_tensor(gathered.view(-1), message, group=group.handle, async_op=True)
    flight.start([request], message, gathered)
    group.received[kind] += (group.size - 1) * _num_bytes(message)
    return gathered


def _reduce_scatter(rows: Tensor, group: RankGroup, kind: str) -> Tensor:
    """[p, m] on each rank -> [m]: this rank's row, summed over the ranks."""
    if group.handle is None:
        return rows[0]
    mine = rows.new_empty(rows.shape[1])
    dist.reduce_scatter_tensor(mine, rows.contiguous().view(-1), group=group.handle)
    group.received[kind] += (group.size - 1) * _num_bytes(mine)
    return mine


def _shift(message: Tensor, group: RankGroup, distance: int, kind: str, flight: Flight) -> Tensor:
    """Sends [m] to the rank `distance` to the right (to the left if negative); [1, m] from as far left, or zeros."""
    received = message.new_zeros(1, message.numel())
    messages = []
    to, source = group.neighbour(distance), group.neighbour(-distance)
    if to is not None:
        messages.append(dist.P2POp(dist.isend, message, to, group.handle))
    if source is not None:
        messages.append(dist.P2POp(dist.irecv, received[0], source, group.handle))
        group.received[kind] += _num_bytes(received)
    if messages:
        flight.start(dist.batch_isend_irecv(messages), message, received)
    return received


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Bytes [m] of all tensors, one after another."""
    return torch.cat([x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors])


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[p, m] bytes -> for each tensor of `like`, p of its shape and dtype."""
    parts = rows.split([_num_bytes(x) for x in like], dim=1)
    # Parts of several rows are copied out. Those of one row are views, so each must begin where its dtype allows: keys
    # and values, as long as each other, come before scores, which are wider.
    return tuple(part.contiguous().view(x.dtype).view(len(rows), *x.shape) for part, x in zip(parts, like, strict=True))


def _differentiable(needed: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[int]:
    return [i for i, (need, dtype) in enumerate(zip(needed, dtypes, strict=True)) if need and dtype.is_floating_point]


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
