"""The trigram model against a dictionary-based reading of the Witten-Bell recursion."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from sparsek_dist.data.loader import Batch
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


def _measure(train: np.ndarray, held_out: TokenStore, vocab_size: int, *, eos: int) -> float | None:
    """On each document as a row of its own, so that nothing is cut."""
    rows = []
    for begin, end in zip(held_out.offsets[:-1], held_out.offsets[1:], strict=True):
        document = torch.from_numpy(held_out.tokens[begin:end].astype(np.int64)).unsqueeze(0)
        rows.append(Batch(document[:, :-1], document[:, 1:], torch.arange(end - begin - 1).unsqueeze(0)))
    share = held_out.num_bytes / sum(row.labels.numel() for row in rows)
    return trigram_bits_per_byte(train, rows, vocab_size, eos=eos, count_bytes=lambda x: share * x.numel())


@pytest.mark.parametrize(("seed", "num_documents"), [(0, 1), (1, 3), (2, 60)])
def test_equals_the_definition(seed: int, num_documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks shorter than the corpus, so that trigrams over their borders would be missed.
    monkeypatch.setattr(trigram, "_CHUNK", 10)
    train, held_out = random_store(seed, num_documents), random_store(seed + 100, 5)
    found = _measure(train.tokens, held_out, VOCAB_SIZE, eos=EOS)
    assert found == pytest.approx(slow_bits_per_byte(train.tokens.tolist(), held_out), rel=1e-12)


def test_independent_bytes_cost_their_entropy() -> None:
    random = np.random.default_rng(4)
    documents = [np.concatenate([[256], random.integers(0, 16, 100_000), [256]]) for _ in range(5)]
    tokens = np.concatenate(documents).astype(np.uint16)
    held_out = TokenStore(tokens[-100_002:], np.array([0, 100_002]), 100_000, "toy")
    found = _measure(tokens[:-100_002], held_out, 257, eos=256)
    assert found is not None
    assert 4.0 < found < 4.1


def test_large_vocabularies_have_none() -> None:
    store = random_store(0, 2)
    assert _measure(store.tokens, store, 513, eos=EOS) is None


def test_rows_see_nothing_before_them() -> None:
    """A row that begins inside a document is predicted like the beginning of one, as a model sees it."""
    store = random_store(3, 40)
    row = Batch(torch.tensor([[2, 3, 1]]), torch.tensor([[3, 1, -100]]), torch.tensor([[0, 1, 2]]))
    expected = Batch(torch.tensor([[EOS, 2, 3]]), torch.tensor([[-100, 3, 1]]), torch.tensor([[0, 1, 2]]))
    found = [
        trigram_bits_per_byte(store.tokens, [x], VOCAB_SIZE, eos=EOS, count_bytes=lambda _: torch.tensor(2))
        for x in (row, expected)
    ]
    assert found[0] == found[1]
