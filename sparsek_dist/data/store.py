"""A tokenised split on disk: one flat array of tokens, the offsets of its documents, and an index that proves both."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_dist.errors import DataError

INDEX = "index.json"
HASH_CHECK_BYTES = 1 << 30
"""Folders up to this size are hashed whenever they are opened: about 1 s a GiB. Larger ones have only sizes checked."""


@dataclass(frozen=True)
class TokenStore:
    """The documents of one split, each `[bos] + tokens + [eos]`, one after the other.

    Attributes:
        tokens: uint16 or int32 [num_tokens], mapped from disk and read-only.
        offsets: int64 [num_documents + 1]; document i is `tokens[offsets[i] : offsets[i + 1]]`.
        num_bytes: UTF-8 bytes of the text of all documents.
        fingerprint: a hash of all of the above; equal on every machine that holds the same tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    fingerprint: str

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return int(self.tokens[-1])


class StoreWriter:
    """Writes one split, document by document; in memory it holds only the documents' lengths."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        """Files `<name>.tokens` and `<name>.offsets` are made in `folder`; ids below `vocab_size` are taken."""
        self._name, self._folder, self._vocab_size = name, folder, vocab_size
        self._dtype = "<u2" if vocab_size <= 1 << 16 else "<i4"
        self._file = (folder / f"{name}.tokens").open("wb")
        self._hash = hashlib.sha256()
        self._lengths = array("q")
        self._num_bytes = 0

    def add(self, tokens: Sequence[int], num_bytes: int) -> None:
        """Appends a document of so many UTF-8 bytes.

        Raises:
            DataError: an id outside the vocabulary, which on a GPU would be an assertion without a name.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise DataError(
                f"data.tokenizer gives ids from {ids.min()} to {ids.max()}, but its vocabulary ends at "
                f"{self._vocab_size - 1}: its files do not belong together, use another copy"
            )
        raw = ids.astype(self._dtype).tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self._lengths.append(len(ids))
        self._num_bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """Flushes both files to the disk and returns the split's entry for the index."""
        _sync(self._file)
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype("<i8")
        with (self._folder / f"{self._name}.offsets").open("wb") as file:
            file.write(offsets.tobytes())
            _sync(file)
        num_tokens = int(offsets[-1])
        entry: dict[str, Any] = {
            "dtype": self._dtype,
            "num_documents": len(self._lengths),
            "num_tokens": num_tokens,
            "num_bytes": self._num_bytes,
            "tokens": {"size": num_tokens * np.dtype(self._dtype).itemsize, "sha256": self._hash.hexdigest()},
            "offsets": {"size": offsets.nbytes, "sha256": hashlib.sha256(offsets.tobytes()).hexdigest()},
        }
        return entry | {"fingerprint": _fingerprint(entry)}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_index(folder: Path, splits: dict[str, dict[str, Any]], made_from: dict[str, Any]) -> None:
    """Writes the index of a folder and flushes file and folder to the disk; `made_from` is for people to read."""
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump({"splits": splits, "made_from": made_from}, file, indent=1)
        _sync(file)
    sync_folder(folder)


def find_fault(folder: Path, names: Sequence[str]) -> str | None:
    """Why the splits `names` in `folder` cannot be used, or None if they are whole."""
    try:
        splits = json.loads((folder / INDEX).read_text(encoding="utf-8"))["splits"]
        entries = {name: splits[name] for name in names}
        files = {f"{name}.{part}": entry[part] for name, entry in entries.items() for part in ("tokens", "offsets")}
        sizes = {file: int(expected["size"]) for file, expected in files.items()}
        for name, entry in entries.items():
            if entry["fingerprint"] != _fingerprint({key: entry[key] for key in entry if key != "fingerprint"}):
                return f"the entry of {name} in {INDEX} was altered"
        for file, size in sizes.items():
            found = (folder / file).stat().st_size
            if found != size:
                return f"{file} has {found} bytes instead of {size}"
        if sum(sizes.values()) <= HASH_CHECK_BYTES:
            for file, expected in files.items():
                with (folder / file).open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() != expected["sha256"]:
                        return f"{file} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{INDEX} cannot be read ({type(error).__name__}: {error})"
    return None


def open_store(folder: Path, name: str) -> TokenStore:
    """Maps one split of a folder in which `find_fault` found none."""
    entry = json.loads((folder / INDEX).read_text(encoding="utf-8"))["splits"][name]
    tokens = np.memmap(folder / f"{name}.tokens", dtype=entry["dtype"], mode="r")
    offsets = np.memmap(folder / f"{name}.offsets", dtype="<i8", mode="r")
    return TokenStore(tokens, offsets, entry["num_bytes"], entry["fingerprint"])


def sync_folder(folder: Path) -> None:
    """Makes names that were created or renamed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fingerprint(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
