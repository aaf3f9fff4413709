"""The same rows for every data degree and at every resume; each row once per epoch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsek_dist.data.loader import Batch, Loader, evaluation_batches
from sparsek_dist.data.packing import IGNORED, Contexts
from sparsek_dist.parallel.layout import unshard
from tests.data.toys import random_store

FIELDS = ("input_ids", "labels", "position_ids")


@pytest.fixture
def contexts() -> Contexts:
    found = Contexts(random_store(3, num_documents=40, longest=60), 32)
    assert len(found) % 8, "an epoch must end inside a step, or the tests below prove little"
    return found


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def test_two_epochs_use_every_row_twice(contexts: Contexts) -> None:
    loader = Loader(contexts, seed=0, sequences_per_step=8)
    rows = np.concatenate([loader.rows(step) for step in range(len(contexts))])  # 8 epochs
    epochs = rows.reshape(8, len(contexts))
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(len(contexts)))
    assert Counter(epochs[:2].ravel().tolist()) == dict.fromkeys(range(len(contexts)), 2)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8, "every epoch has an order of its own"


def test_a_step_may_be_longer_than_an_epoch(contexts: Contexts) -> None:
    rows = Loader(contexts, seed=1, sequences_per_step=3 * len(contexts)).rows(0)
    assert Counter(rows.tolist()) == dict.fromkeys(range(len(contexts)), 3)


def test_seeds_give_different_orders(contexts: Contexts) -> None:
    first, same, other = (Loader(contexts, seed=seed, sequences_per_step=8).rows(0).tolist() for seed in (0, 0, 1))
    assert first == same
    assert first != other


@pytest.mark.parametrize("data_degree", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_steps_do_not_depend_on_the_data_degree(contexts: Contexts, data_degree: int, micro_batch_size: int) -> None:
    loader = Loader(contexts, seed=5, sequences_per_step=8)
    micros = 8 // (data_degree * micro_batch_size)
    for step in (0, 4, 11):
        batches = [
            loader.micro_batch(step, micro, data_rank=rank, data_degree=data_degree, micro_batch_size=micro_batch_size)
            for micro in range(micros)
            for rank in range(data_degree)
        ]
        whole = loader.micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=8)
        joined = Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS))
        assert equal(joined, whole)
        assert whole.input_ids.shape == (8, 32)
        expected = np.stack([contexts[row].labels for row in loader.rows(step)])
        np.testing.assert_array_equal(whole.labels.numpy(), expected)


def test_resuming_at_any_step_gives_the_same_batch(contexts: Contexts) -> None:
    keywords = {"data_rank": 1, "data_degree": 2, "micro_batch_size": 2}
    straight = Loader(contexts, seed=7, sequences_per_step=8)
    # Two visits of every step, in order, as training with accumulation makes them.
    wanted = {(step, micro): straight.micro_batch(step, micro, **keywords) for step in range(20) for micro in range(2)}
    for (step, micro), batch in wanted.items():
        assert equal(Loader(contexts, seed=7, sequences_per_step=8).micro_batch(step, micro, **keywords), batch)


def test_rows_cannot_be_spoiled_by_their_reader(contexts: Contexts) -> None:
    loader = Loader(contexts, seed=0, sequences_per_step=8)
    before = loader.rows(2).copy()
    loader.rows(2)[:] = 0
    np.testing.assert_array_equal(loader.rows(2), before)


def test_shards_are_as_long_as_they_must_be(contexts: Contexts) -> None:
    loader = Loader(contexts, seed=0, sequences_per_step=3)
    batch = loader.micro_batch(0, 0, data_rank=0, data_degree=1, micro_batch_size=3)
    first, second = (batch.shard(rank, 2, shortest=40) for rank in range(2))
    assert torch.equal(first.input_ids[:, :32], batch.input_ids) and first.labels.shape == (3, 40)
    assert (first.labels[:, 32:] == IGNORED).all() and (second.labels == IGNORED).all()
    assert second.position_ids.tolist() == [list(range(8, 48))] * 3
    assert batch.shard(0, 1, shortest=40).labels.shape == (3, 32)
    assert batch.shard(0, 2, shortest=3).labels.shape == (3, 16)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_shards_are_all_of_the_batch(contexts: Contexts, degree: int) -> None:
    batch = Loader(contexts, seed=0, sequences_per_step=8).micro_batch(
        0, 0, data_rank=0, data_degree=1, micro_batch_size=3
    )
    shards = [batch.shard(rank, degree) for rank in range(degree)]
    assert shards[-1].labels.shape == (3, 32 // degree)
    for name in FIELDS:
        assert getattr(batch, name).dtype == torch.int64
        assert torch.equal(unshard([getattr(shard, name) for shard in shards]), getattr(batch, name))
    assert equal(batch.to("cpu"), batch)
    # The shift came first: a shard's last label is the next shard's first token, unless a document ends there.
    for left, right in pairwise(shards):
        last = left.labels[:, -1]
        assert torch.equal(last[last != IGNORED], right.input_ids[:, 0][last != IGNORED])


@pytest.mark.parametrize(("micro", "rank", "degree"), [(4, 0, 1), (2, 0, 2), (-1, 0, 1), (0, 2, 2), (0, -1, 2)])
def test_micro_batches_outside_the_step_are_refused(contexts: Contexts, micro: int, rank: int, degree: int) -> None:
    loader = Loader(contexts, seed=0, sequences_per_step=8)
    with pytest.raises(ValueError, match=f"micro batch {micro} of data rank {rank}"):
        loader.micro_batch(0, micro, data_rank=rank, data_degree=degree, micro_batch_size=2)
    with pytest.raises(ValueError, match="negative"):
        loader.rows(-1)


@pytest.mark.parametrize("data_degree", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, 1, 5, 10_000])
def test_evaluation_sees_each_row_once_on_equally_many_batches(
    contexts: Contexts, data_degree: int, limit: int
) -> None:
    per_rank = [
        list(evaluation_batches(contexts, batch_size=3, limit=limit, data_rank=rank, data_degree=data_degree))
        for rank in range(data_degree)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    used = [batch for batches in per_rank for batch in batches]
    assert {tuple(batch.labels.shape) for batch in used} == {(3, 32)}
    rows = {
        tuple(context.input_ids.tolist()) + tuple(context.labels.tolist()): row for row, context in enumerate(contexts)
    }
    assert len(rows) == len(contexts)
    seen = [
        rows[tuple(ids.tolist()) + tuple(labels.tolist())]
        for batch in used
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
        if (labels != IGNORED).any()
    ]
    count = min(limit, len(contexts)) if limit else len(contexts)
    assert len(seen) == len(set(seen)) == count
    if count > 1:
        assert set(np.diff(sorted(seen))) <= {len(contexts) // count, -(-len(contexts) // count)}


def test_more_groups_than_rows_still_get_a_batch_each() -> None:
    contexts = Contexts(random_store(1, num_documents=1, longest=10), 64, pad=True)
    assert len(contexts) == 1
    batches = [
        list(evaluation_batches(contexts, batch_size=1, limit=0, data_rank=rank, data_degree=3)) for rank in range(3)
    ]
    assert [len(found) for found in batches] == [1, 1, 1]
    assert [(found[0].labels != IGNORED).any().item() for found in batches] == [True, False, False]
