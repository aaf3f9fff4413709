"""`sparsek sparsify`, `export` and `generate`, from a dense folder to text, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsek_dist import load_pretrained
from sparsek_dist.cli import main
from sparsek_dist.commands.trained import load_run
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.tiny import tiny_model
from tests.test_cli import SETTINGS, _sparsek

PROMPT = "a caf\u00e9 \u6f22 <b> " + "the cat sat on the mat. " * 3


@pytest.fixture
def dense(tmp_path):
    """A dense byte-level model with its tokenizer, as it would come from the hub."""
    folder = tmp_path / "dense"
    tiny_model("llama", vocab_size=257, eos_token_id=256, bos_token_id=256).float().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def _run(capsys, *words: str) -> str:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_from_a_dense_folder_to_text(dense, tmp_path, capsys):
    out = tmp_path / "sparse"
    settings = ("attention.num_selected=8", "attention.window=8", "attention.full_layers=1")
    told = _run(capsys, "sparsify", dense, "--out", out, "--dtype", "bfloat16", *settings)
    assert "2 sparsek, 1 full" in told and "parameters as they were" in told
    model = load_pretrained(out)
    assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [97, 98]
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())

    page = tmp_path / "kept.html"
    text = _run(
        capsys, "generate", out, "--prompt", PROMPT, "--max-new-tokens", "20", "--show-kept", "--kept-page", page
    )
    assert text.count(PROMPT) == 2
    shown = page.read_text()
    letters = re.findall(r"<i>(.*?)</i>", shown, re.DOTALL)
    assert len(letters) == len(PROMPT) and "&lt;" in letters
    assert "<option>layer 0</option><option>layer 2</option>" in shown


def test_export_of_a_run(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for index in range(5):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * 8)
    settings = tmp_path / "tiny.yaml"
    settings.write_text(SETTINGS.format(folder=tmp_path))
    trained = _sparsek("train", str(settings), "train.steps=1")
    assert trained.returncode == 0, trained.stderr
    run, out = tmp_path / "runs" / "tiny", tmp_path / "exported"
    assert "sparsek attention" in _run(capsys, "export", run, "--out", out)
    _, trained, _ = load_run(run)
    model = load_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    text = torch.randint(0, 256, (1, 60))
    assert torch.equal(model(text).logits, trained(text).logits)
    assert model.config.use_cache and not trained.config.use_cache
    words = ("--prompt", "the cat", "--max-new-tokens", "30", "--temperature", "0")
    assert _run(capsys, "generate", run, *words) == _run(capsys, "generate", out, *words)
    assert "load_pretrained" in (out / "README.md").read_text()


REFUSALS = {
    "sparsify {missing} --out {out}": (4, "neither a folder nor a model"),
    "sparsify {dense} --out {dense}": (4, "exists and is not empty"),
    "sparsify {dense} --out {out} train.steps=3": (2, "not about the attention"),
    "sparsify {dense} --out {out} attention.windw=3": (2, "Did you mean one of: 'window'"),
    "sparsify {dense} --out {out} attention.full_layers=9": (2, "names layer 9"),
    "export {dense} --out {out}": (4, "is not the folder of a run"),
    "generate {dense}": (2, "sparsek sparsify"),
    "generate {missing}": (4, "neither a folder nor a model"),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words, dense, tmp_path, capsys):
    code, message = REFUSALS[words]
    out = tmp_path / "out"
    assert main(words.format(dense=dense, out=out, missing=tmp_path / "missing").split()) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not out.exists()
