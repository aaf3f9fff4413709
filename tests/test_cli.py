"""The command line: one clear line and the right exit code for every mistake, and one way through all commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsek_dist import cli
from sparsek_dist.cli import main
from sparsek_dist.errors import CheckpointError, ConfigError, DataError, NumericsError, SparsekError

SETTINGS = """
run: {{name: tiny, root: {folder}/runs}}
model: {{hidden_size: 16, intermediate_size: 32, num_layers: 1, num_query_heads: 2, num_kv_heads: 1, head_dim: 8}}
attention: {{num_selected: 4, window: 4}}
data: {{path: {folder}/text, sequence_length: 32, held_out: 0.3, cache: {folder}/cache}}
train: {{steps: 4, eval_every: 2, eval_sequences: 0, save_every: 2, log_every: 1, observe_every: 2}}
"""


@pytest.fixture
def settings(tmp_path) -> str:
    (tmp_path / "text").mkdir()
    for index in range(5):
        text = f"document {index}: " + "the cat sat on the mat. " * 8
        (tmp_path / "text" / f"{index}.txt").write_text(text)
    path = tmp_path / "tiny.yaml"
    path.write_text(SETTINGS.format(folder=tmp_path))
    return str(path)


MISTAKES = {
    "train.stepz=3": "stepz.*Did you mean: 'steps'",
    "train.steps=many": "train.steps",
    "train.steps=0": "train.steps = 0 must be at least 1",
    "optimizer.learning_rate=inf": "optimizer.learning_rate = inf is not a finite number",
    "optimizer.name=lion": "optimizer.name",
    "data.held_out=1": "data.held_out = 1.0",
    "parallel.zero_stage=4": "parallel.zero_stage = 4",
    "parallel.sequence_degree=16": "data.sequence_length = 32 over parallel.sequence_degree = 16",
    "model.num_kv_heads=3": "model.num_kv_heads = 3",
    "attention.support=3": "attention.support = 3",
    "run.name=../x": "run.name",
    "parallel.deepspeed={gradient_clipping: 1}": "gradient_clipping",
    "parallel.deepspeed={wall_clock_brakdown: true}": "did you mean wall_clock_breakdown",
    "no_equals_sign": "'no_equals_sign' is not key=value",
}


@pytest.mark.parametrize("override", MISTAKES)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_wrong_setting(settings, capsys, command, override, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([command, settings, override]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(MISTAKES[override], captured.err)
    assert not captured.out


def test_missing_file(capsys) -> None:
    assert main(["plan", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.yaml: no such configuration file")


def test_world_size(settings, capsys) -> None:
    assert main(["plan", settings, "--world-size", "3", "parallel.sequence_degree=2"]) == 2
    assert "parallel.sequence_degree = 2 must divide the number of processes, 3" in capsys.readouterr().err
    assert main(["plan", settings, "--world-size", "0"]) == 2


@pytest.mark.parametrize("arguments", [[], ["trian"], ["plan"], ["plan", "x.yaml", "--wrld-size", "2"]])
def test_wrong_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: sparsek" in capsys.readouterr().err


KINDS = [
    (1, SparsekError("plain")),
    (2, ConfigError("field = 3: use 4")),
    (2, DataError("nothing to read")),
    (4, CheckpointError("damaged")),
    (5, NumericsError("step 7: the loss is nan")),
    (6, RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")),
]


@pytest.mark.parametrize(("code", "error"), KINDS)
def test_exit_code_tells_the_kind(settings, capsys, monkeypatch, code, error) -> None:
    def fail(config) -> None:
        raise error

    monkeypatch.setattr("sparsek_dist.commands.train.train", fail)
    assert main(["train", settings]) == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "where", "cure"),
    [
        (["train"], "commands.train.train", "train.micro_batch_size"),
        (["eval", "folder"], "commands.evaluation_target.open_target", "--length"),
        (["generate", "folder"], "commands.generate.generate_text", "a shorter prompt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_gpu(settings, capsys, monkeypatch, arguments, where, cure) -> None:
    """Each command names what its own user can change."""

    def fail(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore of it.")

    monkeypatch.setattr(f"sparsek_dist.{where}", fail)
    assert main([*arguments, *([settings] if arguments == ["train"] else [])]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: out of GPU memory (CUDA out of memory. Tried to allocate 3 GiB.): ") and cure in told


def test_mistake_of_ours_keeps_its_traceback(settings, monkeypatch) -> None:
    def fail(config) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("sparsek_dist.commands.train.train", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["train", settings])


def test_only_the_first_rank_speaks(settings, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", settings, "train.steps=0"]) == 2
    assert not capsys.readouterr().err


def test_debug_keeps_the_traceback(settings) -> None:
    with pytest.raises(ValueError, match=r"train\.steps = 0"):
        main(["plan", settings, "train.steps=0", "--debug"])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_local_rank_of_the_launcher_is_dropped(settings, capsys, place) -> None:
    arguments = ["plan", settings, "train.steps=7"]
    arguments.insert(place, "--local_rank=1")
    assert main(arguments) == 0
    assert "7 steps" in capsys.readouterr().out


def test_plan(settings, capsys) -> None:
    words = ["parallel.sequence_degree=2", "train.accumulation_steps=3", "data.growth=16x1"]
    assert main(["plan", settings, "--world-size", "4", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for told in (
        "processes 4 = 2 data parallel x 2 sequence parallel",
        "contexts grow 16 tokens for 1 steps, then 32",
        "contexts 6 = 2 x 1 x 3",
        "attention sparsek, 4 + 4 pairs per query, gate value, slope 0.062 a token",
        "tokens 192 = 6 x 32",
        "queries [b, s, h, d] [1, 16, 2, 8]",
        '"train_batch_size": 6',
    ):
        assert told in out
    dense = ["attention.full_layers=0", "model.num_layers=2", "model.num_kv_heads=2", "train.precision=float32"]
    assert main(["plan", settings, "parallel.sequence_degree=2", *dense]) == 0
    # Half of queries, keys, values and output of 16 tokens, and as many positions.
    told = f"in a dense layer {16 * 2 * (2 + 2) * 8 * 4 // 2 + 16 * 4:,} bytes"
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_not_a_run(command, tmp_path, capsys) -> None:
    assert main([command, str(tmp_path)]) == 4
    assert "is not the folder of a run" in capsys.readouterr().err


def _sparsek(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sparsek_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_train_resume_eval_generate(settings, tmp_path, capsys) -> None:
    first = _sparsek("train", settings)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "tiny"
    for told in ("step 4/4: loss", "held-out bits per byte", "trigram model", f"sparsek generate {folder}"):
        assert told in first.stdout
    again = _sparsek("train", settings, "train.steps=5")
    assert again.returncode == 0, again.stderr
    assert "after step 4" in again.stdout and "step 5/5" in again.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert any(key.startswith("selection/") for key in lines[1])

    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    # The same text as at the end of training, through another program path: weights from model/, no DeepSpeed.
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bits per byte"))
    assert float(shown.split()[3]) == pytest.approx(lines[-1]["held_out/bits_per_byte"], abs=1e-4)
    assert json.loads((folder / "eval.json").read_text())["step"] == 5
    assert list((folder / "tensorboard" / "eval").glob("events.*"))

    text = "the cat sat on the"
    assert main(["generate", str(folder), "--prompt", text, "--max-new-tokens", "5", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith(text)

    weights = folder / "checkpoints" / "step-00000005" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["eval", str(folder)]) == 4
    assert "model/model.safetensors has other content" in capsys.readouterr().err


def test_no_pickle_in_our_own_code() -> None:
    """DeepSpeed's files are its own; ours are JSON and safetensors."""
    package = Path(cli.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 20
    for path, source in sources.items():
        for forbidden in ("import pickle", "torch.load(", "torch.save("):
            assert forbidden not in source, f"{path} uses {forbidden}"
