"""Finished cells, one JSON line each: what makes a study go on after a stop."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quality.cells import Cell
from benchmarks.quality.claims import claimed


class Log:
    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All finished cells. A line that a stop cut short is left out, and its cell counts as not done."""
        if not self.path.is_file():
            return []
        # Only whole lines end in a newline.
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def done(self) -> set[str]:
        return {row["name"] for row in self.rows()}

    def expected_seconds(self, cell: Cell, guess: float) -> float:
        """The longest that a cell of this task and kind took, or `guess`."""
        past = [row["seconds"] for row in self.rows() if (row["task"], row["kind"]) == (cell.task, cell.kind)]
        return max(past, default=guess)

    def add(self, cell: Cell, result: dict[str, Any], scale: str, device: torch.device, *, seconds: float) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        where = {"scale": scale, "device": name, "date": datetime.now(UTC).isoformat(timespec="seconds")} | versions
        # One writer at a time, as what a stop left of a line must not be what another writes.
        with claimed(self.path.with_suffix(".lock"), wait=True):
            self._cut()
            with self.path.open("a") as file:
                file.write(json.dumps(cell.as_row() | where | {"seconds": seconds} | result) + "\n")

    def _cut(self) -> None:
        """Removes what a stop left of a last line."""
        written = self.path.read_bytes() if self.path.is_file() else b""
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            os.truncate(self.path, whole)
