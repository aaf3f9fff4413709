"""The exchanges of sequence parallelism as autograd functions, each with its adjoint, and a plain sum.

All traffic goes through `deepspeed.comm`, so that DeepSpeed's communication logger sees it, and every byte received is
counted on the group. Tensors that travel together are packed into one message. Global ranks address point-to-point
messages: group ranks would be wrong in a subgroup.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return _Gather.apply(group, kind, *tensors)


def receive(tensors: Sequence[Tensor], group: RankGroup, *, distance: int, kind: str) -> tuple[Tensor, ...]:
    """Sends to the rank `distance` to the right and returns what came from as far left, or zeros; in one message.

    Adjoint: the gradients of what was received travel back. Integers have none.
    """
    return _Receive.apply(group, distance, kind, *tensors)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: RankGroup, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.kind, ctx.dtypes = group, kind, [x.dtype for x in tensors]
        packed = received_once(lambda: _all_gather(_pack(tensors), group, kind))
        return _unpack(packed, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen = _differentiable(ctx.needs_input_grad[2:], ctx.dtypes)
        if not chosen:
            return (None,) * (2 + len(grads))
        # Summed in float32 at least: p gradients in bfloat16 would lose what they add up to.
        wide = torch.float64 if any(ctx.dtypes[i] == torch.float64 for i in chosen) else torch.float32
        rows = torch.cat([grads[i].flatten(1).to(wide) for i in chosen], dim=1)
        summed = _reduce_scatter(rows, ctx.group, ctx.kind)
        parts = summed.split([grads[i][0].numel() for i in chosen])
        mine = {i: part.view(grads[i].shape[1:]).to(ctx.dtypes[i]) for i, part in zip(chosen, parts, strict=True)}
        return None, None, *(mine.get(i) for i in range(len(grads)))


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: RankGroup, distance: int, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.distance, ctx.kind, ctx.dtypes = group, distance, kind, [x.dtype for x in tensors]
        packed = received_once(lambda: _shift(_pack(tensors), group, distance, kind))
        return tuple(x[0] for x in _unpack(packed.unsqueeze(0), tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen = _differentiable(ctx.needs_input_grad[3:], ctx.dtypes)
        if not chosen:
            return (None,) * (3 + len(grads))
        back = [grads[i] for i in chosen]
        packed = _shift(_pack(back), ctx.group, -ctx.distance, ctx.kind)
        mine = dict(zip(chosen, (x[0] for x in _unpack(packed.unsqueeze(0), back)), strict=True))
        return None, None, None, *(mine.get(i) for i in range(len(grads)))


def _all_gather(message: Tensor, group: RankGroup, kind: str) -> Tensor:
    """[m] on each rank -> [p, m] on all."""
    gathered = message.new_empty(group.size, message.numel())
    if group.handle is None:
        return gathered.copy_(message)
    dist.all_gather_into_tensor(gathered.view(-1), message, group=group.handle)
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


def _shift(message: Tensor, group: RankGroup, distance: int, kind: str) -> Tensor:
    """Sends to the rank `distance` to the right (to the left if negative), returns what came from as far left."""
    received = torch.zeros_like(message)
    messages = []
    to, source = group.neighbour(distance), group.neighbour(-distance)
    if to is not None:
        messages.append(dist.P2POp(dist.isend, message, to, group.handle))
    if source is not None:
        messages.append(dist.P2POp(dist.irecv, received, source, group.handle))
        group.received[kind] += _num_bytes(received)
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()
    return received


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Bytes [m] of all tensors, one after another."""
    return torch.cat([x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors])


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[p, m] bytes -> for each tensor of `like`, p of its shape and dtype."""
    parts = rows.split([_num_bytes(x) for x in like], dim=1)
    # Copied first: a part may begin at an address that its dtype does not allow.
    return tuple(part.contiguous().view(x.dtype).view(len(rows), *x.shape) for part, x in zip(parts, like, strict=True))


def _differentiable(needed: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[int]:
    return [i for i, (need, dtype) in enumerate(zip(needed, dtypes, strict=True)) if need and dtype.is_floating_point]


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
