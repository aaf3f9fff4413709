"""The bits per byte of a smoothed trigram model: what a trained model must at least beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from sparsek_dist.data.loader import Batch

MAX_VOCAB_SIZE = 512
"""Above it, a table of all trigrams would not fit: 512 cubed counts are 0.5 GiB."""
_CHUNK = 1 << 20


def trigram_bits_per_byte(
    train_tokens: np.ndarray,
    batches: Iterable[Batch],
    vocab_size: int,
    *,
    eos: int,
    count_bytes: Callable[[Tensor], Tensor],
) -> float | None:
    """Interpolated trigram model of the training tokens, measured on the batches that a model is measured on.

    Each order is mixed with the one below by the rule of Witten and Bell 1991, "The zero-frequency problem", method C,
    in the interpolated form of Chen and Goodman 1999, "An empirical study of smoothing techniques for language
    modeling", section 2.5; below the unigrams stands the uniform distribution:

        p(w | uv) = (c(uvw) + T(uv) p(w | v)) / (c(uv) + T(uv)),  T(uv) = number of different tokens seen after uv

    Args:
        train_tokens: [num_tokens], documents as `[bos] + tokens + [eos]` one after the other.
        batches: [b, n] as for `evaluate`; like a model, it sees nothing of what stands before a row.
        vocab_size: tokens lie below it.
        eos: what stands before a document in the stream of training tokens.
        count_bytes: from `byte_counter`.

    Returns:
        Nats of all targets / (ln 2 * their bytes), or None above `MAX_VOCAB_SIZE` tokens.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        return None
    mixture = _Mixture(_count(train_tokens, vocab_size, int(train_tokens[0]), eos))
    nats = num_bytes = 0.0
    for batch in batches:
        before = torch.where(batch.position_ids > 0, batch.input_ids.roll(1, dims=1), eos)
        predicted = batch.labels >= 0
        u, v, w = (x[predicted].numpy() for x in (before, batch.input_ids, batch.labels))
        nats -= float(np.log(mixture.probability(u, v, w)).sum())
        num_bytes += float(count_bytes(batch.labels))
    return nats / (math.log(2) * num_bytes)


def _count(tokens: np.ndarray, vocab_size: int, bos: int, eos: int) -> np.ndarray:
    """Counts [u, v, w] of all trigrams, but for those that predict the first token of a document."""
    counts = np.zeros(vocab_size**3, dtype=np.uint32)
    for begin in range(0, len(tokens) - 2, _CHUNK):
        piece = tokens[begin : begin + _CHUNK + 2].astype(np.int64)
        u, v, w = piece[:-2], piece[1:-1], piece[2:]
        predicted = (v != eos) | (w != bos)
        np.add.at(counts, ((u * vocab_size + v) * vocab_size + w)[predicted], np.uint32(1))
    return counts.reshape(vocab_size, vocab_size, vocab_size)


class _Mixture:
    """Witten-Bell probabilities out of trigram counts [u, v, w]."""

    def __init__(self, trigrams: np.ndarray) -> None:
        vocab_size = len(trigrams)
        bigrams = trigrams.sum(axis=0, dtype=np.int64)
        unigrams = bigrams.sum(axis=0)
        # Each order as (counts, total per context, T per context).
        self._third = (trigrams, trigrams.sum(axis=2, dtype=np.int64), np.count_nonzero(trigrams, axis=2))
        self._second = (bigrams, bigrams.sum(axis=1), np.count_nonzero(bigrams, axis=1))
        kinds = np.count_nonzero(unigrams)
        self._first = (unigrams + kinds / vocab_size) / (unigrams.sum() + kinds)

    def probability(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | uv) for each of three arrays of tokens [t]."""
        below = _mix(self._second, (v,), w, self._first[w])
        return _mix(self._third, (u, v), w, below)


def _mix(
    order: tuple[np.ndarray, np.ndarray, np.ndarray], context: tuple[np.ndarray, ...], w: np.ndarray, below: np.ndarray
) -> np.ndarray:
    counts, totals, kinds = order
    total, kind = totals[context], kinds[context]
    # A context that never occurred says nothing: 0 / 0 is replaced by the order below.
    mixed = (counts[(*context, w)] + kind * below) / np.maximum(total + kind, 1)
    return np.where(total > 0, mixed, below)
