"""Two hosts on one machine: namespaces with network, addresses, host name, process numbers and sshd of their own.

They share the file system, as the nodes of a cluster do. Everything of a host ends with its first process, so that a
test can lose a host as one loses it in life. Nothing outside of a temporary folder is written: /etc/hosts and /etc/ssh
are covered inside the namespaces only. As on many a Debian machine, a host's own name means 127.0.1.1 to itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("ip", "unshare", "nsenter", "ps", "sshd", "ssh", "ssh-keygen")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

FIRST_PROCESS = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh
mkdir -p /run/sshd
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec "$(command -v sshd)" -D -e
"""

SSHD = """
Port 22
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""

SSH = """
Host *
    IdentityFile {keys}/user
    IdentitiesOnly yes
    UserKnownHostsFile {keys}/known_hosts
    StrictHostKeyChecking yes
    LogLevel ERROR
"""


def why_not() -> str | None:
    """What this machine lacks for two hosts; None if nothing."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [name for name in NEEDED if _which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: openssh-server, iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"cannot make namespaces: {tried.stderr.decode().strip()}"


@dataclass
class Host:
    """One of the two."""

    name: str
    address: str
    starter: subprocess.Popen
    pid: int
    """Of its first process, as seen from outside."""
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Runs a command there, in the root of the repository, with this Python first in the path."""
        process = subprocess.Popen(
            # The working folder is lost on the way into another mount namespace.
            [
                *self._enter("--net", "--uts", "--pid", "--mount", "--ipc"),
                "sh",
                "-c",
                f'cd {ROOT} && exec "$@"',
                "sh",
                *command,
            ],
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                "HOME": os.environ.get("HOME", "/root"),
                "LANG": "C.UTF-8",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, command: Sequence[str], *, timeout: float = 100, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(command, **environment)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def unplug(self) -> None:
        """Takes the network away without a word to anyone, as a power failure does."""
        subprocess.run([*self._enter("--net"), "ip", "link", "set", "eth0", "down"], check=True)

    def plug(self) -> None:
        subprocess.run([*self._enter("--net"), "ip", "link", "set", "eth0", "up"], check=True)

    def processes(self) -> list[str]:
        """Command lines of what runs there, but for its sshd."""
        listed = subprocess.run(
            [*self._enter("--pid", "--mount"), "ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True
        )
        lines = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
        return [line for line in lines if not line.startswith(("ps ", "sshd:", "/usr/sbin/sshd"))]

    def kill(self) -> None:
        """Ends every process there at once, without warning; nothing of the host is left."""
        if self.starter.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.starter.wait(timeout=10)
        for process in self.started:
            process.wait(timeout=10)

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *namespaces]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node0-x and node1-x, with ssh between them; gone when the context ends.

    Args:
        folder: for keys and settings; both hosts see it at the same path.
    """
    keys = folder / "keys"
    keys.mkdir(parents=True)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True, timeout=20)
    (keys / "known_hosts").write_text("* " + (keys / "host.pub").read_text())
    # mpirun leaves files in /tmp under the name of the host and the process number, which begins at 1 every time.
    suffix = uuid.uuid4().hex[:6]
    names = [f"node{index}-{suffix}" for index in range(2)]
    hosts: list[Host] = []
    try:
        for index in range(2):
            hosts.append(_boot(folder / f"node{index}", keys, names, index))
        _connect(*hosts)
        _wait_for_ssh(hosts)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()
        for left in Path("/tmp").glob(f"*.node?-{suffix}.*"):
            shutil.rmtree(left, ignore_errors=True)


def _boot(folder: Path, keys: Path, names: list[str], index: int) -> Host:
    (folder / "ssh").mkdir(parents=True)
    name, address = names[index], ADDRESSES[index]
    other = f"{ADDRESSES[1 - index]} {names[1 - index]}"
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n")
    (folder / "ssh" / "sshd_config").write_text(SSHD.format(keys=keys))
    (folder / "ssh" / "ssh_config").write_text(SSH.format(keys=keys))
    script = FIRST_PROCESS.format(name=name, folder=folder, address=address)
    with (folder / "sshd.log").open("w") as log:
        starter = subprocess.Popen(
            # The namespaces end with the test, even if that is killed.
            [
                "unshare",
                "--net",
                "--uts",
                "--ipc",
                "--pid",
                "--mount-proc",
                "--fork",
                "--kill-child",
                "sh",
                "-ec",
                script,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
    deadline = time.monotonic() + 10
    while not children.read_text().split():
        assert time.monotonic() < deadline and starter.poll() is None, (folder / "sshd.log").read_text()
        time.sleep(0.02)
    return Host(name, address, starter, int(children.read_text().split()[0]))


def _connect(first: Host, second: Host) -> None:
    """A cable with one end in each; made where the first lives, so that this machine's own network never sees it."""
    cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.pid)]
    subprocess.run(["nsenter", "--target", str(first.pid), "--net", *cable], check=True)


def _wait_for_ssh(hosts: list[Host]) -> None:
    deadline = time.monotonic() + 20
    for one, other in (hosts, hosts[::-1]):
        while True:
            code, output = one.run(["ssh", "-o", "ConnectTimeout=2", other.name, "hostname"], timeout=20)
            if code == 0 and output.strip() == other.name:
                break
            assert time.monotonic() < deadline, output
            time.sleep(0.1)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
