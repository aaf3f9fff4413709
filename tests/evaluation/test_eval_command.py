"""`sparsek eval` on a model's folder: what it prints and writes, twice the same, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparsek_dist.cli import main, parse
from sparsek_dist.commands import evaluation_ranks
from sparsek_dist.models.pretrained import sparsify
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.tiny import tiny_model

BYTES = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256}


def _save(model, name: str) -> None:
    model.save_pretrained(name)
    load_tokenizer("bytes").save_pretrained(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A converted byte-level model, beside a text of two documents."""
    monkeypatch.chdir(tmp_path)
    _save(sparsify(tiny_model("llama", **BYTES).float(), num_selected=6, window=6), "model")
    (tmp_path / "text").mkdir()
    for index in range(2):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * 10)
    return tmp_path / "model"


def test_text(folder, capsys) -> None:
    assert main(["eval", str(folder), "--data", "text", "--length", "64"]) == 0
    told = capsys.readouterr().out
    assert "by context length" in told and "by position" in told and "perplexity" in told
    result = json.loads((folder / "eval.json").read_text())
    assert [row["length"] for row in result["by_length"]] == [8, 16, 32, 64]
    # Every byte but none of the special tokens is text.
    assert result["overall"]["targets"] == 2 * (12 + 240 + 1) == sum(row["targets"] for row in result["by_position"])
    bits = sum(row["loss"] * row["targets"] for row in result["by_position"]) / 0.6931471805599453 / 504
    assert result["overall"]["bits_per_byte"] == pytest.approx(bits)
    assert result["attention"]["kind"] == "sparsek" and result["data"] == "text"
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".partial*"))


def test_contexts_are_those_of_its_training_unless_told(folder, caplog) -> None:
    _save(sparsify(tiny_model("llama", trained_length=40, **BYTES).float(), num_selected=6, window=6), "model")
    assert main(["eval", str(folder), "--data", "text"]) == 0
    assert json.loads((folder / "eval.json").read_text())["by_length"][-1]["length"] == 40
    assert not [text for text in caplog.messages if "exceeds" in text]
    assert main(["eval", str(folder), "--data", "text", "--length", "64"]) == 0
    assert "--length = 64 exceeds the 40 tokens of the contexts it was trained on" in caplog.messages


def test_needles_twice(folder, tmp_path, capsys) -> None:
    words = ["eval", str(folder), "--task", "needles", "--lengths", "250,256", "--depths", "0,1", "--samples", "1"]
    for out in ("one", "two"):
        assert main([*words, "--needles", "2", "--out", str(tmp_path / out)]) == 0
    assert "depth 1" in capsys.readouterr().out
    one, two = ((tmp_path / out / "eval-needles.json").read_text() for out in ("one", "two"))
    assert one == two and [(c["length"], c["depth"]) for c in json.loads(one)["cells"]][2] == (256, 0)
    assert (tmp_path / "one" / "eval-needles.png").exists()
    assert main([*words, "--out", str(tmp_path / "three"), "--data", "text", "--seed", "1"]) == 0
    assert (tmp_path / "three" / "eval-needles.json").read_text() != one


REFUSALS = {
    "eval {folder}": (2, "--data PATH"),
    "eval {folder} --data nowhere.txt": (2, "names no readable file"),
    "eval {folder}/nothing": (4, "is no folder"),
    "eval {folder} --length 1": (2, "--length = 1"),
    "eval {folder} --task passkey --lengths 60": (2, "--lengths = 60 is too short"),
    "eval {folder} --task passkey --depths 0,2": (2, "--depths = 2"),
    "eval {folder} --task passkey --samples 0": (2, "--samples = 0"),
    "eval {folder} --task needles --needles 13": (2, "--needles = 13"),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words, folder, capsys) -> None:
    code, message = REFUSALS[words]
    assert main(words.format(folder=folder).split()) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(folder.glob("eval*"))


SHARED_REFUSALS = {
    (4, "eval model --data text --length 20"): "--length = 20 over 4 processes, the sequence-parallel degree, leaves "
    "shards of 5 tokens, shorter than the window of 6: use a length of at least 24, or a degree of at most 3",
    (70, "eval model --task passkey --lengths 400,350"): "--lengths = 350 over 70 processes",
    (3, "eval dense --data text --length 64"): "the number of processes = 3 must divide the 4 query heads and 2 KV",
    (2, "eval sliding --data text --length 64"): "layer 1 slides a window of 9 tokens",
    (3, "eval mixed --data text --length 64"): "its dense layers share heads among ranks: use 1 or 2",
}


@pytest.mark.parametrize(("processes", "words"), SHARED_REFUSALS)
def test_what_ranks_cannot_share_is_told_before_they_meet(processes, words, folder, monkeypatch, capsys) -> None:
    if "dense" in words:
        _save(tiny_model("llama", **BYTES), "dense")
    if "mixed" in words:
        _save(sparsify(tiny_model("llama", **BYTES), window=6, full_layers="1"), "mixed")
    if "sliding" in words:
        _save(tiny_model("qwen2 with sliding layers", **BYTES), "sliding")
    launched = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": "nowhere", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(evaluation_ranks, "initialize", lambda *args, **kwargs: pytest.fail("met"))
    # transformers draws bars while it saves.
    capsys.readouterr()
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and SHARED_REFUSALS[processes, words] in error


def test_a_list_that_is_none(folder, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--lengths", "512,many"])
    assert "--lengths" in capsys.readouterr().err


def test_commands_of_the_documentation_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    commands = re.findall(r"^sparsek (eval .*)$", text, re.MULTILINE)
    assert len(commands) > 5, "or the pattern no longer finds them"
    for command in commands:
        parse(command.split())
