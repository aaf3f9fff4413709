"""Real long text that is there already: the sources of installed Python packages, each one long document of bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.needles import hidden_keys, write_keys
from benchmarks.quality.scales import Scale, Task
from sparsek_dist.data.growth import GrowingLoader
from sparsek_dist.data.loader import Batch, evaluation_batches
from sparsek_dist.data.packing import IGNORED, Contexts
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError
from sparsek_dist.evaluation.haystack import Haystacks

TRAIN = ("stdlib", "torch", "transformers", "sympy", "datasets", "tensorboard", "matplotlib")
HELD_OUT = ("deepspeed", "networkx", "numpy", "rich")
"""All come with this project; those that are missing are left out, which the results say."""
END = 256
"""The byte tokenizer's one special token."""
VOCAB = 257
HAY_BYTES = 1_000_000
"""Of the held-out text, that pass keys are hidden in."""
_SKIPPED = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    train: Contexts
    held_out: Contexts
    told: dict[str, Any]
    """Packages, bytes and a hash, so that two machines can tell whether they read the same."""


def corpus(scale: Scale) -> Corpus:
    """Contexts of `scale.text.length` bytes, none longer than its document.

    Raises:
        DataError: if no package of either list is here.
    """
    length = scale.text.length
    stores, told = [], {}
    for split, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        documents = {name: text for name in names if (text := package_text(name, scale.package_bytes))}
        if not documents:
            raise DataError(f"none of the packages {', '.join(names)} is installed: install one of them")
        stores.append(_store(list(documents.values()), length))
        digest = hashlib.sha256(b"".join(documents.values())).hexdigest()[:16]
        told[split] = {"packages": {name: len(text) for name, text in documents.items()}, "sha256": digest}
    return Corpus(Contexts(stores[0], length), Contexts(stores[1], length), told)


def package_text(name: str, limit: int) -> bytes:
    """Its modules one after the other, in the order of their paths, up to `limit` bytes; b"" if it is not installed."""
    root = _folder(name)
    parts, size = [], 0
    for path in _modules(root) if root else ():
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def _folder(name: str) -> Path | None:
    if name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    # Found, not imported.
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path


def _store(documents: list[bytes], length: int) -> TokenStore:
    """Documents [bos, bytes, eos], cut so that each fills whole contexts: no context holds parts of two."""
    pieces = []
    for document in documents:
        tokens = np.concatenate([[END], np.frombuffer(document, dtype=np.uint8), [END]]).astype(np.int32)
        pieces.append(tokens[: len(tokens) // length * length])
    offsets = np.cumsum([0, *map(len, pieces)])
    tokens = np.concatenate(pieces)
    return TokenStore(tokens, offsets, num_bytes=int((tokens < END).sum()), fingerprint="")


class TrainingText:
    """The batch [b, n] of every step, pass keys in every second context: a pure function of seed and step."""

    def __init__(self, text: Corpus, task: Task, *, seed: int) -> None:
        self._loader = GrowingLoader(
            text.train.store, task.length, task.growth, seed=seed, sequences_per_step=task.batch
        )
        self._size, self._seed = task.batch, seed

    def __call__(self, step: int) -> Batch:
        batch = self._loader.micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=self._size)
        for row, (ids, labels) in enumerate(zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True)):
            if row % 2 == 0:
                write_keys(ids, (self._seed, step, row))
            labels[:-1] = np.where(labels[:-1] == IGNORED, IGNORED, ids[1:])
        return batch


def test_batches(text: Corpus, task: Task) -> list[Batch]:
    contexts = Contexts(text.held_out.store, task.length)
    limit = task.eval_contexts
    return list(evaluation_batches(contexts, batch_size=task.batch, limit=limit, data_rank=0, data_degree=1))


def test_keys(text: Corpus, scale: Scale) -> Haystacks:
    """Texts out of the held-out packages, with pass keys hidden in them."""
    tokens = text.held_out.store.tokens[:HAY_BYTES]
    return hidden_keys(tokens[tokens < END].astype(np.uint8).tobytes().decode(errors="replace"), END, scale)
