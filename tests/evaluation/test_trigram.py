"""The trigram model against a dictionary-based reading of the Witten-Bell recursion."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from sparsek_dist.data.store import TokenStore
from sparsek_dist.evaluation import trigram
from sparsek_dist.evaluation.trigram import trigram_bits_per_byte

BOS, EOS, VOCAB_SIZE = 6, 7, 8


def random_store(seed: int, num_documents: int) -> TokenStore:
    random = np.random.default_rng(seed)
    documents = [[BOS, *random.integers(0, 5, random.integers(1, 20)).tolist(), EOS] for _ in range(num_documents)]
    tokens = np.concatenate(documents).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return TokenStore(tokens, offsets, len(tokens) - 2 * num_documents, "toy")


def slow_bits_per_byte(train: list[int], held_out: TokenStore) -> float:
    """The same recursion in pure Python, from the list of training trigrams."""
    counts: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
    for u, v, w in zip(train, train[1:], train[2:], strict=False):
        if (v, w) != (EOS, BOS):
            for order, context in enumerate([(), (v,), (u, v)]):
                counts[order][context][w] += 1

    def probability(w: int, context: tuple[int, ...]) -> float:
        below = probability(w, context[1:]) if context else 1 / VOCAB_SIZE
        seen = counts[len(context)].get(context)
        return below if seen is None else (seen[w] + len(seen) * below) / (seen.total() + len(seen))

    nats = 0.0
    for begin, end in zip(held_out.offsets[:-1], held_out.offsets[1:], strict=True):
        document = [EOS, *held_out.tokens[begin:end].tolist()]
        nats -= sum(
            math.log(probability(document[i], (document[i - 2], document[i - 1]))) for i in range(2, len(document))
        )
        for context in {(document[i - 2], document[i - 1]) for i in range(2, len(document))}:
            assert math.isclose(sum(probability(w, context) for w in range(VOCAB_SIZE)), 1.0)
    return nats / math.log(2) / held_out.num_bytes


@pytest.mark.parametrize(("seed", "num_documents"), [(0, 1), (1, 3), (2, 60)])
def test_equals_the_definition(seed: int, num_documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks shorter than the corpus, so that trigrams over their borders would be missed.
    monkeypatch.setattr(trigram, "_CHUNK", 10)
    train, held_out = random_store(seed, num_documents), random_store(seed + 100, 5)
    found = trigram_bits_per_byte(train.tokens, held_out, VOCAB_SIZE)
    assert found == pytest.approx(slow_bits_per_byte(train.tokens.tolist(), held_out), rel=1e-12)


def test_independent_bytes_cost_their_entropy() -> None:
    random = np.random.default_rng(4)
    documents = [np.concatenate([[256], random.integers(0, 16, 100_000), [256]]) for _ in range(5)]
    tokens = np.concatenate(documents).astype(np.uint16)
    held_out = TokenStore(tokens[-100_002:], np.array([0, 100_002]), 100_000, "toy")
    found = trigram_bits_per_byte(tokens[:-100_002], held_out, 257)
    assert found is not None
    assert 4.0 < found < 4.1


def test_large_vocabularies_have_none() -> None:
    store = random_store(0, 2)
    assert trigram_bits_per_byte(store.tokens, store, 513) is None


def test_a_million_bytes_are_quick() -> None:
    tokens = np.random.default_rng(5).integers(0, 256, 1_000_000).astype(np.uint16)
    store = TokenStore(tokens[:1000], np.array([0, 1000]), 998, "toy")
    start = time.perf_counter()
    assert trigram_bits_per_byte(tokens, store, 257) is not None
    assert time.perf_counter() - start < 5.0
