"""The three exchanges of sequence parallelism as autograd functions, each with its adjoint, and a plain sum.

All traffic goes through `deepspeed.comm`, so that DeepSpeed's communication logger sees it, and every byte received is
counted on the group. Global ranks address point-to-point messages: group ranks would be wrong in a subgroup.
"""

from __future__ import annotations

import deepspeed.comm as dist
import torch
from torch import Tensor

from sparsek_dist.parallel.mesh import RankGroup


def all_reduce_sum(x: Tensor, group: RankGroup) -> Tensor:
    """Sum over the group, same shape; not differentiable."""
    total = x.detach().clone()
    if group.handle is not None:
        dist.all_reduce(total, group=group.handle)
    return total


def gather(x: Tensor, group: RankGroup, *, kind: str) -> Tensor:
    """[...] on each rank -> [p, ...] on all. Adjoint: reduce-scatter (sum)."""
    return _Gather.apply(x, group, kind)


def receive_left(x: Tensor, group: RankGroup, *, kind: str) -> Tensor:
    """Sends x to the right neighbour, returns the left neighbour's; zeros on the first rank.

    Adjoint: the gradient of what was received travels back to the left neighbour.
    """
    return _ReceiveLeft.apply(x, group, kind)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup, kind: str) -> Tensor:
        ctx.group, ctx.kind = group, kind
        gathered = x.new_empty(group.size, *x.shape)
        if group.handle is None:
            return gathered.copy_(x)
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=group.handle)
        group.received[kind] += (group.size - 1) * _num_bytes(x)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        if group.handle is None:
            return grad[0], None, None
        mine = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(mine.view(-1), grad.contiguous().view(-1), group=group.handle)
        group.received[ctx.kind] += (group.size - 1) * _num_bytes(mine)
        return mine, None, None


class _ReceiveLeft(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup, kind: str) -> Tensor:
        ctx.group, ctx.kind = group, kind
        return _shift(x, group, to=group.right, source=group.left, kind=kind)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        return _shift(grad, group, to=group.left, source=group.right, kind=ctx.kind), None, None


def _shift(x: Tensor, group: RankGroup, *, to: int | None, source: int | None, kind: str) -> Tensor:
    received = torch.zeros_like(x, memory_format=torch.contiguous_format)
    messages = []
    if to is not None:
        messages.append(dist.P2POp(dist.isend, x.contiguous(), to, group.handle))
    if source is not None:
        messages.append(dist.P2POp(dist.irecv, received, source, group.handle))
        group.received[kind] += _num_bytes(received)
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()
    return received


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
