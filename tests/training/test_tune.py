"""Fine-tuning end to end: a dense folder, scorers alone or low-rank updates, on two ZeRO stages, and out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsek_dist import load_pretrained
from sparsek_dist.cli import main
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.test_tokenizer import word_tokenizer
from tests.models.tiny import tiny_model
from tests.test_cli import _sparsek

SETTINGS = """
run: {{name: tuned, root: {folder}/runs}}
model: {{source: {folder}/dense}}
attention: {{num_selected: 4, window: 4}}
data: {{path: {folder}/text, tokenizer: {folder}/dense, sequence_length: 48, held_out: 0.3, cache: {folder}/cache}}
optimizer: {{learning_rate: 0.05, warmup_steps: 1, weight_decay: 0.1}}
train: {{steps: 2, eval_every: 0, eval_sequences: 2, observe_every: 2, save_every: 2}}
"""


@pytest.fixture
def settings(tmp_path) -> str:
    (tmp_path / "text").mkdir()
    for index in range(5):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * 8)
    model = tiny_model("llama", vocab_size=257, eos_token_id=256, bos_token_id=256, max_position_embeddings=32)
    model.float().save_pretrained(tmp_path / "dense")
    load_tokenizer("bytes").save_pretrained(tmp_path / "dense")
    path = tmp_path / "tune.yaml"
    path.write_text(SETTINGS.format(folder=tmp_path))
    return str(path)


@pytest.mark.parametrize(("parameters", "stage"), [("scorer", 2), pytest.param("lora", 3, marks=pytest.mark.slow)])
def test_tuning_from_a_dense_folder_and_out_again(settings, tmp_path, parameters, stage, capsys):
    if parameters == "lora":
        pytest.importorskip("peft")
    words = (
        settings,
        f"tune.parameters={parameters}",
        f"parallel.zero_stage={stage}",
        "model.rope=yarn",
        "optimizer.scorer_rate=10",
    )
    first = _sparsek("train", *words)
    assert first.returncode == 0, first.stderr
    if parameters == "lora":
        again = _sparsek("train", *words, "train.steps=3")
        assert again.returncode == 0 and "after step 2" in again.stdout, again.stderr

    run, out = tmp_path / "runs" / "tuned", tmp_path / "out"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == (3 if parameters == "lora" else 2) and lines[0]["grad_norm"] > 0
    assert [line["scorer_lr"] for line in lines] == pytest.approx([10 * line["lr"] for line in lines])
    assert "learning rate 5.00e-02 (5.00e-01 of the scorers)" in first.stdout
    assert main(["export", str(run), "--out", str(out)]) == 0
    tuned, dense = load_pretrained(out), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert tuned.config.rope_parameters["rope_type"] == "yarn"
    kept = [torch.equal(tuned.state_dict()[name], weight) for name, weight in dense.state_dict().items()]
    linear = sum("proj" in name for name in dense.state_dict())
    assert kept.count(False) == (0 if parameters == "scorer" else linear)
    started = load_pretrained(_converted(tmp_path, capsys))
    scorers = [name for name in tuned.state_dict() if ".scorer." in name]
    assert scorers and not any(torch.equal(tuned.state_dict()[n], started.state_dict()[n]) for n in scorers)

    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss"))
    assert float(shown.split()[1]) > 0
    assert main(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "5"]) == 0


def _converted(tmp_path, capsys):
    out = tmp_path / "converted"
    words = ["sparsify", str(tmp_path / "dense"), "--out", str(out)]
    assert main([*words, "attention.num_selected=4", "attention.window=4"]) == 0
    return out


def test_plan_knows_the_shape_of_the_source(settings, capsys):
    assert main(["plan", settings, "model.rope=linear", "tune.parameters=scorer"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for told in ("parameters 144 that learn", "layers 3", "queries [b, s, h, d] [1, 48, 4, 6]"):
        assert told in out


def test_wrong_tokenizer_ends_before_any_work(settings, capsys):
    words = word_tokenizer(Path(settings).parent / "words", eos_token="</s>")
    assert main(["train", settings, f"data.tokenizer={words}", "model.rope=yarn"]) == 2
    assert "is not the tokenizer that model.source" in capsys.readouterr().err
