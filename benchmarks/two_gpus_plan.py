"""What all processes of two_gpus.py are told. Imports nothing, as the process that starts them only waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULT = "two_gpus.json"


@dataclass(frozen=True)
class Plan:
    out: Path
    scratch: str
    """Folder for what nobody keeps."""
    deadline: float
    """On the clock of time.time."""
    parts: tuple[str, ...]
    data: str
    """Corpus of the curves, as in data.path."""
    steps: int
    """Of the curves."""
    patience: float = 60.0
    """Seconds after the deadline for the cell that was begun before it."""
