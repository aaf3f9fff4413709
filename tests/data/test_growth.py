"""Contexts that grow: as many tokens a step, each stage a loader of its own, whatever the data degree."""

from __future__ import annotations

import pytest
import torch

from sparsek_dist.commands.train import training_loader
from sparsek_dist.config import Config, DataConfig, TrainConfig
from sparsek_dist.data.growth import GrowingLoader
from sparsek_dist.data.loader import Batch, Loader
from sparsek_dist.data.packing import Contexts
from sparsek_dist.errors import DataError
from tests.data.test_loader import equal
from tests.data.toys import random_store

GROWTH = DataConfig(growth="8x2,16x3").first_lengths


def _loader() -> GrowingLoader:
    return GrowingLoader(random_store(3, num_documents=40, longest=60), 32, GROWTH, seed=4, sequences_per_step=4)


def test_contexts_grow_and_steps_stay_as_large() -> None:
    whole = [_loader().micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=4) for step in range(7)]
    shapes = [tuple(batch.input_ids.shape) for batch in whole]
    assert shapes == [(16, 8)] * 2 + [(8, 16)] * 3 + [(4, 32)] * 2


@pytest.mark.parametrize("step", [0, 1, 2, 4, 5, 30])
def test_each_stage_is_what_a_loader_of_its_length_reads_at_that_step(step: int) -> None:
    store = random_store(3, num_documents=40, longest=60)
    length = 8 if step < 2 else 16 if step < 5 else 32
    plain = Loader(Contexts(store, length), seed=4, sequences_per_step=4 * 32 // length)
    size = 4 * 32 // length
    expected = plain.micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=size)
    assert equal(_loader().micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=4), expected)
    # Two data-parallel groups, two micro batches each: the same rows.
    places = {"data_degree": 2, "micro_batch_size": 1}
    parts = [_loader().micro_batch(step, micro, data_rank=rank, **places) for micro in (0, 1) for rank in (0, 1)]
    fields = ("input_ids", "labels", "position_ids")
    assert equal(Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in fields)), expected)


def test_a_run_reads_what_its_settings_say() -> None:
    config = Config(data=DataConfig(sequence_length=32, growth="8x2"), train=TrainConfig(micro_batch_size=3))
    loader = training_loader(random_store(3, num_documents=40, longest=60), config, 2)
    shapes = [
        loader.micro_batch(step, 0, data_rank=1, data_degree=2, micro_batch_size=3).input_ids.shape for step in (1, 2)
    ]
    assert shapes == [(12, 8), (3, 32)]


def test_a_text_too_short_for_the_last_length_is_refused_at_once() -> None:
    for longest in (20, 3):
        with pytest.raises(DataError, match="sequence_length = 64 is more than"):
            GrowingLoader(random_store(3, num_documents=1, longest=longest), 64, [(8, 2)], seed=0, sequences_per_step=1)


def test_no_growth_is_one_length() -> None:
    assert DataConfig().first_lengths == []
