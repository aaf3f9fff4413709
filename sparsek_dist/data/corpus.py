"""Documents to token stores on disk: shuffled, split, tokenised once, and found again by everything they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from tqdm import tqdm

from sparsek_dist.config import DataConfig
from sparsek_dist.data.sources import load_documents, source_identity, texts
from sparsek_dist.data.store import StoreWriter, TokenStore, find_fault, open_store, sync_folder, write_index
from sparsek_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raise it when the same corpus would give other files."""
_SPLITS = ("train", "held_out")
_BATCH_CHARACTERS = 1 << 20
"""Text tokenised at a time; `tokenizers` needs about 140 bytes a token while it works."""


class FastTokenizer(Protocol):
    """What a corpus needs of a transformers tokenizer, so that this floor does not import transformers."""

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...
    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Corpus:
    """Both splits of a corpus. No document is in both."""

    train: TokenStore
    held_out: TokenStore

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of both; equal on every machine that holds the same."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.held_out.fingerprint}".encode()).hexdigest()


def prepare(data: DataConfig, tokenizer: FastTokenizer, *, seed: int, progress: bool = False) -> Corpus:
    """The tokenised corpus, from `data.cache` or, the first time, built there.

    Safe to call from many processes at once, before any process group exists: one builds, the others wait. A build
    that is killed leaves nothing that could be mistaken for a whole one, and a damaged one is built again.

    Args:
        data: what to read; neither `sequence_length` nor the parallel degrees enter the files.
        tokenizer: a fast tokenizer with an eos token. Where it has no bos token, eos also begins a document.
        seed: of the order of the documents, and so of which ones are held out.
        progress: draw bars on stderr.

    Raises:
        ConfigError: a name in `data` that does not exist; a tokenizer without eos.
        DataError: a corpus that cannot be read, has fewer than two documents, or cannot be written to `data.cache`.
    """
    made_from = _made_from(data, tokenizer, seed)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(data.cache) / key
    try:
        # A whole folder never changes, so readers need no lock.
        if find_fault(folder, _SPLITS) is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                fault = find_fault(folder, _SPLITS)
                if fault is not None:
                    if folder.exists():
                        logger.warning("%s: %s: building it again", folder, fault)
                    _build(folder, data, tokenizer, made_from, seed=seed, progress=progress)
        return Corpus(*(open_store(folder, name) for name in _SPLITS))
    except OSError as error:
        raise DataError(f"data.cache = {data.cache!r}: {error}: choose a writable folder with free space") from error


def _made_from(data: DataConfig, tokenizer: FastTokenizer, seed: int) -> dict[str, Any]:
    """Everything that the files depend on."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data.tokenizer has no end-of-sequence token to end documents with: choose one that has")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever called the tokenizer last, and turned off while tokenising.
    backend |= {"truncation": None, "padding": None}
    rules = [backend, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.backend_tokenizer.encode_special_tokens]
    return {
        "format": FORMAT_VERSION,
        "column": data.column,
        "source": hashlib.sha256(source_identity(data).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "held_out": data.held_out,
        "seed": seed,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with `folder` among all processes. The system frees the lock when its holder dies, however it dies."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that prepares this corpus", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    folder: Path, data: DataConfig, tokenizer: FastTokenizer, made_from: dict[str, Any], *, seed: int, progress: bool
) -> None:
    """Makes `folder` appear at once and whole: written under another name, flushed, renamed. The lock must be held."""
    documents = load_documents(data, progress=progress)
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (folder, partial):
        if old.exists():
            shutil.rmtree(old)
    partial.mkdir()
    try:
        splits = _write_splits(partial, documents, data, tokenizer, seed=seed, progress=progress)
        write_index(partial, splits, {"path": data.path} | made_from)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _write_splits(
    folder: Path, documents: datasets.Dataset, data: DataConfig, tokenizer: FastTokenizer, *, seed: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Writes all documents in a random order, the first of them to the held-out split; returns the index entries."""
    num_documents = len(documents)
    if num_documents < 2:
        raise DataError(
            f"data.path = {data.path!r} holds one document, but training and evaluation need one each: "
            "add documents, or cut it into several files or lines"
        )
    num_held_out = min(max(1, round(data.held_out * num_documents)), num_documents - 1)
    order = np.random.default_rng(seed).permutation(num_documents)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    bar = tqdm(total=num_documents, desc="tokenise", unit=" documents", disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(bar)
        train, held_out = (stack.enter_context(StoreWriter(folder, name, len(tokenizer))) for name in _SPLITS)
        written = 0
        for batch in _batches(documents.select(order)):
            # About three times as fast as calling the transformers tokenizer, which also tracks where tokens stand.
            for text, encoding in zip(batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                writer = held_out if written < num_held_out else train
                writer.add([bos, *encoding.ids, eos], len(text.encode()))
                written += 1
            bar.update(len(batch))
        assert written == num_documents
        return {"train": train.finish(), "held_out": held_out.finish()}


def _batches(documents: datasets.Dataset) -> Iterator[list[str]]:
    """Lists of documents of about `_BATCH_CHARACTERS` together, or one longer document alone."""
    batch: list[str] = []
    characters = 0
    for text in texts(documents):
        if batch and characters + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch
