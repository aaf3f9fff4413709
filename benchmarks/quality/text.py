"""Real long text that is there already: the sources of installed Python packages, each one long document of bytes.

Some contexts hold pass keys instead, or no model trained on so little would know what the question means: haystacks of
all lengths that the passkey task asks for, from other seeds than its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.scales import Scale
from sparsek_dist.data.loader import Batch, Loader, evaluation_batches
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
PASSKEY_SHARE = 4
"""One context in so many holds pass keys."""
TRAINING_KEYS, TEST_KEYS = 1, 2
"""Seeds of haystacks begin with it: what is tested was not trained on."""
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


def haystacks(purpose: int, seed: int) -> Haystacks:
    """Of pass keys in sentences, for `TRAINING_KEYS` or `TEST_KEYS`."""
    seed = 1000 * purpose + seed
    return Haystacks(lambda text: list(text.encode()), END, task="passkey", num_needles=1, seed=seed)


def passkey_lengths(scale: Scale) -> list[int]:
    """1x to 16x the window, but long enough for the question itself."""
    shortest = 112
    return sorted({max(distance, shortest) for distance in scale.text.distances})


class TrainingText:
    """The batch [b, n] of every step: a pure function of seed and step."""

    def __init__(self, text: Corpus, scale: Scale, *, seed: int) -> None:
        self._loader = Loader(text.train, seed=seed, sequences_per_step=scale.text.batch)
        self._scale, self._seed = scale, seed
        self._hay = haystacks(TRAINING_KEYS, seed)

    def __call__(self, step: int) -> Batch:
        size = self._scale.text.batch
        batch = self._loader.micro_batch(step, 0, data_rank=0, data_degree=1, micro_batch_size=size)
        for row in range(size):
            if (step * size + row) % PASSKEY_SHARE == 0:
                batch.input_ids[row], batch.labels[row] = self._passkeys(step * size + row)
        return batch

    def _passkeys(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels [n]: haystacks one after the other as one document, each asking for the key it just told."""
        n, lengths = self._scale.text.length, passkey_lengths(self._scale)
        draw = np.random.default_rng([TRAINING_KEYS, self._seed, index])
        ids: list[int] = []
        while len(ids) <= n:
            made = self._hay.sample(int(draw.choice(lengths)), float(draw.random()), index * 1000 + len(ids))
            ids += [*made.prompt, *made.answer]
        tokens = torch.tensor(ids[: n + 1])
        return tokens[:-1], torch.where(tokens[1:] == END, IGNORED, tokens[1:])


def test_batches(text: Corpus, scale: Scale) -> list[Batch]:
    size = scale.text.batch
    return list(
        evaluation_batches(text.held_out, batch_size=size, limit=scale.text.eval_contexts, data_rank=0, data_degree=1)
    )
