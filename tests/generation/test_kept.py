"""What is shown as kept is what the definition selects at the last token, character by character."""

from __future__ import annotations

import re

import pytest
import torch

from sparsek_dist import sparsify
from sparsek_dist.errors import ConfigError
from sparsek_dist.generation.generate import prompt_tokens
from sparsek_dist.generation.kept import WINDOW, by_character, kept_by_layer, mark_characters, write_page
from sparsek_dist.models.families import attention_modules
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_kernels.reference import selection_reference
from tests.models.tiny import tiny_model

BYTES = load_tokenizer("bytes")
PROMPT = "a caf\u00e9, a \u6f22 and the rest <of> it"


def _model(**settings):
    model = tiny_model("llama", vocab_size=257, bos_token_id=256, eos_token_id=256)
    return sparsify(model, **({"num_selected": 5, "window": 4, "support": 9} | settings))


def test_shares_are_those_of_the_definition():
    model = _model(full_layers="1")
    caught = []
    modules = [module for module in attention_modules(model) if hasattr(module, "scorer")]
    hooks = [module.scorer.register_forward_hook(lambda *call: caught.append(call[-1])) for module in modules]
    kept = kept_by_layer(model, BYTES, PROMPT)
    for hook in hooks:
        hook.remove()
    n = len(PROMPT.encode()) + 1
    assert list(kept) == [0, 2] and len(caught) == 2
    for share, scores in zip(kept.values(), caught, strict=True):
        assert scores.shape == (1, n, 2) and len(share) == n - 1
        selected = selection_reference(
            scores.double(), num_selected=5, window=4, support=9, document_ids=torch.zeros(1, n, dtype=torch.long)
        ).selected[0, :, -1]
        expected = selected.double().mean(0).float()
        expected[n - 4 :] = WINDOW
        torch.testing.assert_close(share, expected[1:])
    assert prompt_tokens(BYTES, PROMPT)[0] == 256


def test_a_character_of_several_tokens_shows_the_largest_share():
    prompt = "x\u6f22y"
    assert by_character(torch.tensor([0.0, 0.25, 0.75, 0.5, 2.0]), prompt, BYTES) == [0.0, 0.75, 2.0]


def test_terminal_and_page(tmp_path):
    kept = kept_by_layer(_model(), BYTES, PROMPT)
    text = mark_characters(kept, PROMPT, BYTES)
    assert text.plain == PROMPT
    assert len({str(span.style) for span in text.spans}) >= 3
    write_page(tmp_path / "kept.html", kept, PROMPT, BYTES)
    page = (tmp_path / "kept.html").read_text()
    assert page.count("<option>") == 4 and len(re.findall(r"<i>", page)) == len(PROMPT) and "<of>" not in page
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path / "no" / "kept.html", kept, PROMPT, BYTES)


def test_nothing_to_show_is_said():
    for model, prompt in ((tiny_model("llama", vocab_size=257), PROMPT), (_model(), "")):
        with pytest.raises(ConfigError, match="nothing to show"):
            kept_by_layer(model, BYTES, prompt)
