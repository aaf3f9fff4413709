"""`sparsek eval` on ranks that share each sequence: the files of one process, and what else must be the same on all."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparsek_dist.cli import main
from sparsek_dist.commands import evaluation_ranks, evaluation_target
from sparsek_dist.commands import train as training
from sparsek_dist.commands.evaluate import evaluate_retrieval, evaluate_text
from sparsek_dist.commands.evaluation_ranks import opened
from sparsek_dist.commands.evaluation_target import open_target
from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.errors import SparsekError
from sparsek_dist.evaluation import shards
from sparsek_dist.evaluation.context import measure
from sparsek_dist.evaluation.haystack import Sample
from sparsek_dist.evaluation.perplexity import label_bytes
from sparsek_dist.evaluation.retrieval import retrieve
from sparsek_dist.evaluation.shards import Sharing
from sparsek_dist.evaluation.text import store_of
from sparsek_dist.models.pretrained import load_pretrained, sparsify
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.rendezvous import Ranks
from sparsek_dist.settings import load
from tests.distributed import run_distributed
from tests.models.tiny import tiny_model

LENGTH = 47
"""Two shards of 24 with one token of padding; an eighth of it, 6 tokens, does not fill two windows."""
BUDGET = {"num_selected": 6, "window": 6}
MODELS = {"sparse": BUDGET, "mixed": BUDGET | {"full_layers": "1"}, "dense": None, "other": BUDGET | {"seed": 1}}


def _save_models(folder: Path) -> None:
    for name, attention in MODELS.items():
        # In float64, so that sums in another order agree closely.
        model = tiny_model("llama", vocab_size=257, eos_token_id=256, bos_token_id=256)
        if attention is not None:
            sparsify(model, **attention)
        model.save_pretrained(folder / name)
        load_tokenizer("bytes").save_pretrained(folder / name)


def _save_texts(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for name in ("text", "text-0", "text-1"):
        (folder / name).mkdir()
        for index, size in enumerate((60, 10, 150)):
            letters = torch.randint(97, 123, (size,), generator=draw).tolist()
            (folder / name / f"{index}.txt").write_text(bytes(letters).decode())


def _samples(folder: Path) -> list[Sample]:
    """One whose answer the sparse model writes by itself, and others that differ from it in one token."""
    model = load_pretrained(folder / "sparse")
    prompt = [256, *b"once a heron sat by the ferry and did not move at all"]
    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, use_cache=False)
    own = written[0, len(prompt) :].tolist()
    assert len(own) == 5
    return [Sample(prompt, own), *(Sample(prompt, [*own[:i], own[i] ^ 1, *own[i + 1 :]]) for i in (0, 4))]


class _Fixed:
    """In the place of haystacks."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def sample(self, length: int, depth: float, index: int) -> Sample:
        return self.samples[index]


def _cells(model, samples: list[Sample], sharing: Sharing | None = None) -> list[dict]:
    cells = retrieve(model, _Fixed(samples), lengths=[64], depths=[0], samples=len(samples), sharing=sharing)
    return [asdict(cell) for cell in cells]


