"""How processes find each other: started by deepspeed or torchrun, by an MPI launcher, or alone.

`discover` reads who this process is, `initialize` makes the process group, `shutdown` ends it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch

from sparsek_dist.errors import ConfigError, PeerError
from sparsek_dist.parallel.network import interface_towards

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What deepspeed and torchrun set for every process."""

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Set by the launchers of Open MPI, and of MPICH, Intel MPI and (by PMI) Slurm."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index among the processes of this host; chooses the GPU."""
    local_size: int = 1
    """Processes on this host."""
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = 0
    """Port on that host; 0 lets a process that is alone take any."""
    launcher: str = "alone"
    """How the processes were started: `environment`, `mpi` or `alone`."""


def discover() -> Ranks:
    """Who this process is, by whichever launcher started it. No communication but MPI's own.

    Raises:
        ConfigError: if a launcher set only some of its variables.
        PeerError: if MPI started this process but cannot be used from Python, or only by another MPI's rules.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _from_environment()
    # One process alone needs no MPI, which may not even be installed: `srun -n 1 sparsek eval`.
    if any(os.environ.get(name, "1") != "1" for name in MPI_VARIABLES):
        return _from_mpi()
    return Ranks()


def initialize(ranks: Ranks, *, timeout: timedelta, init_method: str | None = None) -> torch.device:
    """Makes the process group (NCCL on GPUs, gloo on CPUs) and returns this process's device.

    Args:
        ranks: from `discover`.
        timeout: how long rendezvous and collectives may wait for a silent rank.
        init_method: a meeting place in the form of torch.distributed, instead of address and port.

    Raises:
        PeerError: if the ranks do not find each other in time.
    """
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        _check_gpu(ranks)
        torch.cuda.set_device(device)
    else:
        _skip_shared_memory_extension()
        _choose_interface(ranks)
    # Its progress messages would drown ours.
    deepspeed.utils.logger.setLevel(logging.WARNING)
    try:
        with _told_to_torch(ranks):
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timeout,
                init_method=init_method,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
    except torch.distributed.DistError as error:
        raise PeerError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.address}:{ranks.port} within "
            f"{timeout.total_seconds():g} s: check that all were started and that this address and port can be "
            f"reached ({str(error).splitlines()[0]})"
        ) from error
    return device


def barrier(group: torch.distributed.ProcessGroup | None = None) -> None:
    """Returns when every rank of the group, or of all, has called it."""
    nccl = torch.distributed.get_backend(group) == "nccl"
    # Not told, NCCL's barrier guesses the GPU from the rank, and says so each time.
    torch.distributed.barrier(group, device_ids=[torch.cuda.current_device()] if nccl else None)


def shutdown() -> None:
    """Ends the process group, if there is one."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


@contextmanager
def _told_to_torch(ranks: Ranks) -> Iterator[None]:
    """The environment that torch's rendezvous reads, which is then as it was found, but for LOCAL_RANK.

    Left there, a program that this one starts, or its own next `discover`, would take itself for one of these ranks.
    """
    values = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.address, ranks.port)
    told = dict(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))
    # DeepSpeed's engine and its ZeRO-3 go on reading LOCAL_RANK, at moments of their own; by itself it starts nothing.
    found = {name: os.environ.get(name) for name in told if name != "LOCAL_RANK"}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in found.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _from_environment() -> Ranks:
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}: start through deepspeed, torchrun "
            "or mpirun, which set all, or unset them to run alone"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdigit():
            raise ConfigError(f"{name} = {os.environ[name]!r} in the environment is no number: let the launcher set it")
        numbers[name] = int(os.environ[name])
    return Ranks(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1),
        address=os.environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        launcher="environment",
    )


def _from_mpi() -> Ranks:
    # DeepSpeed's own discovery needs `hostname -I` to name an address, always takes the same port, and tells local
    # ranks by host names, so that two runs on a host collide and two containers of one name share a GPU.
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PeerError(
            f"an MPI launcher started this process, but mpi4py cannot be used ({error}): install mpi4py for the MPI "
            "of this mpirun, or start through deepspeed or torchrun"
        ) from error
    world = MPI.COMM_WORLD
    started = next(os.environ[name] for name in MPI_VARIABLES if name in os.environ)
    if started != str(world.size):
        # Each process would take itself for the only one, and all would train the same.
        raise PeerError(
            f"an MPI launcher started {started} processes, but mpi4py sees {world.size}: it was built for another MPI "
            f"({MPI.Get_library_version().splitlines()[0]}); build it with this mpirun's mpicc in PATH (pip install "
            "--force-reinstall --no-binary mpi4py mpi4py), or start through deepspeed or torchrun"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    if world.size == 1:
        return Ranks(launcher="mpi")
    names = world.allgather(socket.gethostname())
    meeting = None
    if world.rank == 0:
        meeting = _address_for(names, one_host=host.size == world.size), _free_port()
    address, port = world.bcast(meeting, root=0)
    return Ranks(world.rank, world.size, host.rank, host.size, address, port, "mpi")


def _address_for(hosts: list[str], *, one_host: bool) -> str:
    """The address under which the other hosts reach this one: that of the route to one of them."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    if one_host:
        return "127.0.0.1"
    other = next((name for name in hosts if name != hosts[0]), hosts[-1])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; it only makes the kernel choose the route.
            probe.connect((other, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise PeerError(
            f"host {hosts[0]} finds no route to host {other} ({error}): set MASTER_ADDR to an address of {hosts[0]} "
            "that all hosts can reach"
        ) from error


def _free_port() -> int:
    if "MASTER_PORT" in os.environ:
        return int(os.environ["MASTER_PORT"])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _check_gpu(ranks: Ranks) -> None:
    visible = torch.cuda.device_count()
    if ranks.local_rank >= visible:
        raise ConfigError(
            f"local rank {ranks.local_rank} needs a GPU of its own, but this host shows {visible}: start at most "
            f"{visible} processes per host"
        )


def _choose_interface(ranks: Ranks) -> None:
    """Spares gloo the look-up of this host's own name; what the user has set stands."""
    interface = interface_towards(ranks.address, ranks.port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _skip_shared_memory_extension() -> None:
    """Keeps DeepSpeed from compiling an extension that only speeds up its CPU inference.

    It would be built at the first start, needs g++ and ninja, which users may lack, and fails without them.
    """
    # By its full name: the attribute `deepspeed.comm.torch` is the real torch.
    setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010 - unknown to type checkers
