"""How processes find each other, for each way of starting them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsek_dist.errors import ConfigError, PeerError
from sparsek_dist.parallel.rendezvous import LAUNCHER_VARIABLES, MPI_VARIABLES, Ranks, discover

MPIRUN = Path(sys.executable).parent / "mpirun"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch) -> None:
    for name in (*LAUNCHER_VARIABLES, *MPI_VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch, **values) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "1234"}


def test_alone() -> None:
    assert discover() == Ranks(0, 1, 0, 1, "127.0.0.1", 0, "alone")


@pytest.mark.parametrize("size_name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"], ids=["deepspeed", "torchrun"])
def test_launched(monkeypatch, size_name) -> None:
    _set(monkeypatch, **LAUNCHED, **{size_name: "2"})
    assert discover() == Ranks(3, 4, 1, 2, "host0", 1234, "environment")


def test_launcher_goes_before_mpi(monkeypatch) -> None:
    _set(monkeypatch, **LAUNCHED, OMPI_COMM_WORLD_SIZE="1")
    assert discover().launcher == "environment"


@pytest.mark.parametrize("name", MPI_VARIABLES)
def test_one_process_alone_needs_no_mpi(monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    _set(monkeypatch, **{name: "1"})
    assert discover() == Ranks()
    _set(monkeypatch, **{name: "2"})
    with pytest.raises(PeerError, match="mpi4py cannot be used"):
        discover()


@pytest.mark.parametrize("name", MPI_VARIABLES)
def test_an_mpi4py_of_another_mpi_is_told(monkeypatch, name) -> None:
    """It starts, and takes each process for the only one of its world."""
    other = SimpleNamespace(
        COMM_WORLD=SimpleNamespace(size=1), Get_library_version=lambda: "Other MPI 4.2\nbuilt today"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=other))
    _set(monkeypatch, **{name: "2"})
    with pytest.raises(
        PeerError, match=r"started 2 processes, but mpi4py sees 1: .*\(Other MPI 4\.2\).*--no-binary mpi4py"
    ):
        discover()


@pytest.mark.parametrize("missing", [name for name in LAUNCHED if name not in ("RANK", "WORLD_SIZE")])
def test_half_an_environment(monkeypatch, missing) -> None:
    _set(monkeypatch, **{name: value for name, value in LAUNCHED.items() if name != missing})
    with pytest.raises(ConfigError, match=f"not {missing}.*torchrun"):
        discover()


def test_not_a_number(monkeypatch) -> None:
    _set(monkeypatch, **(LAUNCHED | {"RANK": "first"}))
    with pytest.raises(ConfigError, match="RANK = 'first'"):
        discover()


def test_missing_peer(tmp_path) -> None:
    """In a process of its own, which it leaves with half a process group."""
    result = _python("""
        from datetime import timedelta
        from sparsek_dist.errors import PeerError
        from sparsek_dist.parallel.rendezvous import Ranks, initialize
        try:
            initialize(Ranks(0, 2, 0, 2, "127.0.0.1", 0), timeout=timedelta(seconds=2))
        except PeerError as error:
            print("told:", error)
    """)
    assert "told: rank 0 of 2 did not meet the others at 127.0.0.1:0 within 2 s" in result.stdout, result.stderr


def test_world_of_one_needs_no_launcher() -> None:
    """Nor a compiler: with an empty PATH, DeepSpeed's extension could not be built. The environment stays as it was."""
    result = _python(
        """
        import os
        from datetime import timedelta
        from sparsek_dist.parallel.rendezvous import discover, initialize, shutdown
        import torch
        before = dict(os.environ)
        device = initialize(discover(), timeout=timedelta(seconds=20))
        print(device, torch.distributed.get_world_size(), torch.distributed.get_backend())
        print(sorted(name for name in os.environ if os.environ[name] != before.get(name)))
        shutdown()
        print(torch.distributed.is_initialized(), discover().launcher)
        """,
        PATH="/nowhere",
        MASTER_ADDR="another",
    )
    left = ["GLOO_SOCKET_IFNAME", "LOCAL_RANK"]
    assert result.stdout.splitlines()[-3:] == ["cpu 1 gloo", str(left), "False alone"], result.stderr


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python")
def test_mpi() -> None:
    script = """
        from datetime import timedelta
        from sparsek_dist.parallel.rendezvous import discover, initialize, shutdown
        import torch
        ranks = discover()
        initialize(ranks, timeout=timedelta(seconds=20))
        total = torch.tensor([10.0 ** ranks.rank])
        torch.distributed.all_reduce(total)
        found = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_size, ranks.launcher, total.item())
        print("found", *found, ranks.port > 0, flush=True)
        shutdown()
    """
    result = _python(
        script,
        launcher=[str(MPIRUN), "-n", "2", "--oversubscribe"],
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )
    found = sorted(line for line in result.stdout.splitlines() if line.startswith("found"))
    assert found == ["found 0 2 0 2 mpi 11.0 True", "found 1 2 1 2 mpi 11.0 True"], result.stderr


def _python(script: str, *, launcher: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess:
    lines = script.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return subprocess.run(
        [*(launcher or []), sys.executable, "-c", "\n".join(line[indent:] for line in lines)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )
