"""The benchmarks of a GPU run to their end on a CPU, at tiny sizes: time on GPUs is too dear for their mistakes."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsek_dist.config import AttentionConfig

ROOT = Path(__file__).parent.parent
ON_GPU = ROOT / "benchmarks" / "on_gpu.sh"


def _run(program: str, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What it wrote, and what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), "--out", str(out), "--commit", "abc1234"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / f"{program}.json").read_text())
    assert result["machine"]["commit"] == "abc1234" and f"benchmarks/{program}.py" in result["machine"]["command"]
    return result, done.stdout


def test_attention(tmp_path):
    result, printed = _run("attention", tmp_path, "--device", "cpu", "--quick", "--shapes", "narrow", "wide")
    assert [(row["method"], row["length"]) for row in result["rows"]] == [
        (method, length) for length in (32, 128, 512) for method in ("sparsek", "cudnn")
    ]
    assert all(row["shape"] == "h2 g2 d8" and row["step"] > 0 and not row["note"] for row in result["rows"])
    assert "determinism: 0 of 99" in printed
    assert sorted(x.name for x in tmp_path.iterdir()) == ["attention.json", "attention.png"]
    assert result["gate"] == AttentionConfig().gate
    # Held against float64: the gate that is timed, and dense attention once for each shape.
    said = [line.split("=")[2].split()[1] for line in result["checks"] if line.startswith("  G=")]
    assert said == ["value", "dense", "value", "dense"]


@pytest.mark.parametrize("gate", ["value", "straight_through", "key_value", "none"])
def test_the_gate_that_is_asked_for_is_timed(gate, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cells = importlib.import_module("attention_cells")
    seen: list[str] = []
    monkeypatch.setattr(cells, "sparsek_attention", lambda *inputs, **how: seen.append(how["gate"]) or inputs[0] * 1)
    shape = cells.Shape(2, 1, 4, 3)
    bench = cells.Bench("cpu", Path(), math.inf, 1, {}, gate)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: None)
    cells.measure_sparsek(bench, shape, cells.Row(shape.name, "sparsek", 3, "random", 8))
    assert set(seen) == {gate}


def test_decode(tmp_path):
    result, _ = _run("decode", tmp_path, "--quick")
    assert result["correct"] and {row["context"] for row in result["rows"]} == {1000, 10_000}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["decode.json", "decode.png"]


def test_tiles():
    command = [sys.executable, ROOT / "benchmarks" / "tiles.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--tiny"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    kernels = ("forward", "grad_query", "grad_selected", "grad_window")
    assert [row[0] for row in rows] == [kernel for kernel in kernels for _ in "ab"]
    assert all(float(row[-1]) < 1e-5 for row in rows) and not re.search("failed|nan", done.stdout)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_head():
    command = [sys.executable, ROOT / "benchmarks" / "head.py", "--tiny"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("[")]
    assert len(rows) == 4
    assert all(0 <= float(x) < 1e-6 for row in rows for x in row[-2:])
    # Another order of sums: there were tiles.
    whole, no_copy, *tiles = [float(row[-2]) for row in rows]
    assert whole == no_copy == 0 < min(tiles)


def test_two_gpus(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for name in ("one", "two", "three"):
        (corpus / f"{name}.txt").write_text(f"{name} " + Path(__file__).read_text())
    result, printed = _run("two_gpus", out, "--data", str(corpus), "--steps", "2")
    assert sorted(x.name for x in out.iterdir()) == ["two_gpus.json", "two_gpus.png"]
    assert {row["exchange"] for row in result["errors"]} == {"all_gather", "scan"}
    assert len(result["errors"]) == 20 and all(row["within"] and row["shared"] < 1e-5 for row in result["errors"])
    assert len(result["bytes"]) == 4 and all(row["equal"] for row in result["bytes"])
    assert len(result["links"]) == 2 and result["notes"] == []
    for part, ways in (("layer", 2), ("training", 3)):
        rows = [row for row in result[part] if row["kind"] == "sparsek"]
        assert len(rows) == ways and len(result[part]) == len(rows) + 2
        assert all(("without_exchange" in row) == (row["degree"] > 1) for row in rows)
    one, two = (curve["losses"] for curve in result["curves"])
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-4)
    assert "all GPUs differ from one by at most" in printed

    again, _ = _run("two_gpus", tmp_path / "later", "--parts", "bytes", "--onto", str(out / "two_gpus.json"))
    assert again["bytes"] == result["bytes"] and again["layer"] == result["layer"]
    assert [note.split(":")[0] for note in again["notes"]] == ["bytes on 2"]

    other = tmp_path / "other.json"
    other.write_text(json.dumps(result | {"machine": {"name": "another GPU"}}))
    command = [sys.executable, ROOT / "benchmarks" / "two_gpus.py", "--out", tmp_path / "later", "--onto", other]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "another GPU: only the same GPUs compare" in done.stderr


def test_the_script_runs_what_exists(tmp_path):
    told = subprocess.run([ON_GPU, "list"], capture_output=True, text=True, check=True).stdout
    parts = re.findall(r"^  (\w+) +\d+ ", told, re.MULTILINE)
    assert len(parts) == 8
    for part in parts:
        done = subprocess.run(
            [ON_GPU, part, tmp_path], env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("timeout ")
        assert all((ROOT / path).exists() for path in re.findall(r"(?:benchmarks|tests|configs)/\S+", done.stdout))
        assert all(find_spec(module) for module in re.findall(r"-m (\S+)", done.stdout) if "." in module), done.stdout
    assert subprocess.run([ON_GPU, "other"], capture_output=True, check=False).returncode == 2
