"""Rows of text from files, read strictly: every fault is reported with its file and its line or byte.

`datasets` has readers for text and JSON too, but they turn CRLF into LF, numbers into strings and dates into time
stamps, and report a bad line without its file. So these generators feed `Dataset.from_generator` instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsek_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Row = dict[str, str]
VERSION = 1
"""Raise it when a reader yields other rows from the same file: `datasets` cannot see that its copy is then stale."""
FileState = tuple[str, int, int]
"""Path, size in bytes and time of change in ns. `datasets` hashes it to tell whether its copy is up to date."""


def text_rows(files: Sequence[FileState]) -> Iterator[Row]:
    """One document per file, line ends as they are, without a byte-order mark.

    Raises:
        DataError: a file that is not UTF-8, with the offset of the first wrong byte.
    """
    for path, _, _ in files:
        yield {"text": _decode(Path(path).read_bytes(), path).removeprefix("\ufeff")}


def source_rows(files: Sequence[FileState]) -> Iterator[Row]:
    """One document per Python module; the few that are not UTF-8 are skipped, counted and named in a warning."""
    skipped: list[str] = []
    for path, _, _ in files:
        try:
            yield {"text": Path(path).read_bytes().decode()}
        except UnicodeDecodeError:
            skipped.append(path)
    if skipped:
        logger.warning("python-stdlib: %d modules that are not UTF-8 skipped: %s", len(skipped), ", ".join(skipped))


def json_rows(files: Sequence[FileState], column: str) -> Iterator[Row]:
    """One document per JSON object: an object a line, or one array of objects per file.

    Raises:
        ConfigError: the first object has no `column`.
        DataError: anything else that is wrong, with its file and line (in an array: its row, counted from 1).
    """
    first = True
    for path, _, _ in files:
        for where, record in _json_records(Path(path)):
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} is a JSON {type(record).__name__}, not an object: write one object per document"
                )
            if first and column not in record:
                raise missing_column(column, list(record))
            first = False
            yield {"text": _text_of(record, column, where)}
    if first:
        raise DataError(f"data.path holds no document: no JSON object in {', '.join(path for path, _, _ in files)}")


def missing_column(column: str, present: Sequence[str]) -> ConfigError:
    """The error for a `data.column` that the corpus does not have."""
    return ConfigError(f"data.column = {column!r} is not in the corpus: use one of {', '.join(present) or '(none)'}")


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every record of a file."""
    with path.open("rb") as file:
        begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if begin.startswith(b"["):
            records = _parse(_decode(file.read(), str(path)).removeprefix("\ufeff"), str(path))
            yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))
            return
        offset = 0
        for number, line in enumerate(file, start=1):
            text = _decode(line, str(path), offset).removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                yield f"{path}, line {number}", _parse(text, f"{path}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, character {error.pos + 1}): mend or remove it") from error


def _text_of(record: dict[str, Any], column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        found = "missing" if column not in record else "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{where}: {column!r} (data.column) is {found}, not text: mend or remove the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column!r} (data.column) holds half of a surrogate pair at character {error.start}, "
            "which UTF-8 cannot write: mend or remove the line"
        ) from error
    return text


def _decode(raw: bytes, path: str, offset: int = 0) -> str:
    """`raw`, which begins at byte `offset` of the file `path`, as text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {raw[error.start]:#04x} at offset {offset + error.start} is not UTF-8: "
            "convert the file (for instance with iconv -t utf-8) or remove it from data.path"
        ) from error
