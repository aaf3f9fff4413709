"""What the benchmarks share: what they say about where they ran, how they time, and how they save."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, width."""

    h: int
    g: int
    d: int

    @property
    def name(self) -> str:
        return f"h{self.h} g{self.g} d{self.d}"


def add_options(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Those that every benchmark of a GPU takes."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which nothing more is begun")
    parser.add_argument("--commit", help="to be written into the results where there is no git")


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command: what a figure needs beside it."""
    gpu = device == "cuda"
    return {
        "name": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit or _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def in_words(machine: dict[str, Any]) -> str:
    driver = f" (driver {machine['driver']})" if machine["driver"] else ""
    return f"{machine['name']}{driver}, torch {machine['torch']}, commit {machine['commit']}"


def milliseconds(work: Callable[[], object], device: str, budget: float = 300.0) -> float:
    """Median over 3 to 20 runs, about `budget` milliseconds together, after one to warm up."""
    work()
    if device != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(3):
            work()
            stamps.append(time.perf_counter())
        return 1e3 * statistics.median(later - earlier for earlier, later in itertools.pairwise(stamps))

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return begin, end

    pairs = [timed()]
    torch.cuda.synchronize()
    pairs += [timed() for _ in range(max(2, min(19, int(budget / pairs[0][0].elapsed_time(pairs[0][1])))))]
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def save(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file in one go: what was saved before survives whatever ends this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]