def _on_ranks(rank: int, world_size: int, folder: Path, samples: list[Sample]) -> dict:
    """Everything that two ranks find, with the launcher's part played by `run_distributed`."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    patch = pytest.MonkeyPatch()
    me = Ranks(rank, world_size, rank, world_size)
    for module in (evaluation_target, training):
        patch.setattr(module, "discover", lambda: me)
    for module in (evaluation_ranks, training):
        patch.setattr(module, "initialize", lambda ranks, timeout: torch.device("cpu"))
    patch.setattr(evaluation_ranks, "shutdown", lambda: None)

    def target(model: str, text: str = "text"):
        return open_target(folder / model, data=str(folder / text), length=LENGTH, out=folder / "two" / model)

    for model in ("sparse", "mixed", "dense"):
        evaluate_text(target(model), max_sequences=0)
    evaluate_retrieval(target("sparse"), "passkey", lengths=[120], depths=[0, 1], samples=2, needles=1, seed=0)
    found: dict = {}
    with opened(target("sparse"), "same", text="") as (model, sharing):
        found["cells"] = _cells(model, samples, sharing)
        for broken in (None, "gather", "positions"):
            with pytest.MonkeyPatch.context() as breaks:
                _break(breaks, broken)
                found[broken] = _loss(model, folder, sharing)
    found["told"] = [
        _told(lambda: evaluate_text(target("sparse", f"text-{rank}"), max_sequences=0)),
        _told(lambda: evaluate_text(target(("sparse", "other")[rank]), max_sequences=0)),
        _told(lambda: training.train(_training(folder, rank))),
    ]
    return found


def _break(patch: pytest.MonkeyPatch, what: str | None) -> None:
    if what == "gather":
        patch.setattr(shards, "gather", lambda x, group, kind: torch.stack([x] * group.size))
    if what == "positions":
        shard = Sharing.shard

        def from_zero(self, batch, device):
            mine = shard(self, batch, device)
            here, positions = torch.arange(mine.position_ids.shape[1]), mine.position_ids
            goes_on = positions == positions[:, :1] + here
            return replace(mine, position_ids=torch.where(goes_on, here, positions))

        patch.setattr(Sharing, "shard", from_zero)


def _loss(model, folder: Path, sharing: Sharing | None = None) -> float:
    store = store_of([path.read_text() for path in sorted((folder / "text").iterdir())], load_tokenizer("bytes"))
    batches = evaluation_batches(Contexts(store, LENGTH, pad=True), batch_size=2, limit=0, data_rank=0, data_degree=1)
    of_each = label_bytes("bytes", store)
    return measure(model, batches, label_bytes=of_each, device=model.device, sharing=sharing).overall.loss


def _training(folder: Path, rank: int):
    """A run whose hosts hold other files under the same name, as far as the configuration can tell."""
    paths = [f"data.path={folder}/text-{rank}", f"data.cache={folder}/cache", f"run.root={folder}/runs"]
    small = [
        "data.sequence_length=40",
        "parallel.sequence_degree=2",
        "attention.window=6",
        "attention.num_selected=6",
        "train.steps=1",
    ]
    return load(None, [*paths, *small])


def _told(action) -> str:
    with pytest.raises(SparsekError) as error:
        action()
    return f"{type(error.value).__name__}: {error.value}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    _save_models(folder)
    _save_texts(folder)
    samples = _samples(folder)
    return folder, samples, run_distributed(_on_ranks, 2, folder, samples, timeout=200)


WORDS = {
    "sparse": ["--length", str(LENGTH)],
    "mixed": ["--length", str(LENGTH)],
    "dense": ["--length", str(LENGTH)],
    "sparse passkey": ["--task", "passkey", "--lengths", "120", "--depths", "0,1", "--samples", "2"],
}


@pytest.mark.parametrize("name", WORDS)
def test_two_ranks_write_what_one_process_writes(name, outcome) -> None:
    folder, model = outcome[0], name.split()[0]
    out = ["--data", str(folder / "text"), "--out", str(folder / "one" / model)]
    assert main(["eval", str(folder / model), *WORDS[name], *out]) == 0
    file = "eval-passkey.json" if "passkey" in name else "eval.json"
    one, two = (json.loads((folder / number / model / file).read_text()) for number in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert "passkey" in name or len(one["by_length"]) == 4
    _same(two, one)


def _same(found, expected) -> None:
    """Equal, and numbers to 1e-10: differences of nearly equal ones are small, so not only relative to themselves."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-10, abs=1e-10) if isinstance(expected, float) else expected)


def test_one_pass_finds_what_generate_writes(outcome) -> None:
    folder, samples, ranks = outcome
    [alone] = _cells(load_pretrained(folder / "sparse"), samples)
    assert alone["accuracy"] == pytest.approx(1 / 3)
    for found in ranks:
        _same(found["cells"], [alone])


def test_the_exchange_and_the_positions_are_needed(outcome) -> None:
    folder, _, ranks = outcome
    expected = _loss(load_pretrained(folder / "sparse"), folder)
    for found in ranks:
        assert found[None] == pytest.approx(expected, rel=1e-12)
        assert abs(found["gather"] - expected) > 1e-4
        assert abs(found["positions"] - expected) > 1e-4


def test_ranks_that_hold_something_else_are_told_apart(outcome) -> None:
    _, _, (first, second) = outcome
    texts, weights, corpora = first["told"]
    assert texts.startswith("DataError: --data = ") and "rank 1 on host" in texts and "same files" in texts
    assert weights.startswith("PeerError: ") and "first model.layers.0.self_attn.scorer.weight" in weights
    assert corpora.startswith("DataError: data.path = ") and "rank 0 on host" in corpora
    # Each names what it reads itself; all else is the same.
    assert [word.replace("text-1", "text-0") for word in second["told"]] == first["told"]
