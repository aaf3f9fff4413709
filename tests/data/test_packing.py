"""Rows against a direct reading of the definition; no target lost, none counted twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_dist.data.packing import IGNORED, Context, Contexts
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError
from tests.data.toys import BOS, EOS, random_store, store_of

STORES = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=8).map(
    lambda documents: store_of([[BOS, *document, EOS] for document in documents])
)


def expected_row(store: TokenStore, length: int, row: int) -> Context:
    """Token by token, from (document, place) pairs."""
    stream = [
        (document, int(token))
        for document in range(store.num_documents)
        for token in store.tokens[store.offsets[document] : store.offsets[document + 1]]
    ]
    stream += [(-1, EOS)] * length
    ids, labels, positions = [], [], []
    for i in range(row * length, row * length + length):
        ids.append(stream[i][1])
        same = i + 1 < store.num_tokens and stream[i + 1][0] == stream[i][0]
        labels.append(stream[i + 1][1] if same else IGNORED)
        restart = i % length == 0 or stream[i - 1][0] != stream[i][0]
        positions.append(0 if restart else positions[-1] + 1)
    return Context(np.array(ids), np.array(labels), np.array(positions))


@settings(max_examples=150, deadline=None)
@given(store=STORES, length=st.integers(1, 15), pad=st.booleans())
def test_rows_are_what_they_are_defined_to_be(store: TokenStore, length: int, pad: bool) -> None:
    if not pad and store.num_tokens < length:
        return
    contexts = Contexts(store, length, pad=pad)
    assert len(contexts) == (-(-store.num_tokens // length) if pad else store.num_tokens // length)
    targets = 0
    for row, context in enumerate(contexts):
        expected = expected_row(store, length, row)
        for name in ("input_ids", "labels", "position_ids"):
            found = getattr(context, name)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, getattr(expected, name), err_msg=f"{name} of row {row}")
        targets += int((context.labels != IGNORED).sum())
    assert contexts.num_targets == targets


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), length=st.integers(1, 40))
def test_every_token_but_the_first_of_each_document_is_a_target_once(seed: int, length: int) -> None:
    store = random_store(seed, num_documents=9, longest=30)
    contexts = Contexts(store, length, pad=True)
    # (place in the stream, token) of each target; the place tells equal tokens apart.
    found = Counter(
        (row * length + i + 1, int(label))
        for row, context in enumerate(contexts)
        for i, label in enumerate(context.labels)
        if label != IGNORED
    )
    first = set(store.offsets[:-1].tolist())
    expected = Counter((i, int(token)) for i, token in enumerate(store.tokens) if i not in first)
    assert found == expected
    assert contexts.num_targets == store.num_tokens - store.num_documents


def test_literal_rows() -> None:
    store = store_of([[9, 1, 2, 8], [9, 3, 8]])
    first, second = Contexts(store, 5, pad=True)
    assert first.input_ids.tolist() == [9, 1, 2, 8, 9]
    assert first.labels.tolist() == [1, 2, 8, IGNORED, 3]
    assert first.position_ids.tolist() == [0, 1, 2, 3, 0]
    assert second.input_ids.tolist() == [3, 8, 8, 8, 8]
    assert second.labels.tolist() == [8] + [IGNORED] * 4
    assert second.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert len(Contexts(store, 5)) == 1


def test_too_few_tokens_and_rows_out_of_range() -> None:
    store = store_of([[9, 1, 8]])
    with pytest.raises(DataError, match=r"data\.sequence_length = 4 .* 3 tokens .* use at most 3"):
        Contexts(store, 4)
    contexts = Contexts(store, 4, pad=True)
    for row in (-1, 1):
        with pytest.raises(IndexError):
            contexts[row]
