"""Contexts of equal length out of a token store, by index arithmetic alone: nothing is copied, no target is lost.

The documents of a split are one stream of tokens, cut every `length` tokens into rows. A document may span rows and
a row may hold many documents: `position_ids` restart at each, which is how the attention keeps them apart, and the
last token of a document has no target. Targets are shifted here, once, before anything is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError

IGNORED = -100
"""Label of a token without a target."""


@dataclass(frozen=True)
class Context:
    """One row; all int64 [n].

    Attributes:
        input_ids: n tokens of the stream.
        labels: the token that follows each in its document (that of the last one begins the next row), or `IGNORED`.
        position_ids: 0, 1, .. within each document; 0 again at the start of the row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Contexts:
    """The rows of a split; `contexts[i]` reads n + 1 tokens from the disk."""

    def __init__(self, store: TokenStore, length: int, *, pad: bool = False) -> None:
        """
        Args:
            store: the split.
            length: n, tokens of a row.
            pad: fill the last row up, with eos tokens without targets that are a document of their own. Otherwise a
                tail shorter than a row is left out, as training does.

        Raises:
            DataError: the split is shorter than one row.
        """
        self.store, self.length = store, length
        self._num_rows = -(-store.num_tokens // length) if pad else store.num_tokens // length
        if self._num_rows < 1:
            raise DataError(
                f"data.sequence_length = {length} is more than the {store.num_tokens} tokens of this split: "
                f"use at most {store.num_tokens}, or a larger data.path"
            )

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Context]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Context:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        store, length = self.store, self.length
        begin = row * length
        end = min(begin + length, store.num_tokens)
        filled = end - begin
        input_ids = np.full(length, store.eos_id, dtype=np.int64)
        input_ids[:filled] = store.tokens[begin:end]
        labels = np.full(length, IGNORED, dtype=np.int64)
        following = store.tokens[begin + 1 : end + 1]
        labels[: len(following)] = following
        # Where documents begin after the row's first token, the token after its last one included; the stream's end
        # counts as a beginning, so that padding is a document too.
        first, last = np.searchsorted(store.offsets, [begin + 1, end + 1])
        starts = np.asarray(store.offsets[first:last]) - begin
        labels[starts - 1] = IGNORED
        return Context(input_ids, labels, _positions(starts, length))

    @property
    def num_targets(self) -> int:
        """Labels over all rows that are not `IGNORED`."""
        covered = min(len(self) * self.length, self.store.num_tokens)
        ends = self.store.offsets[1:]
        return covered - int(np.searchsorted(ends, covered, side="right"))


def _positions(starts: np.ndarray, length: int) -> np.ndarray:
    """0, 1, .. [length], restarting at each of the ascending `starts`; those at `length` have no effect."""
    here = np.arange(length, dtype=np.int64)
    restarts = np.zeros(length, dtype=np.int64)
    inside = starts[starts < length]
    restarts[inside] = inside
    return here - np.maximum.accumulate(restarts)
