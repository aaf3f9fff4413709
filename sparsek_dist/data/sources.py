"""A corpus name to a `datasets.Dataset` of documents."""

from __future__ import annotations

import glob
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
from datasets.exceptions import DatasetsError

# The HTTP library's base error, under the name by which every version of huggingface_hub knows it.
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from sparsek_dist.config import DataConfig
from sparsek_dist.data import readers
from sparsek_dist.errors import ConfigError, DataError, SparsekError

logger = logging.getLogger(__name__)

STDLIB = "python-stdlib"
Kind = Literal["stdlib", "text", "json", "parquet", "hub"]
_SUFFIXES: dict[str, Kind] = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """What `data.path` stands for. Files are sorted, so that every machine reads them in the same order."""

    kind: Kind
    files: tuple[str, ...] = ()

    def states(self) -> list[readers.FileState]:
        """Path, size and time of change of every file."""
        stats = [(path, Path(path).stat()) for path in self.files]
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def load_documents(data: DataConfig, *, progress: bool = False) -> datasets.Dataset:
    """The documents of a corpus, in the order of their source.

    Args:
        data: `path` and `column` say what to read; copies of local files that `datasets` makes lie below `cache`.
        progress: whether `datasets` may draw its bars on stderr.

    Returns:
        A dataset with the one column `text`. Documents of nothing but white space are left out and counted in a log.

    Raises:
        ConfigError: `data.path` looks like a file and is none, or `data.column` does not exist.
        DataError: what is there cannot be read as text, or is empty.
    """
    source = locate(data.path)
    with _bars(progress):
        documents = _from_hub(data) if source.kind == "hub" else _from_files(source, data)
        return _with_content(documents, data.path)


def texts(documents: datasets.Dataset) -> Iterator[str]:
    """The column `text`, a few rows in memory at a time."""
    for rows in documents.iter(batch_size=16):
        assert isinstance(rows, dict)
        yield from rows["text"]


def source_identity(data: DataConfig) -> str:
    """A string that changes when the documents do: real paths, sizes, times of change; or versions and revisions."""
    source = locate(data.path)
    if source.kind == "hub":
        with _bars(False):
            # Derived by `datasets` from the repository's revision and the builder's settings.
            return json.dumps([source.kind, data.path, _from_hub(data)._fingerprint])
    python = sys.version if source.kind == "stdlib" else ""
    return json.dumps([source.kind, python, source.states()])


def locate(path: str) -> Source:
    """Decides what `path` names, without reading it: the standard library, local files, or else a hub id."""
    if path == STDLIB:
        modules = _files_below(Path(sysconfig.get_paths()["stdlib"]), _NOT_LIBRARY)
        return Source("stdlib", tuple(sorted(str(file) for file in modules if file.suffix == ".py")))
    local = Path(path).expanduser() if path.startswith("~/") else Path(path)
    if local.is_dir():
        return _same_kind(path, list(_files_below(local)), is_folder=True)
    if local.exists():
        return _same_kind(path, [local])
    if glob.has_magic(path):
        # Path.glob takes relative patterns only.
        found = map(Path, glob.glob(str(local), recursive=True))  # noqa: PTH207
        return _same_kind(path, [file for file in found if file.is_file()])
    # A hub id is `name` or `owner/name`; a missing file must not become a question to the network.
    if path.startswith((os.sep, "./", "../", "~")) or path.count("/") > 1 or Path(path).suffix in _SUFFIXES:
        raise _no_files(path)
    return Source("hub")


def _same_kind(path: str, files: list[Path], *, is_folder: bool = False) -> Source:
    readable = sorted(file.resolve() for file in files if file.suffix in _SUFFIXES)
    if not readable and is_folder:
        raise DataError(f"data.path = {path!r} holds no file that ends in {', '.join(_SUFFIXES)}: add some")
    if not readable:
        raise _no_files(path)
    if len(readable) < len(files):
        logger.warning("%s: %d of %d files ignored for their names", path, len(files) - len(readable), len(files))
    kinds = sorted({_SUFFIXES[file.suffix] for file in files if file.suffix in _SUFFIXES})
    if len(kinds) > 1:
        raise ConfigError(f"data.path = {path!r} mixes {' and '.join(kinds)} files: choose one kind, as in '*.jsonl'")
    return Source(kinds[0], tuple(map(str, readable)))


def _no_files(path: str) -> ConfigError:
    return ConfigError(
        f"data.path = {path!r} names no readable file: give a file, folder or glob of .txt, .jsonl, .json or .parquet "
        f"files that exists, a hub id, or {STDLIB}"
    )


def _files_below(root: Path, skip: Set[str] = frozenset()) -> Iterator[Path]:
    """Every file in a folder and its folders, but for hidden ones and folders named in `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _from_files(source: Source, data: DataConfig) -> datasets.Dataset:
    if source.kind in ("stdlib", "text") and data.column != "text":
        raise readers.missing_column(data.column, ["text"])
    copies = str(Path(data.cache) / f"documents-{readers.VERSION}")
    try:
        if source.kind == "parquet":
            return _text_column(datasets.Dataset.from_parquet(list(source.files), cache_dir=copies), data)
        rows = {"stdlib": readers.source_rows, "text": readers.text_rows, "json": readers.json_rows}[source.kind]
        keywords = {"files": source.states()} | ({"column": data.column} if source.kind == "json" else {})
        features = datasets.Features({"text": datasets.Value("large_string")})
        return datasets.Dataset.from_generator(rows, features=features, cache_dir=copies, gen_kwargs=keywords)
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, SparsekError):
            raise
        # `datasets` wraps what a reader raised, with a message of its own that names neither file nor line.
        reason = error.__cause__ or error
        if isinstance(reason, SparsekError):
            raise reason from None
        raise DataError(f"data.path = {data.path!r} cannot be read: {type(reason).__name__}: {reason}") from error


def _from_hub(data: DataConfig) -> datasets.Dataset:
    try:
        documents = datasets.load_dataset(data.path, split="train")
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data.path = {data.path!r} is no local file, and its split 'train' cannot be loaded from the hub: "
            f"check the spelling, the network and HF_HUB_OFFLINE, or give a local file; {type(error).__name__}: {error}"
        ) from error
    assert isinstance(documents, datasets.Dataset)
    return _text_column(documents, data)


def _text_column(documents: datasets.Dataset, data: DataConfig) -> datasets.Dataset:
    if data.column not in documents.column_names:
        raise readers.missing_column(data.column, documents.column_names)
    documents = documents.select_columns([data.column])
    kind = getattr(documents.features[data.column], "dtype", type(documents.features[data.column]).__name__)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{data.path}: {data.column!r} (data.column) is {kind} from row 0 on, not text: choose another")
    return documents if data.column == "text" else documents.rename_column(data.column, "text")


def _with_content(documents: datasets.Dataset, path: str) -> datasets.Dataset:
    kept: list[int] = []
    row = 0
    for text in texts(documents):
        if text is None:
            raise DataError(f"data.path = {path!r}: row {row} of data.column is null, not text: mend or remove it")
        if text and not text.isspace():
            kept.append(row)
        row += 1
    if not kept:
        raise DataError(
            f"data.path = {path!r} holds no text: all of its {row} documents are empty; give some with text"
        )
    if len(kept) == row:
        return documents
    logger.warning("%s: %d of %d documents are empty and left out", path, row - len(kept), row)
    return documents.select(kept)


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Turns the bars of `datasets` off, and back on where they were on."""
    hide = not progress and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
