"""Whoever shares the data, and whoever continues: two epochs hold every target exactly twice."""

from collections import Counter

import numpy as np
import pytest

from sparsek_dist.data.loader import Loader
from sparsek_dist.data.packing import IGNORED, Contexts
from sparsek_dist.parallel.layout import padding
from tests.data.toys import store_of

LENGTH, ROWS, PER_STEP = 29, 8, 4
LAYOUTS = [(1, 4, 1), (1, 2, 2), (2, 1, 3), (4, 1, 4), (2, 2, 2), (1, 1, 4)]
"""Data-parallel groups, contexts of a micro batch, sequence-parallel degree."""


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    # Every token once, so that a label says which target it is.
    tokens = np.random.default_rng(2).permutation(ROWS * LENGTH + 5)
    return Contexts(store_of(np.split(tokens, [3, 40, 41, 90, 150, 151, 170])), LENGTH)


@pytest.mark.parametrize("layouts", [[layout] for layout in LAYOUTS] + [LAYOUTS], ids=str)
def test_two_epochs_hold_every_target_twice(contexts, layouts):
    """With several layouts every step has another, as after a resume with other processes."""
    loader, seen, padded = Loader(contexts, seed=3, sequences_per_step=PER_STEP), Counter(), 0
    for step in range(2 * ROWS // PER_STEP):
        data_degree, micro_batch_size, degree = layouts[step % len(layouts)]
        for micro in range(PER_STEP // data_degree // micro_batch_size):
            for data_rank in range(data_degree):
                batch = loader.micro_batch(
                    step, micro, data_rank=data_rank, data_degree=data_degree, micro_batch_size=micro_batch_size
                )
                shards = [batch.shard(rank, degree) for rank in range(degree)]
                assert len({shard.labels.shape for shard in shards}) == 1
                padded += micro_batch_size * padding(LENGTH, degree)
                for shard in shards:
                    seen.update(shard.labels[shard.labels != IGNORED].tolist())
    assert set(seen.values()) == {2}
    assert len(seen) == contexts.num_targets
    assert (padded > 0) == any(degree > 1 for *_, degree in layouts)


def test_padding_is_a_document_of_its_own(contexts):
    batch = Loader(contexts, seed=3, sequences_per_step=1).micro_batch(
        0, 0, data_rank=0, data_degree=1, micro_batch_size=1
    )
    last = batch.shard(3, 4)
    assert last.position_ids[0, -3:].tolist() == [0, 1, 2]
    assert last.labels[0, -3:].tolist() == [IGNORED] * 3
    assert last.input_ids[0, -4] == batch.input_ids[0, -1] and (last.input_ids[0, -3:] == 0).all()
