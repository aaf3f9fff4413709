"""Contexts that grow while a model is trained: shorter ones first, as many tokens a step throughout.

A new scorer keeps k of n pairs and learns from those it keeps, so it learns more, sooner, where n is small
(docs/long-contexts.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sparsek_dist.data.loader import Batch, Loader
from sparsek_dist.data.packing import Contexts
from sparsek_dist.data.store import TokenStore


class GrowingLoader:
    """A `Loader` whose contexts [b, n] become [b * r, n / r] in the first steps.

    Each length has an order of its own: what was read at one may come again at the next, before other text was read.
    """

    def __init__(
        self, store: TokenStore, length: int, growth: Sequence[tuple[int, int]], *, seed: int, sequences_per_step: int
    ) -> None:
        """
        Args:
            store: the split.
            length: n of all steps after those of `growth`.
            growth: (tokens of a context, a divisor of `length`; how many steps), in the order of training.
            seed: of the order of contexts, at each length.
            sequences_per_step: contexts of `length` tokens in one optimizer step, over all ranks.

        Raises:
            DataError: the split is shorter than one context.
        """
        self._growths = [length // short for short, _ in growth] + [1]
        self._ends = list(accumulate(steps for _, steps in growth))
        # The longest first: if there are such contexts, there are shorter ones.
        loaders = {
            r: Loader(Contexts(store, length // r), seed=seed, sequences_per_step=sequences_per_step * r)
            for r in reversed(self._growths)
        }
        self._loaders = [loaders[r] for r in self._growths]

    def micro_batch(self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> Batch:
        """Batch [b * r, n / r] with b = `micro_batch_size`; all else as in `Loader.micro_batch`."""
        place = bisect_right(self._ends, step)
        size = micro_batch_size * self._growths[place]
        return self._loaders[place].micro_batch(
            step, micro, data_rank=data_rank, data_degree=data_degree, micro_batch_size=size
        )
