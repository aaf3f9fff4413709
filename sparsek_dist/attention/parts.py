"""Parts of a long tensor that are used beside the whole of it: the tail that a neighbour gets, the rows of a summary.

Autograd would give each part a gradient as long as the whole, nearly all zeros, and add them up: eight passes over the
gradients of keys and values for a few rows. Here the part's gradient is added to that of the whole where it belongs.
So whoever takes a part must go on with the whole that is returned beside it, and give it to operations that make their
gradients (attention, `cat`), not to ones that pass theirs on to several inputs (`+`): it is written into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_kernels import take


def with_tail(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x [b, s, ...] and its last `width` tokens [b, width, ...]."""
    return _Tail.apply(x, width)


def with_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x [b, t, g, d] and its tokens at rows [b, g, k]: [b, g, k, d]."""
    return _Rows.apply(x, rows)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        ctx.width = width
        return x.view_as(x), x[:, x.shape[1] - width :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_tail: Tensor) -> tuple[Tensor, None]:
        grad = _writable(grad)
        grad[:, grad.shape[1] - ctx.width :].add_(grad_tail)
        return grad, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), take(x.transpose(1, 2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad = _writable(grad)
        # Added, not put: slots of a summary that hold nothing all point to some row, with gradients of zero.
        grad.transpose(1, 2).scatter_add_(2, rows.unsqueeze(-1).expand_as(grad_rows), grad_rows)
        return grad, None


def _writable(grad: Tensor) -> Tensor:
    """The gradient itself: it was made for this node alone, unless it is one number shown many times."""
    return grad.clone() if 0 in grad.stride() else grad
