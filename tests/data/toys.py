"""Small stores and a tokenizer without transformers, so that child processes start fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from sparsek_dist.config import DataConfig
from sparsek_dist.data.store import TokenStore

BOS = EOS = 256


class ToyTokenizer:
    """One id per byte (in an order of its own) and 256 as bos and eos; counts how often it tokenises."""

    bos_token_id: Any = BOS
    eos_token_id: Any = EOS

    def __init__(self, vocab_size: int = 257) -> None:
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_characters())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.add_special_tokens([AddedToken("<|end|>", special=True)])
        self.backend_tokenizer: Any = _Counting(backend)
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._vocab_size

    @property
    def calls(self) -> int:
        return self.backend_tokenizer.calls


class _Counting:
    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.calls = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch_fast(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        return self._backend.encode_batch_fast(*args, **keywords)


def byte_characters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def decode(ids: Sequence[int]) -> str:
    """The text of a document `[bos] + tokens + [eos]` of the toy tokenizer."""
    alphabet = byte_characters()
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = [byte for byte in range(256) if byte not in printable]
    byte_of = {c: ord(c) if ord(c) < 0x100 else substitutes[ord(c) - 0x100] for c in alphabet}
    assert ids[0] == BOS
    assert ids[-1] == EOS
    return bytes(byte_of[alphabet[i]] for i in ids[1:-1]).decode()


def write_jsonl(path: Path, texts: Sequence[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config_for(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(path), "cache": str(path.parent / "cache"), **changes})


def store_of(documents: Sequence[Sequence[int]]) -> TokenStore:
    """A store in memory; the documents come with their bos and eos."""
    tokens = np.concatenate([np.asarray(document) for document in documents]).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return TokenStore(tokens, offsets, int(offsets[-1]) - 2 * len(documents), "toy")


def random_store(seed: int, num_documents: int, longest: int) -> TokenStore:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, num_documents)
    return store_of([[BOS, *random.integers(0, 256, length).tolist(), EOS] for length in lengths])
