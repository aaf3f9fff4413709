"""Generation: what is streamed is what is generated, draws depend on the seed alone, and numbers are checked."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsek_dist.errors import ConfigError
from sparsek_dist.generation.generate import generate
from sparsek_dist.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).eval()


def _generate(model, prompt: str = "a prompt", **changes) -> tuple[str, list[str]]:
    pieces: list[str] = []
    numbers = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4} | changes
    return generate(model, load_tokenizer("bytes"), prompt, write=pieces.append, **numbers), pieces


def test_pieces_make_the_text(model) -> None:
    text, pieces = _generate(model)
    assert text and "".join(pieces) == text
    assert len(pieces) > 1


def test_greedy_equals_the_likeliest_token_each_time(model) -> None:
    tokens = [256, *b"a prompt"]
    for _ in range(6):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    expected = load_tokenizer("bytes").decode(tokens[9:], skip_special_tokens=True)
    assert _generate(model, temperature=0.0, max_new_tokens=6)[0] == expected


def test_draws_depend_on_the_seed_alone(model) -> None:
    torch.manual_seed(0)
    first = _generate(model)[0]
    state = torch.get_rng_state()
    torch.rand(5)
    assert _generate(model)[0] == first != _generate(model, seed=5)[0]
    torch.manual_seed(0)
    _generate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_character_of_several_bytes_is_not_cut(model, monkeypatch) -> None:
    """A euro sign is three bytes: nothing may be written before the last."""
    wanted = iter([*"x\N{EURO SIGN}y".encode(), 256])
    forward = model.forward

    def certain(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:] = 0
        output.logits[..., next(wanted)] = 100
        return output

    monkeypatch.setattr(model, "forward", certain)
    assert _generate(model)[1] == ["x", "\N{EURO SIGN}", "y"]


@pytest.mark.parametrize(("changes", "told"), [({"max_new_tokens": 0}, "max-new"), ({"temperature": -1.0}, "temper")])
def test_numbers_are_checked(model, changes, told) -> None:
    with pytest.raises(ConfigError, match=told):
        _generate(model, **changes)
