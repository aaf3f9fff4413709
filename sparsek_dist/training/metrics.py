"""The numbers of a run: metrics.jsonl, one line per step, and TensorBoard. The only importer of TensorBoard."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Writes scalars and figures of one run; on ranks other than the first it writes nothing.

    metrics.jsonl is the record: complete, and free of steps that a resumed run takes again. TensorBoard shows it.
    """

    def __init__(self, folder: Path, *, start_step: int = 0, enabled: bool = True) -> None:
        """Continues after `start_step`: what an earlier attempt wrote about later steps is dropped.

        Args:
            folder: the run's folder; it must exist.
            start_step: optimizer steps that the loaded checkpoint holds; 0 for a fresh run.
            enabled: False on all ranks but the first.
        """
        self._lines = self._board = None
        if not enabled:
            return
        path = folder / METRICS_FILE
        _drop_after(path, start_step)
        # Line buffered: after a crash the file ends with a whole line.
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        # Of events at and after purge_step TensorBoard shows only the newer ones.
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start_step + 1)

    @classmethod
    def evaluation(cls, folder: Path, name: str) -> MetricsLog:
        """TensorBoard alone, for what is measured after training, or beside it.

        Args:
            folder: the run's folder.
            name: of a folder of its own below tensorboard/. TensorBoard shows it as one more run; in the training's
                folder it would turn from a file that training still writes to.
        """
        log = cls(folder, enabled=False)
        log._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER / name))
        return log

    def step(self, step: int, values: dict[str, float | int]) -> None:
        """One line of metrics.jsonl; the same values as TensorBoard scalars. What is not finite is null in JSON."""
        if self._lines is None:
            return
        record = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        for name, value in values.items():
            # TensorBoard groups by what stands before the slash: training curves share one panel.
            self.scalar(name if "/" in name else f"train/{name}", value, step)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve."""
        if self._board is not None:
            self._board.add_scalar(tag, value, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """One matplotlib figure in TensorBoard, which closes it."""
        if self._board is not None:
            self._board.add_figure(tag, figure, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on the GPU where there is one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_after(path: Path, last_step: int) -> None:
    """Keeps the lines of steps up to `last_step`; a line cut short by a crash can only be of a later one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    replacement = path.with_name(path.name + ".new")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)


def _json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
