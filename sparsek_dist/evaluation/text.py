"""All documents of a text as a token store in memory: no split, no shuffle, nothing left on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from sparsek_dist.data.corpus import FastTokenizer
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError


def store_of(documents: Iterable[str], tokenizer: FastTokenizer, *, tokens: int = 0) -> TokenStore:
    """Documents in their order, each `[bos] + tokens + [eos]` as in training.

    Args:
        tokens: stop after the document that reaches as many; 0 for all.

    Raises:
        DataError: if there is no document.
    """
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pieces: list[np.ndarray] = []
    lengths = [0]
    num_bytes = total = 0
    for text in documents:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        pieces.append(np.array([bos, *ids, eos], dtype=np.int32))
        lengths.append(len(pieces[-1]))
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
        total += len(pieces[-1])
        if 0 < tokens <= total:
            break
    if not pieces:
        raise DataError("--data holds no document: give a text")
    tokens_of_all, offsets = np.concatenate(pieces), np.cumsum(lengths)
    fingerprint = hashlib.sha256(tokens_of_all.tobytes() + offsets.tobytes()).hexdigest()
    return TokenStore(tokens_of_all, offsets, num_bytes, fingerprint)
