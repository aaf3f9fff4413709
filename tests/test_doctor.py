"""The doctor: what it tells of a healthy place, and that it notices each of the things that keep ranks apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sparsek_dist.cli import main
from sparsek_dist.commands.doctor_checks import Facts, inspect, judge
from sparsek_dist.parallel import links, network
from sparsek_dist.parallel.rendezvous import Ranks
from tests.distributed import run_distributed

GIB = 2**30
HEALTHY = Facts(
    rank=0,
    host="node0",
    local_rank=0,
    local_size=2,
    versions={"python": "3.12.3", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "cuda": "13.0"},
    code="0123456789ab",
    devices=["H200 140 GiB", "H200 140 GiB"],
    gpu_id=None,
    gpu_free=0.99,
    driver="580.1",
    memory_free=64 * GIB,
    disk_free=100 * GIB,
    shared_memory_free=8 * GIB,
    open_files=65536,
    threads=8,
    cores=8,
)


def _cluster(**other: object) -> list[Facts]:
    """Four ranks on two hosts; what is given is so on the last rank only."""
    ranks = [
        replace(HEALTHY, rank=rank, local_rank=rank % 2, host=f"node{rank // 2}", gpu_id=str(rank)) for rank in range(4)
    ]
    return [*ranks[:3], replace(ranks[3], **other)]  # type: ignore[arg-type]


def test_a_healthy_cluster_passes():
    findings = judge(_cluster(), 4)
    assert [finding.verdict for finding in findings] == ["ok"] * len(findings)
    assert not any(finding.cure or finding.exit_code for finding in findings)
    found = {finding.check: finding.found for finding in findings}
    assert found["ranks"] == "4 on 2 hosts: node0 (2), node1 (2)"
    assert found["devices"] == "4 x H200 140 GiB"
    assert found["memory"].startswith("32.0 GiB free per process")


AILMENTS: dict[str, tuple[dict[str, object], str, int, str]] = {
    "torch": (
        {"versions": HEALTHY.versions | {"torch": "2.12.0"}},
        "versions",
        6,
        "torch 2.13.0 on node0 node1, torch",
    ),
    "cuda": ({"versions": HEALTHY.versions | {"cuda": None}}, "versions", 6, "none on node1"),
    "sources": ({"code": "ffffffffffff"}, "sources", 6, "ffffffffffff on node1"),
    "crowded": ({"local_rank": 2, "local_size": 3}, "devices", 2, "node1 runs 3 processes and shows 2 GPUs"),
    "shared": ({"gpu_id": "2"}, "devices", 2, "ranks 2, 3 on node1 share one GPU"),
    "no GPU": ({"devices": []}, "devices", 6, "no GPU on node1"),
    "mixed": ({"devices": ["A100 80 GiB"] * 2}, "devices", 0, "A100 80 GiB on node1"),
    "busy": ({"gpu_free": 0.4}, "devices", 0, "only 40% free on node1"),
    "driver": ({"driver": "570.2"}, "GPU driver", 0, "570.2 on node1"),
    "memory": ({"memory_free": 3 * GIB}, "memory", 0, "1.5 GiB free per process on node1"),
    "disk": ({"disk_free": 2 * GIB}, "disk", 0, "2.0 GiB free on node1"),
    "shm": ({"shared_memory_free": 64 << 20}, "/dev/shm", 0, "0.1 GiB free on node1"),
    "files": ({"open_files": 256}, "open files", 0, "256 allowed on node1"),
    "threads": ({"threads": 16}, "threads", 0, "16 per process, for 8 cores on node1"),
    "name": ({"local_rank": 0, "host": "node0"}, "ranks", 0, "4 on 2 hosts"),
}


@pytest.mark.parametrize("ailment", AILMENTS)
def test_each_ailment_is_told_with_its_cure(ailment):
    change, check, exit_code, told = AILMENTS[ailment]
    wrong = [finding for finding in judge(_cluster(**change), 4) if finding.verdict != "ok"]
    assert [finding.check for finding in wrong] == [check]
    assert wrong[0].exit_code == exit_code and wrong[0].verdict == ("FAIL" if exit_code else "warn")
    assert wrong[0].cure
    assert told.removesuffix(", torch") in wrong[0].found


def test_silent_ranks_are_named():
    finding = judge(_cluster()[:2], 4)[0]
    assert finding.exit_code == 6 and "silent: 2, 3" in finding.found and finding.cure


def test_the_digest_follows_the_sources(monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(
        "sparsek_dist.commands.doctor_checks.sparsek_kernels", SimpleNamespace(__file__=str(package / "__init__.py"))
    )
    digests = set()
    for text in ("x = 1\n", "x = 2\n"):
        (package / "__init__.py").write_text(text)
        digests.add(inspect(Ranks(), tmp_path).code)
    assert len(digests) == 2


# --- as a user starts it ---


def _start(rank: int, world_size: int, port: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """One rank, as on a host of its own."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "sparsek_dist", "doctor", *arguments],
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors


