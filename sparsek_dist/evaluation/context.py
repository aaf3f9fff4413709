"""What the context is good for: the error by how much of it a target may see, and by where in it the target stands.

The standard errors are those of a ratio of sums over contexts (Cochran 1977, "Sampling Techniques", section 2.11): the
targets of one context are not independent, the contexts nearly are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsek_dist.data.loader import Batch
from sparsek_dist.errors import DataError
from sparsek_dist.evaluation.shards import Sharing
from sparsek_dist.parallel.head import token_losses
from sparsek_dist.parallel.loss import IGNORE

FRACTIONS = (8, 4, 2, 1)
"""A target is scored with the last 1/8, 1/4, 1/2 and all of its context."""
_TAIL = 16
"""The last n/16 targets of a context are compared: the least context any of them has is half of the shortest."""


@dataclass(frozen=True)
class Estimate:
    """A mean over targets with its standard error, which is NaN for fewer than two contexts."""

    targets: int
    loss: float
    """Nats per target."""
    loss_error: float
    bits_per_byte: float
    bits_per_byte_error: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class AtLength:
    """The same targets, seen with at most `length` tokens."""

    length: int
    estimate: Estimate
    change: float
    """Bits per byte more than with the whole context."""
    change_error: float
    """Of the paired difference, which is smaller than that of either number."""


@dataclass(frozen=True)
class AtPosition:
    """Targets that have `first` to `last` tokens of their document before them in the context."""

    first: int
    last: int
    estimate: Estimate


@dataclass(frozen=True)
class ContextUse:
    overall: Estimate
    by_length: list[AtLength]
    """Shortest first; empty if no document fills a whole context."""
    by_position: list[AtPosition]
    """Bins 1, 2 to 3, 4 to 7, ..., the last up to n; empty ones are left out."""


@torch.no_grad()
def measure(
    model: Any,
    batches: Iterable[Batch],
    *,
    label_bytes: Callable[[Tensor], Tensor],
    device: torch.device,
    sharing: Sharing | None = None,
) -> ContextUse:
    """Scores every target once with its whole context, and the last n/16 of each context with less of it.

    Only targets whose document fills the whole context are compared by length, so that each has all of it to lose.
    Every rank of `sharing` must call it with the same batches, and gets the same numbers.

    Args:
        model: in evaluation mode, and set to work without a cache.
        batches: [b, n], all of the same n.
        label_bytes: from `perplexity.label_bytes`.
        device: where the model is.
        sharing: the ranks that share each context, as `model` does; None for one process.

    Raises:
        DataError: if the batches hold no target.
    """
    positions: list[Tensor] = []
    lengths: list[Tensor] = []
    n = 0
    nats_of = partial(_nats, model, sharing or Sharing(), device)
    for batch in batches:
        n = batch.input_ids.shape[1]
        weights = torch.stack([(batch.labels != IGNORE).double(), label_bytes(batch.labels)], dim=-1)
        nats = nats_of(batch)
        positions.append(_by_bin(batch.position_ids, nats, weights))
        lengths.append(_by_length(nats_of, batch, nats, weights))
    # [contexts, bins or lengths, (nats, targets, bytes)]
    by_bin = torch.cat(positions).numpy() if positions else np.zeros((0, 1, 3))
    total = by_bin.sum(axis=1)
    if not total[:, 2].sum() > 0:
        raise DataError("the text holds nothing to predict: give a larger one")
    bins = [
        AtPosition(2**i, n if i == by_bin.shape[1] - 1 else 2 ** (i + 1) - 1, estimate(by_bin[:, i]))
        for i in range(by_bin.shape[1])
        if by_bin[:, i, 2].sum() > 0
    ]
    return ContextUse(estimate(total), _compare(torch.cat(lengths).numpy(), n), bins)


def estimate(sums: np.ndarray) -> Estimate:
    """The mean over contexts [contexts, (nats, targets, bytes)]; those without targets do not count as contexts."""
    sums = sums[sums[:, 1] > 0]
    nats, targets, num_bytes = sums.T
    loss, loss_error = _ratio(nats, targets)
    bits, bits_error = _ratio(nats / math.log(2), num_bytes)
    return Estimate(int(targets.sum()), loss, loss_error, bits, bits_error)


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """sum(above) / sum(below) and its standard error, to first order."""
    number, total = len(above), below.sum()
    if total == 0:
        return math.nan, math.nan
    ratio = above.sum() / total
    if number < 2:
        return float(ratio), math.nan
    return float(ratio), float(np.sqrt(number / (number - 1) * np.square(above - ratio * below).sum()) / total)


def _compare(sums: np.ndarray, n: int) -> list[AtLength]:
    sums = sums[sums[:, 0, 1] > 0]
    if len(sums) == 0:
        return []
    rows = []
    for index, fraction in enumerate(FRACTIONS):
        more = (sums[:, index, 0] - sums[:, -1, 0]) / math.log(2)
        rows.append(AtLength(-(-n // fraction), estimate(sums[:, index]), *_ratio(more, sums[:, index, 2])))
    return rows


def _nats(model: Any, sharing: Sharing, device: torch.device, batch: Batch) -> Tensor:
    """Cross entropy of every target, float64 [b, n] on every rank; 0 where there is none."""
    mine = sharing.shard(batch, device)
    nats = token_losses(model, mine.input_ids, mine.position_ids, mine.labels)
    return sharing.whole(nats.double(), batch.input_ids.shape[1])


def _by_bin(position_ids: Tensor, nats: Tensor, weights: Tensor) -> Tensor:
    """[b, bins, 3]: sums by the binary logarithm of the tokens that a target has before it."""
    b, n = position_ids.shape
    values = torch.cat([nats[..., None], weights], dim=-1)
    # frexp is exact where log2 would round: x = m * 2^e with 1/2 <= m < 1.
    place = torch.frexp((position_ids + 1).double()).exponent.long() - 1
    bins = max((n - 1).bit_length(), 1)
    # n itself, where it is a power of two, gets no bin of its own.
    place = place.clamp(max=bins - 1)
    sums = torch.zeros(b, bins, 3, dtype=torch.float64, device=nats.device)
    return sums.scatter_add_(1, place[..., None].expand(-1, -1, 3), values)


def _by_length(nats_of: Callable[[Batch], Tensor], batch: Batch, nats: Tensor, weights: Tensor) -> Tensor:
    """[b, len(FRACTIONS), 3] over the targets to compare, 0 in contexts that have none."""
    b, n = batch.input_ids.shape
    sums = torch.zeros(b, len(FRACTIONS), 3, dtype=torch.float64, device=nats.device)
    tail = n // _TAIL
    if tail == 0:
        return sums
    here = torch.arange(n, device=nats.device)
    compared = (batch.position_ids == here) & (here >= n - tail) & (batch.labels != IGNORE)
    rows = compared.any(dim=1)
    if not rows.any():
        return sums
    chosen = compared[rows, -tail:]
    counted = (weights[rows, -tail:] * chosen[..., None]).sum(dim=1)
    for index, fraction in enumerate(FRACTIONS):
        seen = nats[rows] if fraction == 1 else nats_of(_last(batch, rows, -(-n // fraction)))
        of_compared = (seen[:, -tail:] * chosen).sum(dim=1, keepdim=True)
        sums[rows, index] = torch.cat([of_compared, counted], dim=1)
    return sums


def _last(batch: Batch, rows: Tensor, length: int) -> Batch:
    """The last `length` tokens of some rows, as if nothing had stood before them."""
    cut = [x[rows, -length:] for x in (batch.input_ids, batch.labels, batch.position_ids)]
    here = torch.arange(length, device=cut[0].device)
    return Batch(cut[0], cut[1], torch.minimum(cut[2], here))


def as_row(entry: Any) -> dict[str, float | int | None]:
    """An `Estimate` or what holds one, for JSON: one flat dictionary, None where a number is not known."""
    row: dict[str, float | int | None] = {"perplexity": entry.perplexity} if isinstance(entry, Estimate) else {}
    for name, value in vars(entry).items():
        row |= as_row(value) if isinstance(value, Estimate) else {name: value if math.isfinite(value) else None}
    return row
