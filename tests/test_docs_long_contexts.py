"""docs/long-contexts.md tells the truth: its commands run, in the order in which they stand there, at a tiny size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from sparsek_dist.cli import main
from sparsek_dist.settings import load
from tests.test_cli import _sparsek

TEXT = (Path(__file__).parent.parent / "docs" / "long-contexts.md").read_text()
TINY = {
    "model": dict(hidden_size=16, intermediate_size=16, num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=8),
    "data": dict(path="text", held_out=0.3, cache="cache"),
    "optimizer": dict(warmup_steps=1),
    "train": dict(steps=1, micro_batch_size=1, eval_every=0, eval_sequences=1, observe_every=0),
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def _shrink(name: str, block: str) -> None:
    """Writes the settings as they stand on the page, but for sizes and the text."""
    settings = yaml.safe_load(block)
    for section, values in TINY.items():
        known = settings[section]
        settings[section] = known | (values if section != "model" or "source" not in known else {})
    if "growth" in settings["data"]:
        # One step of each length.
        settings["data"]["growth"] = re.sub(r"x\d+", "x1", settings["data"]["growth"])
        settings["train"]["steps"] = 5
    Path(name).write_text(yaml.safe_dump(settings))


def test_the_way_from_short_contexts_to_long_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for index in range(6):
        Path(f"text/{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * 200)
    Path("book.txt").write_text("It was a dark and stormy night. " * 80)
    for name, block in zip(("short.yaml", "grow.yaml"), _blocks("yaml"), strict=True):
        assert f"`{name}`" in TEXT
        Path(name).write_text(block)
        load(Path(name))
        _shrink(name, block)
    commands = [shlex.split(line) for block in _blocks("sh") for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "export", "sparsify", "train", "export"]
    for command in commands:
        if command[1] == "train":
            done = _sparsek(*command[1:])
            assert done.returncode == 0, done.stderr
        else:
            assert main(command[1:]) == 0, capsys.readouterr().err
    spec = json.loads(Path("grown/config.json").read_text())
    assert spec["max_position_embeddings"] == 16384
    assert spec["sparsek"]["gate"] == "value" and spec["sparsek"]["slope"] > 0
    assert len(Path("runs/grown/metrics.jsonl").read_text().splitlines()) == 5
