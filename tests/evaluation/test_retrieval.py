"""Needles in haystacks: what the texts are, and that scores tell a model that finds from one that does not."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from sparsek_dist.errors import ConfigError
from sparsek_dist.evaluation.haystack import MAX_NEEDLES, Haystacks
from sparsek_dist.evaluation.plots import plot_retrieval
from sparsek_dist.evaluation.retrieval import in_one_pass, retrieve
from sparsek_dist.evaluation.shards import Sharing
from sparsek_dist.models.pretrained import sparsify
from sparsek_dist.models.tokenizer import load_tokenizer
from tests.models.tiny import tiny_model

TOKENIZER = load_tokenizer("bytes")
LENGTHS, DEPTHS = (300, 700), (0.0, 0.5, 1.0)


def _encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def _haystacks(task: str = "passkey", **changes) -> Haystacks:
    return Haystacks(_encode, 256, **({"task": task, "num_needles": 3, "seed": 5} | changes))


class Reader:
    """Answers by looking the key up, in the last `sight` bytes alone."""

    device = torch.device("cpu")

    def __init__(self, sight: int) -> None:
        self.sight = sight

    def _answer(self, prompt: list[int]) -> list[int]:
        text = bytes(prompt[1:]).decode()
        asked = re.search(r"What is the pass key(.*?)\? The pass key is", text)
        assert asked is not None and text.count("What is the pass key") == 1
        name, found = asked[1], None
        while found is None and (said := re.search(rf"The pass key{name} is (that)?(.+?)\.", text[-self.sight :])):
            found = None if said[1] else said
            name = said[2]
        return list(f" {found[2]}".encode()) if found else list(b" no one")

    def __call__(self, input_ids, position_ids, use_cache, logits_to_keep):
        ids = input_ids[0].tolist()
        begin = bytes(ids[1:]).rindex(b" is") + 4
        likeliest = [0] * (begin - 1) + self._answer(ids[:begin])
        logits = 50.0 * torch.nn.functional.one_hot(torch.tensor(likeliest), 257)
        return SimpleNamespace(logits=logits[None, : len(ids)][:, logits_to_keep])

    def generate(self, prompt, max_new_tokens, **_):
        return torch.tensor([prompt[0].tolist() + self._answer(prompt[0].tolist())[:max_new_tokens]])


@pytest.mark.parametrize("task", ["passkey", "needles", "chain"])
def test_who_sees_the_needle_finds_it(task) -> None:
    cells = retrieve(Reader(10**6), _haystacks(task), lengths=LENGTHS, depths=DEPTHS, samples=3)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert all(cell.accuracy == 1 and abs(cell.log_likelihood) < 1e-6 and cell.samples == 3 for cell in cells)


def test_who_sees_the_end_only_finds_what_stands_there() -> None:
    cells = retrieve(Reader(110), _haystacks(), lengths=LENGTHS, depths=DEPTHS, samples=2)
    assert [cell.accuracy for cell in cells] == [0, 0, 1] * 2
    assert all(cell.log_likelihood < -100 for cell in cells if cell.depth < 1)
    assert plot_retrieval(cells, "title").axes[0].images[0].get_array().tolist() == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("text", [None, "One line.\nAnother line, much longer than the first! " * 9])
@pytest.mark.parametrize("task", ["passkey", "needles", "chain"])
def test_texts(task, text) -> None:
    haystacks = _haystacks(task, text=text)
    for length in LENGTHS:
        places = []
        for depth in DEPTHS:
            sample = haystacks.sample(length, depth, 0)
            assert length - 60 < len(sample.prompt) + len(sample.answer) <= length
            assert sample.prompt[0] == 256
            words = bytes(sample.prompt[1:]).decode()
            key = bytes(sample.answer).decode().strip()
            assert re.fullmatch(r"\d{5}", key) and words.count(key) == 1
            assert words.count("Remember it") == (1 if task == "passkey" else 3)
            places.append(words.index(key))
        assert places == sorted(places) and places[-1] - places[0] > length // (8 if task == "chain" else 4)
    assert ("Another line" in words) == (text is not None)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_links_of_a_chain_follow_each_other(depth) -> None:
    for index in range(5):
        words = bytes(_haystacks("chain", num_needles=6).sample(900, depth, index).prompt[1:]).decode()
        [begin] = re.findall(r"The pass key of (\w+) is \d{5}\.", words)
        links = re.findall(r"The pass key of (\w+) is that of (\w+)\.", words)
        assert [before for _, before in links] == [begin, *(name for name, _ in links[:-1])]
        assert words.endswith(f"What is the pass key of {links[-1][0]}? The pass key is") and len(links) == 5


def test_the_seed_alone_decides() -> None:
    one = _haystacks("needles").sample(400, 0.5, 1)
    other = _haystacks("needles")
    other.sample(999, 0.1, 0)
    assert other.sample(400, 0.5, 1) == one
    assert one not in (_haystacks("needles", seed=6).sample(400, 0.5, 1), other.sample(400, 0.5, 2))
    # Between depths nothing but the place differs.
    early, late = (_haystacks().sample(400, depth, 0) for depth in (0.0, 1.0))
    assert early.answer == late.answer and sorted(early.prompt) == sorted(late.prompt) and early != late


def test_a_real_model_scores_as_it_generates() -> None:
    """Teacher-forced without a cache, greedy with the constant-size one: a certain model is certain in both."""
    model = sparsify(tiny_model("llama", vocab_size=257, eos_token_id=256), num_selected=8, window=8)
    haystacks = _haystacks()
    sample = haystacks.sample(200, 0.5, 0)
    prompt = torch.tensor([sample.prompt])
    for _ in sample.answer:
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    own = prompt[0, len(sample.prompt) :].tolist()
    haystacks.sample = lambda *_: type(sample)(sample.prompt, own)  # type: ignore[method-assign]
    [cell] = retrieve(model, haystacks, lengths=[200], depths=[0.5], samples=1)
    logits = model(prompt[:, :-1], use_cache=False).logits[0, len(sample.prompt) - 1 :].log_softmax(-1)
    assert cell.accuracy == 1
    assert cell.log_likelihood == pytest.approx(sum(row[i].item() for row, i in zip(logits, own, strict=True)))
    assert in_one_pass(model, type(sample)(sample.prompt, own), Sharing()) == (cell.log_likelihood, True)
    # One token that greedy decoding would not write, at either end.
    for wrong in ([own[0] ^ 1, *own[1:]], [*own[:-1], own[-1] ^ 1]):
        assert not in_one_pass(model, type(sample)(sample.prompt, wrong), Sharing())[1]
    haystacks.sample = lambda *_: type(sample)(sample.prompt, wrong)  # type: ignore[method-assign]
    assert retrieve(model, haystacks, lengths=[200], depths=[0.5], samples=1)[0].accuracy == 0


REFUSALS = [
    ({"num_needles": 0}, "--needles = 0"),
    ({"num_needles": MAX_NEEDLES + 1}, "from 1"),
    ({"text": " \n"}, "no"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSALS)
def test_refusals(changes, told) -> None:
    with pytest.raises(ConfigError, match=told):
        _haystacks("needles", **changes)


def test_too_short_a_length_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"--lengths = 40 is too short: .* take (\d+)") as told:
        _haystacks().sample(40, 0, 0)
    least = int(str(told.value).split()[-1])
    sample = _haystacks().sample(least, 0, 0)
    assert len(sample.prompt) + len(sample.answer) == least
