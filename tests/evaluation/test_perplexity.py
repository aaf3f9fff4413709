"""Evaluation sums: the same on one rank, on two data-parallel ones, and on two that share each sequence."""

from __future__ import annotations

import math
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError
from sparsek_dist.evaluation.perplexity import byte_counter, bytes_per_target, evaluate
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_distributed
from tests.training.toys import VOCABULARY, seeded_model

CPU = torch.device("cpu")


def _store() -> TokenStore:
    """Four documents of very different lengths; token 16 begins and ends each."""
    generator = np.random.default_rng(11)
    documents = [[16, *generator.integers(0, 16, length), 16] for length in (3, 40, 7, 90)]
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenStore(np.concatenate(documents).astype(np.uint16), offsets, num_bytes=3 * 140, fingerprint="")


def _evaluate(mesh: Mesh, limit: int = 0):
    store = _store()
    batches = evaluation_batches(
        Contexts(store, 16, pad=True), batch_size=2, limit=limit, data_rank=mesh.data_rank, data_degree=mesh.data_degree
    )
    return evaluate(seeded_model(dropout=0.5), batches, mesh, count_bytes=byte_counter("other", store), device=CPU)


def _on_ranks(rank: int, world_size: int) -> list:
    return [_evaluate(build_mesh(degree, timeout=timedelta(seconds=30))) for degree in (1, 2)]


def test_sums_over_ranks() -> None:
    alone = _evaluate(Mesh())
    for results in run_distributed(_on_ranks, 2):
        for result in results:
            assert (result.targets, result.bytes) == (alone.targets, pytest.approx(alone.bytes))
            assert result.nats == pytest.approx(alone.nats, rel=1e-6)


def test_by_hand() -> None:
    store, result = _store(), _evaluate(Mesh())
    model = seeded_model().eval()
    nats, targets = 0.0, 0
    for context in Contexts(store, 16, pad=True):
        ids, positions = torch.tensor(context.input_ids)[None], torch.tensor(context.position_ids)[None]
        log_p = model(ids, positions).logits.log_softmax(-1)[0]
        for place, label in enumerate(context.labels):
            if label >= 0:
                nats, targets = nats - log_p[place, label].item(), targets + 1
    assert targets == result.targets == store.num_tokens - store.num_documents
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.loss == pytest.approx(nats / targets) and result.perplexity == pytest.approx(math.exp(nats / targets))
    # All of the split: the mean bytes per token give exactly its bytes.
    assert result.bytes == pytest.approx(store.num_bytes)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / store.num_bytes)


def test_uniform_model_needs_the_logarithm_of_the_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, input_ids, position_ids):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))

    batches = evaluation_batches(Contexts(_store(), 16), batch_size=1, limit=3, data_rank=0, data_degree=1)
    result = evaluate(Uniform(), batches, Mesh(), count_bytes=byte_counter("other", _store()), device=CPU)
    assert result.loss == pytest.approx(math.log(VOCABULARY))


def test_bytes_of_targets() -> None:
    store = _store()
    labels = torch.tensor([[0, 255, 256, -100]])
    assert byte_counter("bytes", store)(labels) == 2
    assert byte_counter("other", store)(labels) == pytest.approx(3 * bytes_per_target(store))
    assert bytes_per_target(store) == 420 / 144


def test_mode_is_left_as_it_was() -> None:
    model, nothing = seeded_model(), []
    for training in (True, False):
        model.train(training)
        with pytest.raises(DataError, match="held_out"):
            evaluate(model, nothing, Mesh(), count_bytes=byte_counter("other", _store()), device=CPU)
        assert model.training is training
