"""Several processes in one folder: each cell, and each model that others start from, is the work of one of them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock file `path`; the system drops it with the process, whatever ends that.

    Args:
        path: made if it is not there, and left behind: it says nothing by itself.
        wait: until it is free.

    Yields:
        Whether it is ours; always True with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        mine = _taken(file, wait)
        try:
            yield mine
        finally:
            # Said, as a process that was forked meanwhile would hold it on.
            if mine:
                fcntl.flock(file, fcntl.LOCK_UN)


def _taken(file: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
