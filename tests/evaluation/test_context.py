"""Error by context length and by position: against sums by hand, and against a model whose answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsek_dist.data.loader import Batch
from sparsek_dist.data.packing import Contexts
from sparsek_dist.errors import DataError
from sparsek_dist.evaluation.context import as_row, estimate, measure
from sparsek_dist.evaluation.perplexity import label_bytes
from sparsek_dist.evaluation.text import store_of
from sparsek_dist.models.pretrained import sparsify
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
N = 48


@pytest.fixture(scope="module")
def model():
    """In float64, so that sums in another order agree closely."""
    return sparsify(tiny_model("llama"), num_selected=4, window=4)


def _batch(starts: list[list[int]], *, n: int = N, seed: int = 0) -> Batch:
    """Random rows, with documents that begin at 0 and at `starts`."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (len(starts), n + 1)))
    labels, positions = ids[:, 1:].clone(), torch.arange(n).repeat(len(starts), 1)
    for row, places in enumerate(starts):
        for place in places:
            labels[row, place - 1] = -100
            positions[row, place:] = torch.arange(n - place)
    return Batch(ids[:, :-1], labels, positions)


def _bytes(labels):
    """2 bytes for even tokens, 1 for odd ones."""
    return (labels >= 0).double() * (2 - labels % 2)


def _logits(model, input_ids, position_ids):
    return model(input_ids=input_ids, position_ids=position_ids).logits[0]


@torch.no_grad()
def test_by_hand(model) -> None:
    batch = _batch([[], [20], [N - 1], []])
    use = measure(model, [batch], label_bytes=_bytes, device=CPU)
    nats: dict[tuple[str, int], list[float]] = {}
    for row in range(4):
        log_p = _logits(model, batch.input_ids[row, None], batch.position_ids[row, None]).log_softmax(-1)
        for place in range(N):
            label, position = int(batch.labels[row, place]), int(batch.position_ids[row, place])
            if label < 0:
                continue
            nats.setdefault(("bin", int(math.log2(position + 1))), []).append(-log_p[place, label].item())
            if place >= N - 3 and position == place:
                for length in (6, 12, 24, 48):
                    begin = N - length
                    seen = _logits(model, batch.input_ids[row, None, begin:], torch.arange(length)[None])
                    here = -seen.log_softmax(-1)[place - begin, label].item()
                    nats.setdefault(("length", length), []).append(here)
    assert [place.first for place in use.by_position] == [1, 2, 4, 8, 16, 32]
    assert [row.length for row in use.by_length] == [6, 12, 24, 48]
    found = [(("bin", i), place.estimate) for i, place in enumerate(use.by_position)]
    found += [(("length", row.length), row.estimate) for row in use.by_length]
    for key, result in found:
        assert result.targets == len(nats[key]), key
        assert result.loss == pytest.approx(np.mean(nats[key]), rel=1e-9), key
    # Rows 0 and 3 whole, and of row 2 the last document's one token does not count.
    assert use.by_length[0].estimate.targets == 3 + 3 + 1
    assert use.overall.targets == int((batch.labels >= 0).sum())
    whole = use.by_length[-1]
    assert (whole.change, whole.change_error) == (0, 0)
    for row in use.by_length[:-1]:
        assert row.change == pytest.approx(row.estimate.bits_per_byte - whole.estimate.bits_per_byte)


def test_bytes_of_each_target(model) -> None:
    batch = _batch([[], [5]])
    use = measure(model, [batch], label_bytes=_bytes, device=CPU)
    expected = use.overall.loss * use.overall.targets / math.log(2) / float(_bytes(batch.labels).sum())
    assert use.overall.bits_per_byte == pytest.approx(expected)
    assert use.overall.perplexity == pytest.approx(math.exp(use.overall.loss))


def test_standard_errors_by_simulation() -> None:
    """Contexts with an error in common: the standard error is that of repetitions, not that of single targets."""
    draw = np.random.default_rng(3)
    losses, told = [], []
    for _ in range(400):
        targets = draw.integers(1, 30, 60)
        nats = targets * (2 + draw.normal(0, 0.5, 60)) + draw.normal(0, 1, 60) * np.sqrt(targets)
        result = estimate(np.stack([nats, targets, 2.0 * targets], axis=1))
        losses.append(result.loss)
        told.append(result.loss_error)
        assert result.bits_per_byte_error == pytest.approx(result.loss_error / math.log(2) / 2)
    assert np.mean(told) == pytest.approx(np.std(losses), rel=0.12)


def test_a_model_that_needs_its_context() -> None:
    """Certain of the target from 16 tokens on, and without a clue before: three of the last four in 16 lack one."""

    class Late(torch.nn.Module):
        def forward(self, input_ids, position_ids):
            knows = (position_ids >= 15)[..., None] * torch.nn.functional.one_hot(input_ids * 0, VOCABULARY)
            return SimpleNamespace(logits=100.0 * knows)

    batch = _batch([[], []], n=64)
    batch = Batch(batch.input_ids, torch.zeros_like(batch.labels), batch.position_ids)
    use = measure(Late(), [batch, batch], label_bytes=_bytes, device=CPU)
    assert [place.estimate.loss < 1e-6 for place in use.by_position] == [False] * 4 + [True] * 2
    assert (use.by_position[-1].first, use.by_position[-1].last) == (32, 64)
    losses = [row.estimate.loss for row in use.by_length]
    assert losses == pytest.approx([math.log(VOCABULARY), 0.75 * math.log(VOCABULARY), 0, 0], abs=1e-5)
    assert use.by_length[0].change == pytest.approx(math.log2(VOCABULARY) / 2)


def test_where_nothing_can_be_compared(model) -> None:
    use = measure(model, [_batch([[9], [30]])], label_bytes=_bytes, device=CPU)
    assert use.by_length == [] and use.overall.targets > 0
    alone = measure(model, [_batch([[]])], label_bytes=_bytes, device=CPU)
    assert math.isnan(alone.overall.loss_error) and as_row(alone.overall)["loss_error"] is None
    for batches in ([], [Batch(*(torch.full((1, 4), x) for x in (0, -100, 0)))]):
        with pytest.raises(DataError, match="nothing to predict"):
            measure(model, batches, label_bytes=_bytes, device=CPU)


def test_all_of_a_text() -> None:
    tokenizer = load_tokenizer("bytes")
    store = store_of(["caf\u00e9", "x" * 50, "never read"], tokenizer, tokens=40)
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (2, 5 + 2 + 52, 55)
    assert store.tokens[:7].tolist() == [256, *"caf\u00e9".encode(), 256]
    labels = torch.tensor(np.stack([row.labels for row in Contexts(store, 16, pad=True)]))
    assert label_bytes("bytes", store)(labels).sum() == 55
    assert label_bytes("other", store)(labels).sum() == pytest.approx(55)
    with pytest.raises(DataError, match="no document"):
        store_of([], tokenizer)
