"""What `sparsek doctor` looks at on every host, and what it thinks of it.

`inspect` needs no other rank; `judge` compares what all of them found. Limits are chosen so that a plain laptop passes.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import sparsek_dist
import sparsek_kernels
from sparsek_dist.errors import ConfigError, PeerError
from sparsek_dist.parallel.rendezvous import Ranks
from sparsek_dist.training.run_folder import environment

GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED_MEMORY = 2 * GIB, 5 * GIB, GIB
"""Free bytes per process, in the run folder, and in /dev/shm, below which a run is likely to fail."""

FEW_FILES = 1024
"""Open files that a process may have: data files, connections to every rank, logs."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    found: str
    cure: str = ""
    """What to do; empty if nothing."""
    exit_code: int = 0
    """0 unless training would fail; otherwise as in errors.py."""

    @property
    def verdict(self) -> str:
        if self.exit_code:
            return "FAIL"
        return "warn" if self.cure else "ok"


@dataclass(frozen=True)
class Facts:
    """What one rank knows by itself. Plain data: it travels as JSON."""

    rank: int
    host: str
    local_rank: int
    local_size: int
    versions: dict[str, str | None]
    code: str
    """Digest of the sources: two hosts with one commit may still differ in what was edited since."""
    devices: list[str]
    """Name and memory of each visible GPU."""
    gpu_id: str | None
    """Tells this rank's GPU from all others in the world."""
    gpu_free: float
    """Share of the memory of this rank's GPU that is free; 1 without a GPU."""
    driver: str | None
    memory_free: int
    disk_free: int
    shared_memory_free: int
    open_files: int
    threads: int
    cores: float
    """Cores that this process has for itself."""


def inspect(ranks: Ranks, folder: Path) -> Facts:
    """Looks at this process and its host; starts nothing."""
    known = environment([])
    free, gpu_id = 1.0, None
    if torch.cuda.is_available() and ranks.local_rank < torch.cuda.device_count():
        available, total = torch.cuda.mem_get_info(ranks.local_rank)
        free = available / total
        gpu_id = str(torch.cuda.get_device_properties(ranks.local_rank).uuid)
    return Facts(
        rank=ranks.rank,
        host=socket.gethostname(),
        local_rank=ranks.local_rank,
        local_size=ranks.local_size,
        versions={"python": known["python"], **known["packages"], "cuda": known["cuda"]},
        code=_digest_of_sources(),
        devices=[_gpu_name(index) for index in range(torch.cuda.device_count())],
        gpu_id=gpu_id,
        gpu_free=free,
        driver=_gpu_driver(),
        memory_free=psutil.virtual_memory().available,
        disk_free=shutil.disk_usage(_existing(folder)).free,
        shared_memory_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=torch.get_num_threads(),
        cores=_own_cores(ranks.local_size),
    )


def judge(everyone: list[Facts], world_size: int) -> list[Finding]:
    """One finding per check, over the ranks that came."""
    return [
        _ranks(everyone, world_size),
        _versions(everyone),
        _code(everyone),
        _devices(everyone),
        _driver(everyone),
        _memory(everyone),
        _threads(everyone),
        _room(everyone, "disk", lambda facts: facts.disk_free, LITTLE_DISK, "free some, or use another run.root"),
        _room(
            # Only processes of one host speak through it.
            [facts for facts in everyone if facts.local_size > 1],
            "/dev/shm",
            lambda facts: facts.shared_memory_free,
            LITTLE_SHARED_MEMORY,
            "NCCL passes data through it. In Docker: --shm-size=8g; in Kubernetes: an emptyDir of medium Memory",
        ),
        _open_files(everyone),
    ]


def _ranks(everyone: list[Facts], world_size: int) -> Finding:
    hosts = _by(everyone, lambda facts: facts.host)
    found = f"{len(everyone)} on {_hosts(len(hosts))}: " + ", ".join(
        f"{host} ({len(ranks)})" for host, ranks in sorted(hosts.items())
    )
    missing = sorted(set(range(world_size)) - {facts.rank for facts in everyone})
    if missing:
        found += f"; silent: {', '.join(map(str, missing))}"
        cure = "look at what those ranks printed; start them with the same address and port of rank 0"
        return Finding("ranks", found, cure, PeerError.exit_code)
    leaders = [facts.host for facts in everyone if facts.local_rank == 0]
    if len(set(leaders)) < len(leaders):
        return Finding("ranks", found, "give every host a name of its own: logs and mpirun tell them apart by it")
    return Finding("ranks", found)


def _versions(everyone: list[Facts]) -> Finding:
    differing = []
    for name in sorted({name for facts in everyone for name in facts.versions}):
        values = _by(everyone, lambda facts, name=name: facts.versions.get(name) or "none")  # type: ignore[misc]
        if len(values) > 1:
            differing.append(f"{name} " + _who(values))
    if differing:
        cure = "install with the same constraints.txt on every host, or use one image"
        return Finding("versions", "; ".join(differing), cure, PeerError.exit_code)
    shown = {name: everyone[0].versions[name] for name in ("python", "torch", "deepspeed", "transformers", "cuda")}
    return Finding("versions", ", ".join(f"{name} {version}" for name, version in shown.items() if version))


