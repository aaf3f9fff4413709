"""Training on two hosts, over ssh and over MPI, and what becomes of it when one of them is lost."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.two_hosts import Host, two_hosts, why_not

REASON = why_not()
BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"two hosts on one machine: {REASON}"),
    pytest.mark.timeout(400),
]
needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="two hosts: pdsh is not installed")
needs_mpi = pytest.mark.skipif(
    not (BIN / "mpirun").exists() and shutil.which("mpirun") is None, reason="two hosts: no mpirun"
)

SETTINGS = """
run: {name: lost, seed: 3}
model: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_query_heads: 4, num_kv_heads: 2, head_dim: 4}
attention: {num_selected: 6, window: 5}
data: {sequence_length: 64, held_out: 0.2}
parallel: {sequence_degree: 2, zero_stage: 2, timeout_minutes: 0.3}
optimizer: {warmup_steps: 2}
train: {steps: 100000, save_every: 10, eval_every: 0, eval_sequences: 2, observe_every: 0, log_every: 5}
"""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """What follows `train`, on a tiny corpus."""
    (tmp_path / "corpus").mkdir()
    for index in range(12):
        text = f"file {index}: " + "to be or not to be, that is the question. " * (8 + index)
        (tmp_path / "corpus" / f"{index}.txt").write_text(text)
    (tmp_path / "lost.yaml").write_text(SETTINGS)
    folders = [f"data.path={tmp_path}/corpus", f"data.cache={tmp_path}/cache", f"run.root={tmp_path}/runs"]
    return ["train", str(tmp_path / "lost.yaml"), *folders]


def _hostfile(folder: Path, hosts: tuple[Host, Host], slots: int = 1) -> str:
    path = folder / "hostfile"
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return str(path)


def _lose(victim: Host, survivor: Host, command: list[str], *, unplug: bool, launcher: Host) -> str:
    """Starts a run, takes a host from it after step 30, and returns what was said from then on.

    Within a minute nothing of the run may be left on the other host, and whoever waits for it must hear of the failure.
    """
    run = launcher.start(command, **AS_ROOT)
    assert run.stdout is not None
    said = ""
    while "step 30/" not in said:
        line = run.stdout.readline()
        said += line
        assert line, said
    lost = time.monotonic()
    victim.unplug() if unplug else victim.kill()
    if launcher is survivor:
        said, _ = run.communicate(timeout=60)
        assert run.returncode not in (0, None), said
    while left := survivor.processes():
        assert time.monotonic() - lost < 60, left
        time.sleep(0.2)
    return said


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "runs/lost/metrics.jsonl").read_text().splitlines()]


def _resume(folder: Path, host: Host, command: list[str]) -> None:
    """The same command, with an end a little after the newest checkpoint."""
    checkpoint = int((folder / "runs/lost/checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert checkpoint >= 20
    code, said = host.run([*command, f"train.steps={checkpoint + 5}"], timeout=120, **AS_ROOT)
    assert code == 0, said
    assert f"after step {checkpoint}" in said and "held-out bits per byte" in said
    assert _steps(folder) == list(range(1, checkpoint + 6))


@needs_pdsh
@needs_mpi
def test_a_lost_host_ends_the_run_and_another_launcher_resumes_it(tmp_path, settings):
    """Over ssh until a host is killed; then, with the host back, over MPI from its newest checkpoint."""
    with two_hosts(tmp_path / "first") as hosts:
        command = ["launch/hostfile.sh", _hostfile(tmp_path, hosts), *settings]
        said = _lose(hosts[1], hosts[0], command, unplug=False, launcher=hosts[0])
        assert "error: lost contact with another rank" in said
        assert "start the same command again to continue" in said
    with two_hosts(tmp_path / "second") as hosts:
        _resume(tmp_path, hosts[0], ["launch/mpirun.sh", _hostfile(tmp_path, hosts), *settings])
        assert not hosts[1].processes()


@needs_pdsh
@pytest.mark.slow
def test_a_host_without_power(tmp_path, settings):
    """Nobody closes a connection: the time limit of the collectives and the keep-alives of ssh must notice."""
    with two_hosts(tmp_path / "first") as hosts:
        command = ["launch/hostfile.sh", _hostfile(tmp_path, hosts), *settings]
        said = _lose(hosts[1], hosts[0], command, unplug=True, launcher=hosts[0])
        assert "error: lost contact with another rank" in said and "Timed out" in said
        hosts[1].plug()
        while hosts[1].processes():
            time.sleep(0.2)
        _resume(tmp_path, hosts[0], command)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("unplug", [False, True], ids=["killed", "unplugged"])
def test_mpirun_does_not_end_well_without_a_host(tmp_path, settings, unplug):
    """Open MPI 5.0.11 ends with 0 when a host is killed, and waits for ever for one that is silent."""
    with two_hosts(tmp_path / "first") as hosts:
        command = ["launch/mpirun.sh", _hostfile(tmp_path, hosts), *settings]
        _lose(hosts[1], hosts[0], command, unplug=unplug, launcher=hosts[0])


@needs_pdsh
@pytest.mark.slow
def test_the_host_of_rank_0_and_of_the_launcher(tmp_path, settings):
    with two_hosts(tmp_path / "first") as hosts:
        command = ["launch/hostfile.sh", _hostfile(tmp_path, hosts), *settings]
        _lose(hosts[0], hosts[1], command, unplug=False, launcher=hosts[0])
    assert len(_steps(tmp_path)) >= 30


@needs_pdsh
@pytest.mark.slow
def test_doctor_through_every_launcher(tmp_path):
    """Two processes on each host; the hosts' own names mean 127.0.1.1 to themselves."""
    with two_hosts(tmp_path / "first") as hosts:
        doctor = ["doctor", "--folder", str(tmp_path / "runs")]
        hostfile = _hostfile(tmp_path, hosts, slots=2)
        told = [hosts[0].run([f"launch/{name}.sh", hostfile, *doctor], **AS_ROOT) for name in ("hostfile", "mpirun")]
        place = {"NODES": "2", "SLOTS": "2", "MASTER_ADDR": hosts[0].address}
        nodes = [
            host.start(["launch/no_ssh.sh", *doctor], NODE_RANK=str(rank), **place) for rank, host in enumerate(hosts)
        ]
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
        told += [(max(node.returncode for node in nodes), "".join(outputs))]
    for code, said in told:
        assert code == 0, said
        assert "verdict: ready to train, 4 processes on 2 hosts" in said
        assert "FAIL" not in said


@pytest.mark.slow
def test_doctor_names_links_that_do_not_work(tmp_path):
    """The ranks meet, but gloo is told to speak through each host's own loopback; it would wait for minutes."""
    with two_hosts(tmp_path / "first") as hosts:
        place = {"NODES": "2", "SLOTS": "1", "MASTER_ADDR": hosts[0].address, "GLOO_SOCKET_IFNAME": "lo"}
        command = ["launch/no_ssh.sh", "doctor", "--folder", str(tmp_path / "runs")]
        nodes = [host.start(command, NODE_RANK=str(rank), **place) for rank, host in enumerate(hosts)]
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [6, 6]
    assert "verdict: not ready (links)" in outputs[0]
