"""docs/pretrained.md tells the truth: its commands run on a tiny model, in the order in which they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from sparsek_dist.cli import main, parse
from sparsek_dist.commands import sparsify as conversion
from sparsek_dist.models.families import FAMILIES
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.settings import load
from tests.models.tiny import tiny_model

TEXT = (Path(__file__).parent.parent / "docs" / "pretrained.md").read_text()


def _blocks(language: str) -> list[str]:
    return [
        text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL) if name == language
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(
        "llama", vocab_size=257, eos_token_id=256, bos_token_id=256, max_position_embeddings=2048
    ).float().save_pretrained("MODEL")
    load_tokenizer("bytes").save_pretrained("MODEL")
    Path("book.txt").write_text("It was a dark and stormy night. " * 80)
    return tmp_path


def test_commands_and_python_run(folder, capsys):
    commands = [shlex.split(line) for block in _blocks("sh") for line in block.splitlines() if line.strip()]
    names = [command[1] for command in commands]
    assert {"sparsify", "export", "generate"} == set(names)
    for command in commands:
        assert command[0] == "sparsek"
        parse(command[1:])
        if command[1] == "sparsify":
            assert main(command[1:]) == 0, capsys.readouterr().err
    (block,) = _blocks("python")
    exec(block, {})
    # `export` needs a run, which tests/training/test_tune.py makes; the converted folder stands in for its result.
    Path("sparse").rename("tuned")
    for command in commands:
        if command[1] == "generate":
            assert main([*command[1:], "--max-new-tokens", "3"]) == 0, capsys.readouterr().err
    assert Path("kept.html").is_file()


def test_settings_load(tmp_path):
    (block,) = _blocks("yaml")
    assert yaml.safe_load(block)["tune"] == {"parameters": "scorer"}
    (tmp_path / "tune.yaml").write_text(block)
    load(tmp_path / "tune.yaml")


def test_every_family_is_named():
    assert all(f"`{name}`" in TEXT for name in FAMILIES)


def test_scorers_are_fitted_in_contexts_of_its_training(folder, monkeypatch):
    description = json.loads(Path("MODEL/config.json").read_text())
    lengths = []
    monkeypatch.setattr(
        conversion, "fit_scorers", lambda model, batches, **_: lengths.append(batches[0].shape) or [torch.ones(2, 24)]
    )
    monkeypatch.setattr(conversion, "start_scorers", lambda model, fitted: None)
    for trained, more in ((48, []), (48, ["--distill-length", "64"]), (None, [])):
        Path("MODEL/config.json").write_text(json.dumps(description | ({"trained_length": trained} if trained else {})))
        words = ["sparsify", "MODEL", "--out", f"out{len(lengths)}", "--distill", "book.txt", *more]
        assert main([*words, "attention.num_selected=8", "attention.window=16"]) == 0
    assert lengths == [(1, 48), (1, 64), (1, 1024)]


def test_distilled_start(folder, capsys):
    from sparsek_dist import load_pretrained

    small = ["attention.num_selected=8", "attention.window=16"]
    assert main(["sparsify", "MODEL", "--out", "plain", *small]) == 0
    assert main(["sparsify", "MODEL", "--out", "fitted", "--distill", "book.txt", *small]) == 0
    plain, fitted = load_pretrained("plain").state_dict(), load_pretrained("fitted").state_dict()
    for name in plain:
        assert torch.equal(plain[name], fitted[name]) != (".scorer." in name), name
    capsys.readouterr()
    Path("short.txt").write_text("too short")
    for words, message in (
        (["--distill", "short.txt"], "holds 9 tokens"),
        (["--distill", "missing.txt"], "cannot be read"),
        (
            ["--distill", "book.txt", "--distill-length", "16"],
            "--distill-length = 16 must be more than attention.window",
        ),
        (["--distill", "book.txt", "--distill-length", "4096"], "at most the 2048 positions"),
        (["--distill-length", "64"], "--distill-length = 64 fits nothing by itself"),
    ):
        assert main(["sparsify", "MODEL", "--out", "more", *words, *small]) == 2
        assert message in capsys.readouterr().err
