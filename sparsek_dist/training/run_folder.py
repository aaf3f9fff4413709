"""runs/<name>/: everything about one run in one folder that explains itself.

config.yaml          every setting, as `sparsek train` understood it
environment.json     versions, devices, hosts, commit
metrics.jsonl        one line per step
tensorboard/         the same, as curves and pictures
logs/rank-00000.log  what each rank said
checkpoints/         see training/checkpoint.py
lock                 held while a process trains here
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsek_dist.config import Config
from sparsek_dist.errors import ConfigError
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.settings import to_yaml
from sparsek_dist.training.together import gather_objects, together

CONFIG_FILE = "config.yaml"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "triton", "omegaconf", "numpy", "safetensors")

logger = logging.getLogger(__name__)


@contextmanager
def open_run_folder(folder: Path, mesh: Mesh) -> Iterator[Path]:
    """The run's folder, locked by rank 0 and with a log file per rank, until the context ends.

    Raises:
        ConfigError: if the folder cannot be made, or another process is training in it.
    """
    lock = None
    with together(mesh.world):
        if mesh.is_main:
            try:
                for part in (folder, folder / "logs"):
                    part.mkdir(parents=True, exist_ok=True)
                lock = _acquire(folder / "lock")
            except OSError as error:
                raise ConfigError(f"{folder} cannot be used ({error}): choose another run.root or run.name") from error
    handlers = _log_to(folder / "logs" / f"rank-{mesh.world.rank:05d}.log", console=mesh.is_main)
    try:
        yield folder
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        if lock is not None:
            # Emptied, not deleted: another process may already wait on this very file.
            os.ftruncate(lock, 0)
            os.close(lock)


def describe_run(folder: Path, config: Config, mesh: Mesh) -> None:
    """Writes config.yaml and environment.json. Every rank must call it."""
    devices = gather_objects((socket.gethostname(), _device_name()), mesh.world)
    if mesh.is_main:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(devices), indent=1), encoding="utf-8")


def environment(devices: list[tuple[str, str]]) -> dict[str, Any]:
    """What the numbers of a run depend on besides its settings.

    Args:
        devices: (host, device) of each rank.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "processes": len(devices),
        "hosts": len({host for host, _ in devices}),
        "devices": sorted({device for _, device in devices}),
        "commit": _commit(),
        "command": sys.argv,
    }


def _acquire(path: Path) -> int:
    """An open file with an exclusive lock, which the system frees when its process dies, however it dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ConfigError(
            f"{path.parent} is in use by {holder}: wait for it, stop it, or choose another run.name"
        ) from None
    left_behind = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    if left_behind:
        logger.warning(f"{path.parent} was left without notice by {left_behind}, which is gone")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _log_to(path: Path, *, console: bool) -> list[logging.Handler]:
    """Everything goes to the rank's file; plain words of rank 0 to the console, too."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [to_file]
    if console:
        to_console = logging.StreamHandler(sys.stdout)
        to_console.setFormatter(logging.Formatter("%(message)s"))
        # Other libraries reach the console only with warnings.
        to_console.addFilter(lambda record: record.name.startswith("sparsek") or record.levelno >= logging.WARNING)
        handlers.append(to_console)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    return handlers


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree, with a mark if it was changed since; None outside a repository or without git."""
    source = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
