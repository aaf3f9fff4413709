"""EleutherAI's lm-evaluation-harness on a converted model, as it is and offline, with tasks from a local file."""

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
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOICES = [" blue", " green", " of stone"]
QUESTIONS = ["In a long story the sky over the harbour was", "Grass in spring is", "The old wall was made"]


@pytest.fixture(scope="module")
def model():
    return sparsify(
        tiny_model("llama", vocab_size=257, eos_token_id=256, bos_token_id=256).float(), num_selected=6, window=6
    )


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def samples(model, tokenizer, tmp_path, monkeypatch):
    """A task -> its result and its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"question": q, "choices": CHOICES, "answer": i} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))

    def run(name: str, rest: str):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / "questions.jsonl") + rest)
        told = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128),
            tasks=[name],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        assert len(told["samples"][name]) == len(QUESTIONS)
        return told["results"][name], told["samples"][name]

    return run


def _likelihood(model, tokenizer, question: str, choice: str) -> float:
    """By hand, from one pass over the whole text."""
    before, ids = len(tokenizer.encode(question)), torch.tensor([tokenizer.encode(question + choice)])
    log_p = model(ids, use_cache=False).logits.float().log_softmax(-1)[0]
    return sum(log_p[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1]))


def test_a_choice(samples, model, tokenizer):
    result, found = samples("choose", CHOOSE)
    right = 0
    for sample in found:
        document = sample["doc"]
        expected = [_likelihood(model, tokenizer, document["question"], choice) for choice in CHOICES]
        told = [response[0] for response in sample["filtered_resps"]]
        # A batch is padded on the right, which nothing before it may notice.
        assert told == pytest.approx(expected, abs=1e-3)
        assert math.isfinite(sum(told)) and len(set(told)) == len(CHOICES)
        right += expected.index(max(expected)) == document["answer"]
    assert result["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_a_continuation(samples, model, tokenizer):
    """Batches are padded on the left here, and the cache is the one of constant size."""
    _, found = samples("write", WRITE)
    for sample in found:
        ids = tokenizer.encode(sample["doc"]["question"])
        for _ in range(9):
            likeliest = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(likeliest)
            if likeliest == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[len(sample["doc"]["question"]) :], skip_special_tokens=True)
        assert sample["filtered_resps"] == [expected] and expected