def test_alone(tmp_path, capsys):
    before = dict(os.environ)
    assert main(["doctor", "--folder", str(tmp_path / "runs")]) == 0
    assert dict(os.environ) == before, "it would pass for a launcher of whatever runs next in this process"
    told = capsys.readouterr().out
    assert "verdict: ready to train, 1 process on 1 host" in told
    assert "writable" in told and "FAIL" not in told
    assert not list((tmp_path / "runs").iterdir())


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--folder", str(tmp_path / "file" / "runs")]) == 2
    told = capsys.readouterr().out
    assert "FAIL" in told and "verdict: not ready (run folder)" in told and "use another run.root" in told


@pytest.mark.parametrize("timeout", ["0", "-1", "nan"])
def test_a_time_limit_is_needed(timeout, capsys):
    assert main(["doctor", "--timeout", timeout]) == 2
    assert capsys.readouterr().err.startswith("error: --timeout")


def test_two_hosts_that_share_no_folder(tmp_path):
    """All other rows are as they should be: the links are timed, and both ranks end with the same code."""
    port = _free_port()
    ranks = [_start(rank, 2, port, "--folder", str(tmp_path / f"runs-{rank}")) for rank in range(2)]
    (code, told, _), (other_code, other_told, _) = map(_end, ranks)
    assert code == other_code == 6
    assert not other_told
    assert "verdict: not ready (run folder)" in told
    assert "mount one shared folder" in " ".join(told.split())
    assert all(f"links, {size}" in told for size in ("4 KiB", "1 MiB", "16 MiB"))
    assert not list((tmp_path / "runs-0").iterdir()) and not list((tmp_path / "runs-1").iterdir())


def test_links_that_do_not_work(tmp_path):
    port = _free_port()
    common = ("--folder", str(tmp_path), "--timeout", "6")
    ranks = [_start(0, 2, port, *common), _start(1, 2, port, *common, GLOO_SOCKET_IFNAME="no-such-card")]
    (code, told, _), (other_code, _, _) = map(_end, ranks)
    assert code == other_code == 6
    assert "verdict: not ready (links)" in told
    assert "GLOO_SOCKET_IFNAME" in told


def test_a_rank_that_never_comes(tmp_path):
    code, told, _ = _end(_start(0, 2, _free_port(), "--folder", str(tmp_path), "--timeout", "1"))
    assert code == 6
    assert "silent: 1" in told and "verdict: not ready (ranks)" in told


@pytest.mark.parametrize(
    ("address", "told"), [("127.0.0.1", "refuses: rank 0 was not started"), ("no-such-host.invalid", "not resolve")]
)
def test_rank_0_that_cannot_be_reached(address, told):
    code, _, errors = _end(_start(1, 2, _free_port(), "--timeout", "1", MASTER_ADDR=address))
    assert code == 6
    assert errors.splitlines()[-1].startswith("rank 1: rank 1 on ") and told in errors.splitlines()[-1]


# --- links and interfaces ---


def _measure(rank: int, world_size: int) -> tuple[list[links.Timing], str]:
    """Once as it is, and once with a link that damages data."""
    timings = links.measure_links(torch.device("cpu"))
    deliver: Callable[..., object] = dist.all_gather

    def flip(parts, mine):
        deliver(parts, mine)
        parts[0][-1] += 1

    dist.all_gather = flip
    try:
        links.measure_links(torch.device("cpu"))
    except RuntimeError as error:
        return timings, str(error)
    finally:
        dist.all_gather = deliver
    return timings, "not noticed"


def test_every_pair_of_neighbours_is_timed_and_damage_noticed():
    told = run_distributed(_measure, 3)
    for timings, damage in told:
        assert [timing.num_bytes for timing in timings] == list(links.NUM_BYTES["cpu"])
        assert all(timing.all_gather > 0 for timing in timings)
        assert damage == "gloo or NCCL delivered other data than rank 0 sent"
    assert [sorted(timings[0].exchange) for timings, _ in told] == [[1], [0, 2], [1]]


ROUTES = {"10.0.0.9": "10.0.0.1", "node0": "127.0.1.1", "localhost": "127.0.0.1", network.ELSEWHERE: "10.0.0.1"}
CARDS = {"lo": ["127.0.0.1", "::1"], "eth7": ["10.0.0.1", "fe80::1%eth7"]}


@pytest.mark.parametrize(
    ("address", "interface"), [("10.0.0.9", "eth7"), ("localhost", "lo"), ("node0", "eth7"), ("nowhere", None)]
)
def test_interface(monkeypatch, address, interface):
    """`node0` stands for this host's own name, which many an /etc/hosts turns into 127.0.1.1."""
    cards = {name: [SimpleNamespace(address=address) for address in own] for name, own in CARDS.items()}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(network, "_source_address", lambda address, port: ROUTES.get(address))
    assert network.interface_towards(address, 29500) == interface


def test_own_name_without_another_network_is_this_host(monkeypatch):
    cards = {"lo": [SimpleNamespace(address="127.0.0.1")]}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(network, "_source_address", lambda address, port: {"node0": "127.0.1.1"}.get(address))
    assert network.interface_towards("node0", 29500) == "lo"


def test_the_real_route_to_this_machine():
    assert network.interface_towards("127.0.0.1", 29500) == network.interface_towards("localhost", 29500) is not None
    assert Path("/sys/class/net/lo").exists() is False or network.interface_towards("127.0.0.1", 0) == "lo"
