"""EleutherAI's lm-evaluation-harness on a converted model, as it is and offline, with a task from a local file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparsek_dist.models.pretrained import sparsify
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.tiny import tiny_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsek-dist[eval]'")

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
CHOICES = [" blue", " green", " of stone"]
QUESTIONS = ["In a long story the sky over the harbour was", "Grass in spring is", "The old wall was made"]


def _likelihood(model, tokenizer, question: str, choice: str) -> float:
    """By hand, from one pass over the whole text."""
    before, ids = len(tokenizer.encode(question)), torch.tensor([tokenizer.encode(question + choice)])
    log_p = model(ids, use_cache=False).logits.float().log_softmax(-1)[0]
    return sum(log_p[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1]))


def test_a_task_from_a_local_file(tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"question": q, "choices": CHOICES, "answer": i} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "colours.yaml").write_text(TASK.format(file=tmp_path / "colours.jsonl"))
    model = tiny_model("llama", vocab_size=257, eos_token_id=256, bos_token_id=256).float()
    sparsify(model, num_selected=6, window=6)
    tokenizer = load_tokenizer("bytes")
    told = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128),
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for sample in told["samples"]["colours"]:
        document = sample["doc"]
        expected = [_likelihood(model, tokenizer, document["question"], choice) for choice in CHOICES]
        found = [response[0] for response in sample["filtered_resps"]]
        # A batch is padded on the right, which nothing before it may notice.
        assert found == pytest.approx(expected, abs=1e-3)
        assert math.isfinite(sum(found)) and len(set(found)) == len(CHOICES)
        right += expected.index(max(expected)) == document["answer"]
    assert told["results"]["colours"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
