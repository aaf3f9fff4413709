"""The losses of a model without its logits: head and cross entropy, some tokens at a time.

With a vocabulary of 128,000 the logits of a shard, and their gradient, take more memory than all else of it. Here one
tile exists at a time, and is computed again in the backward pass. Gradients of the head are summed in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsek_dist.parallel.loss import losses

logger = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 1 << 28
"""Logits of one tile: 512 MiB in half precision. Fewer are computed whole, and kept."""
LATER = ("logits_scaling", "final_logit_softcapping")
"""Fields of a model's config, by which it changes what its head gives."""


def token_losses(model: Any, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies [b, s] in nats, float32 (float64 for a float64 model); 0 where there is no target.

    They are those of the model's logits, which are held whole only where they are few, or where the model has no plain
    linear head or changes what it gives (`LATER`); that is logged.

    Args:
        model: called with input_ids and position_ids, gives logits [b, s, v]; or DeepSpeed's engine around one.
        labels: [b, s], already shifted, or IGNORE.
    """
    head = _plain_head(getattr(model, "module", model))
    if head is None or not _worth_tiles(head, labels.numel()):
        logits = model(input_ids=input_ids, position_ids=position_ids).logits
        if head is None and logits.numel() > NUMBERS_AT_ONCE:
            _log_once()
        return losses(logits, labels)
    with _giving_losses(head, labels):
        return model(input_ids=input_ids, position_ids=position_ids).logits


def _plain_head(model: Any) -> nn.Linear | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    changed = any(getattr(getattr(model, "config", None), field, None) is not None for field in LATER)
    # A low-rank update wraps the head in a class of its own.
    return head if type(head) is nn.Linear and not changed else None


def _worth_tiles(head: nn.Linear, num_tokens: int) -> bool:
    # What tiles add up of the head's gradient is in float32, and as large as twice its weights.
    learned = head.weight.requires_grad and torch.is_grad_enabled()
    added = 2 * head.in_features * head.out_features if learned else 0
    return num_tokens * head.out_features > max(NUMBERS_AT_ONCE, added)


@functools.cache
def _log_once() -> None:
    logger.warning("the logits of a shard are held whole: this model's head is wrapped, or what it gives is changed")


@contextmanager
def _giving_losses(head: nn.Linear, labels: Tensor) -> Iterator[None]:
    """Inside of the head's call, as ZeRO 3 gathers its weights for that, and for the backward pass of that."""
    rows = max(1, NUMBERS_AT_ONCE // head.out_features)

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != labels.shape:
            raise RuntimeError(f"the head got hidden states {list(hidden.shape)} for labels {list(labels.shape)}")
        flat = _TiledLosses.apply(hidden.flatten(0, 1), head.weight, head.bias, labels.flatten(), rows)
        return flat.view(labels.shape)

    before = vars(head).get("forward")
    setattr(head, "forward", forward)  # noqa: B010 - mypy refuses to assign to a method
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            setattr(head, "forward", before)  # noqa: B010


class _TiledLosses(torch.autograd.Function):
    """losses(hidden @ weight.T + bias), [n]; hidden [n, d], weight [v, d], bias [v] or None, labels [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.rows = rows
        return torch.cat([_losses(hidden[tile], weight, bias, labels[tile]) for tile in _tiles(len(labels), rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        precise = torch.promote_types(weight.dtype, torch.float32)
        sums = [
            torch.zeros_like(x, dtype=precise) if need else None
            for x, need in zip((weight, bias), needs[1:], strict=True)
        ]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        for tile in _tiles(len(labels), ctx.rows):
            of_hidden, *of_head = _gradients((hidden[tile], weight, bias), needs, labels[tile], upstream[tile])
            if grad_hidden is not None and of_hidden is not None:
                grad_hidden[tile] = of_hidden
            for total, part in zip(sums, of_head, strict=True):
                if total is not None and part is not None:
                    total += part
        return grad_hidden, *(None if x is None else x.to(weight.dtype) for x in sums), None, None


def _tiles(n: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None], needs: Sequence[bool], labels: Tensor, upstream: Tensor
) -> list[Tensor | None]:
    """Those of a tile's hidden states and of the head's weight and bias, by that tile; None where not needed."""
    leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    hidden, weight, bias = leaves
    with torch.enable_grad():
        nats = _losses(hidden, weight, bias, labels)
    found = iter(torch.autograd.grad(nats, [x for x in leaves if x is not None and x.requires_grad], upstream))
    return [next(found) if need else None for need in needs]


def _losses(hidden: Any, weight: Any, bias: Any, labels: Tensor) -> Tensor:
    """[rows]; `losses` makes no float32 copy of all of a tile's logits, either."""
    return losses(F.linear(hidden, weight, bias)[None], labels[None])[0]
