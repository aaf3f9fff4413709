"""A run as a user starts it, with the deepspeed launcher, killed in the middle without warning, started again, and
evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsek_dist.cli import main

ROOT = Path(__file__).parent.parent
SETTINGS = """
run: {name: killed, seed: 3}
model: {hidden_size: 16, intermediate_size: 24, num_layers: 2, num_query_heads: 4, num_kv_heads: 2, head_dim: 4}
attention: {num_selected: 6, window: 5}
data: {sequence_length: 64, held_out: 0.2}
parallel: {sequence_degree: 2, zero_stage: 2}
optimizer: {warmup_steps: 2}
train: {steps: 14, save_every: 4, eval_every: 0, eval_sequences: 2, observe_every: 7, log_every: 1}
"""


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Configuration file and overrides of a tiny run on a tiny corpus."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(12):
        (corpus / f"{index}.txt").write_text(
            f"file {index}: " + "to be or not to be, that is the question. " * (8 + index)
        )
    path = tmp_path / "killed.yaml"
    path.write_text(SETTINGS)
    return [str(path), f"data.path={corpus}", f"data.cache={tmp_path / 'cache'}", f"run.root={tmp_path / 'runs'}"]


def _start(settings: list[str], *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [str(ROOT / "launch" / "local.sh"), *settings, *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def _losses(settings: list[str], name: str) -> list[tuple[int, str, str]]:
    root = Path(settings[-1].removeprefix("run.root="))
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], float(r["loss"]).hex(), float(r["grad_norm"]).hex()) for r in records]


def _kill_when(process: subprocess.Popen[str], told: str) -> None:
    """Kills every process of the run without warning, once it says so."""
    assert process.stdout is not None
    deadline = time.monotonic() + 100
    for line in process.stdout:
        if told in line or time.monotonic() > deadline:
            break
    # The ranks are in a session of their own below the launcher: find them by their command line.
    mine = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and entry.joinpath("cmdline").exists() and _runs(entry, process.args[1])
    ]
    assert len(mine) >= 3, "the launcher and two ranks"
    for pid in mine:
        os.kill(pid, signal.SIGKILL)
    process.stdout.read()
    assert process.wait(timeout=30) != 0


def _runs(entry: Path, config: str) -> bool:
    try:
        return config.encode() in (entry / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the ranks through /proc")
def test_killed_run_continues_with_the_same_losses(settings):
    whole = _finish(_start(settings, "run.name=whole"))
    assert "held-out bits per byte" in whole and "sparsek generate" in whole
    _kill_when(_start(settings), "step 10/14")
    assert len(_losses(settings, "killed")) >= 9
    resumed = _finish(_start(settings))
    assert "continuing from" in resumed and "after step 8" in resumed
    assert _losses(settings, "killed") == _losses(settings, "whole")
    _evaluate(Path(settings[-1].removeprefix("run.root=")) / "whole")


def _evaluate(run: Path) -> None:
    """With the launcher, two processes share each context, and one of them says what a single one would say."""
    told = _finish(_start(["eval", str(run)]))
    assert told.count("by context length") == told.count("written: ") == 1
    shared = json.loads((run / "eval.json").read_text())
    assert shared.pop("processes") == (torch.cuda.device_count() or 2)
    assert main(["eval", str(run), "--out", str(run / "alone")]) == 0
    alone = json.loads((run / "alone" / "eval.json").read_text())
    assert alone.pop("processes") == 1 and shared["held_out"] and shared.keys() == alone.keys()
    # In float32 a score may differ in its last bit, and equal tokens, of which this text is full, change places.
    for number in ("loss", "loss_error", "bits_per_byte"):
        assert shared["overall"][number] == pytest.approx(alone["overall"][number], rel=1e-5)
    assert shared["overall"]["targets"] == alone["overall"]["targets"]
    assert shared["trigram_bits_per_byte"] == alone["trigram_bits_per_byte"]