def _code(everyone: list[Facts]) -> Finding:
    values = _by(everyone, lambda facts: facts.code)
    if len(values) > 1:
        return Finding("sources", _who(values), "check the same commit out on every host", PeerError.exit_code)
    return Finding("sources", everyone[0].code)


def _devices(everyone: list[Facts]) -> Finding:
    crowded = [facts for facts in everyone if facts.devices and facts.local_rank >= len(facts.devices)]
    if crowded:
        facts = crowded[0]
        found = f"{facts.host} runs {facts.local_size} processes and shows {len(facts.devices)} GPUs"
        return Finding("devices", found, "start one process per GPU (slots= in the hostfile)", ConfigError.exit_code)
    shared = [group for gpu, group in _by(everyone, lambda facts: facts.gpu_id).items() if gpu and len(group) > 1]
    if shared:
        found = f"ranks {', '.join(str(facts.rank) for facts in shared[0])} on {_names(shared[0])} share one GPU"
        cure = "let the launcher set LOCAL_RANK for each process, and show every process all GPUs of its host"
        return Finding("devices", found, cure, ConfigError.exit_code)
    kinds = _by(everyone, lambda facts: facts.devices[facts.local_rank] if facts.devices else "no GPU")
    if len(kinds) > 1:
        if "no GPU" in kinds:
            cure = (
                "see nvidia-smi and CUDA_VISIBLE_DEVICES there: ranks with and without GPU cannot speak to each other"
            )
            return Finding("devices", _who(kinds), cure, PeerError.exit_code)
        return Finding("devices", _who(kinds), "all ranks wait for the slowest and the smallest: use hosts of one kind")
    found = f"{len(everyone)} x {next(iter(kinds))}"
    busy = [facts for facts in everyone if facts.gpu_free < 0.9]
    if busy:
        found += f"; only {min(facts.gpu_free for facts in busy):.0%} free on {_names(busy)}"
        return Finding("devices", found, "another process holds their memory: see nvidia-smi there")
    return Finding("devices", "no GPU: CPUs and gloo" if not everyone[0].devices else found)


def _driver(everyone: list[Facts]) -> Finding:
    values = _by(everyone, lambda facts: facts.driver or "none")
    if len(values) > 1:
        return Finding("GPU driver", _who(values), "install one driver on all hosts before you measure anything")
    return Finding("GPU driver", everyone[0].driver or "none")


def _memory(everyone: list[Facts]) -> Finding:
    return _room(
        everyone,
        "memory",
        lambda facts: facts.memory_free // max(1, facts.local_size),
        LITTLE_MEMORY,
        "end other programs, or start fewer processes per host",
        " per process",
    )


def _threads(everyone: list[Facts]) -> Finding:
    busiest = max(everyone, key=lambda facts: facts.threads / facts.cores)
    found = f"{busiest.threads} per process, for {busiest.cores:g} cores" + (
        f" on {busiest.host}" if len(everyone) > 1 else ""
    )
    if busiest.threads >= busiest.cores + 1:
        cure = "set OMP_NUM_THREADS to cores / processes on every host (launch/env.sh does); mpirun: --bind-to none"
        return Finding("threads", found, cure)
    return Finding("threads", found)


def _room(
    facts: list[Facts], check: str, free: Callable[[Facts], int], least: int, cure: str, unit: str = ""
) -> Finding:
    if not facts:
        return Finding(check, "not used")
    poorest = min(facts, key=free)
    found = f"{free(poorest) / GIB:.1f} GiB free{unit}" + (f" on {poorest.host}" if len(facts) > 1 else "")
    return Finding(check, found, cure if free(poorest) < least else "")


def _open_files(everyone: list[Facts]) -> Finding:
    poorest = min(everyone, key=lambda facts: facts.open_files)
    found = f"{poorest.open_files:,} allowed"
    if poorest.open_files < max(FEW_FILES, 4 * len(everyone)):
        return Finding("open files", f"{found} on {poorest.host}", "raise it there: ulimit -n 65536")
    return Finding("open files", found)


def _by(everyone: Iterable[Facts], key: Callable[[Facts], Any]) -> dict[Any, list[Facts]]:
    groups = defaultdict(list)
    for facts in everyone:
        groups[key(facts)].append(facts)
    return dict(groups)


def _who(groups: dict[Any, list[Facts]]) -> str:
    return ", ".join(f"{value} on {_names(facts)}" for value, facts in groups.items())


def _names(facts: Iterable[Facts]) -> str:
    return " ".join(sorted({one.host for one in facts}))


def _hosts(count: int) -> str:
    return f"{count} host" if count == 1 else f"{count} hosts"


def _gpu_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} {properties.total_memory / GIB:.0f} GiB"


def _gpu_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return ", ".join(sorted(set(result.stdout.split())))


def _own_cores(local_size: int) -> float:
    """mpirun and Slurm may bind every process to cores of its own; otherwise those of a host share them."""
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return allowed if allowed * local_size <= total else round(allowed / local_size, 1)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for package in (sparsek_dist, sparsek_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
