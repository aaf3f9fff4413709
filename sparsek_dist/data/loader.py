"""Which contexts a rank trains on at a step: a pure function of (seed, step, micro batch, data rank).

Nothing is counted up, so a run continues at any step, with any number of data-parallel groups, exactly as it would
have. Samples are numbered g = step * sequences_per_step + i for ever on; g // rows is the epoch, and
g % rows the place in that epoch's permutation. So each row is used once per epoch, and a step may span two epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_dist.data.packing import IGNORED, Context, Contexts
from sparsek_dist.parallel.layout import padding, shard


@dataclass(frozen=True)
class Batch:
    """Contexts side by side, or one rank's shard of them: int64 [b, n], as explained in `Context`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def shard(self, rank: int, degree: int, *, shortest: int = 1) -> Batch:
        """[b, n] -> [b, ceil(n/p)]: what `rank` of a sequence-parallel group of p = `degree` holds.

        Args:
            shortest: tokens that a shard must hold at least; a shorter one is filled up, too. One rank needs none.
        """
        short = shortest * degree - self.input_ids.shape[1] if degree > 1 else 0
        return self._padded(degree, least=short)._map(lambda x: shard(x, rank, degree, dim=1))

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda x: x.to(device))

    def _padded(self, degree: int, *, least: int) -> Batch:
        """Filled up at the end to a multiple of `degree`, by a document of its own without targets.

        So padding adds nothing to the loss, and no real token sees or selects it: it comes after all of them.
        """
        extra = max(padding(self.input_ids.shape[1], degree), least)
        if extra == 0:
            return self
        positions = torch.arange(extra).to(self.position_ids).expand(len(self.position_ids), -1)
        return Batch(
            F.pad(self.input_ids, (0, extra)),
            F.pad(self.labels, (0, extra), value=IGNORED),
            torch.cat([self.position_ids, positions], dim=1),
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(function(self.input_ids), function(self.labels), function(self.position_ids))


class Loader:
    """Training batches in a seeded order."""

    def __init__(self, contexts: Contexts, *, seed: int, sequences_per_step: int) -> None:
        """
        Args:
            contexts: rows to draw from.
            seed: of the order.
            sequences_per_step: contexts of one optimizer step, over all micro batches and data-parallel groups.
        """
        if sequences_per_step < 1:
            raise ValueError(f"sequences_per_step is {sequences_per_step}: it must be at least 1")
        self.contexts, self.sequences_per_step = contexts, sequences_per_step
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None
        self._rows: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> np.ndarray:
        """Rows [sequences_per_step] of a step, counted from 0. The permutation of one epoch is kept in memory."""
        if step < 0:
            raise ValueError(f"step {step} is negative: steps are counted from 0")
        if self._rows is None or self._rows[0] != step:
            samples = step * self.sequences_per_step + np.arange(self.sequences_per_step)
            epochs, places = np.divmod(samples, len(self.contexts))
            parts = [self._permutation(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
            self._rows = (step, np.concatenate(parts))
        return self._rows[1].copy()

    def micro_batch(self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> Batch:
        """Batch [b, n] with b = `micro_batch_size` of one forward pass of one data-parallel group.

        A step's rows are laid out as [micro][data_rank][item]: the step trains on the same rows, whatever the degree.

        Raises:
            ValueError: the micro batch lies outside the step.
        """
        begin = (micro * data_degree + data_rank) * micro_batch_size
        end = begin + micro_batch_size
        if not 0 <= data_rank < data_degree or micro < 0 or end > self.sequences_per_step:
            raise ValueError(
                f"micro batch {micro} of data rank {data_rank} of {data_degree} would be sequences {begin} to {end} "
                f"of a step of {self.sequences_per_step}"
            )
        return _collate([self.contexts[row] for row in self.rows(step)[begin:end].tolist()])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.contexts)))
        return self._order[1]


def evaluation_batches(
    contexts: Contexts, *, batch_size: int, limit: int, data_rank: int, data_degree: int
) -> Iterator[Batch]:
    """Batches [batch_size, n] of one data-parallel group; every group gets as many, all of the same shape.

    Args:
        contexts: the held-out rows, each used once over all groups.
        batch_size: contexts per batch; where rows run out, a batch is filled up with rows that have no targets.
        limit: use only so many rows, evenly spaced; 0 for all.
        data_rank: this group.
        data_degree: groups.
    """
    available = len(contexts)
    count = min(limit, available) if limit else available
    rows = np.arange(count) * available // count
    per_round = batch_size * data_degree
    for begin in range(data_rank * batch_size, -(-count // per_round) * per_round, per_round):
        batch = [contexts[row] for row in rows[begin : begin + batch_size].tolist()]
        yield _collate(batch + [_without_targets(contexts)] * (batch_size - len(batch)))


def _without_targets(contexts: Contexts) -> Context:
    length = contexts.length
    ignored, padding = np.full(length, IGNORED), np.full(length, contexts.store.eos_id)
    return Context(padding, ignored, np.arange(length))


def _collate(batch: Sequence[Context]) -> Batch:
    fields = ("input_ids", "labels", "position_ids")
    return Batch(*(torch.from_numpy(np.stack([getattr(context, name) for context in batch])) for name in fields))
