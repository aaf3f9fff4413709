"""A list of every file of a checkpoint with its size and SHA-256, and the check against it.

Neither pickle nor safetensors notices a flipped byte: both load other numbers without a word. And DeepSpeed's files
are pickles, which run code when they are loaded, so they are compared before anything opens them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TypedDict

from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.training.together import gather_objects

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 1 << 22


class Entry(TypedDict):
    size: int
    sha256: str


def hash_files(folder: Path, group: RankGroup) -> dict[str, Entry]:
    """Path relative to `folder` -> entry, for every file; the ranks share the reading, and all get all entries.

    Every file is also flushed to the disk, so that none is listed that a power failure could still lose.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(list_files(folder))[group.rank :: group.size]:
        entries[path] = _entry(folder / path, flush=True)
    return {path: entry for share in gather_objects(entries, group) for path, entry in share.items()}


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Called last: a folder with a manifest is a complete checkpoint."""
    text = json.dumps({"format": FORMAT, "files": dict(sorted(entries.items()))}, indent=1)
    write_durably(folder / MANIFEST, text)
    for current, _, _ in os.walk(folder):
        flush_folder(Path(current))


def find_damage(folder: Path, group: RankGroup, *, below: str = "") -> list[str]:
    """What differs from the manifest, one line each; empty if nothing does. Every rank gets the same answer.

    Args:
        folder: a checkpoint.
        group: the ranks that share the reading.
        below: only files whose path begins with this.
    """
    problems: list[str] = []
    try:
        entries = _read(folder / MANIFEST)
        if group.rank == 0:
            problems += _differences_in_names(set(list_files(folder)), set(entries))
        chosen = [path for path in sorted(entries) if path.startswith(below)]
        for path in chosen[group.rank :: group.size]:
            problems += _differences_in_content(folder / path, path, entries[path])
    except (OSError, ValueError) as error:
        problems.append(f"{MANIFEST} cannot be used: {error}")
    told = [line for share in gather_objects(problems, group) for line in share]
    return list(dict.fromkeys(line for line in told if line.startswith((below, MANIFEST))))


def list_files(folder: Path) -> list[str]:
    """Files below `folder` but for the manifest, as relative paths with forward slashes; links count as files."""
    found = []
    for current, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(current) / name).is_symlink()]
        found += [(Path(current) / name).relative_to(folder).as_posix() for name in files + links]
    return [path for path in found if path != MANIFEST]


def write_durably(path: Path, text: str) -> None:
    """Writes and flushes to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes new names in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Entry]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    entries = content.get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and set(entry) == {"size", "sha256"} for entry in entries.values()
    ):
        raise ValueError("it lists no files")
    return entries


def _differences_in_names(present: set[str], listed: set[str]) -> list[str]:
    missing = [f"{path} is missing" for path in sorted(listed - present)]
    return missing + [f"{path} does not belong to it" for path in sorted(present - listed)]


def _differences_in_content(file: Path, path: str, expected: Entry) -> list[str]:
    if file.is_symlink():
        return [f"{path} is a link"]
    if not file.is_file():
        return [f"{path} is missing"]
    size = file.stat().st_size
    if size != expected["size"]:
        return [f"{path} has {size} bytes instead of {expected['size']}"]
    if _entry(file, flush=False)["sha256"] != expected["sha256"]:
        return [f"{path} has other content than was written"]
    return []


def _entry(file: Path, *, flush: bool) -> Entry:
    digest = hashlib.sha256()
    # Opened for writing only because some systems refuse to flush a file that is not.
    with file.open("r+b" if flush else "rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}
