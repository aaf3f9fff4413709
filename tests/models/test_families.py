"""Every family in the table, held against its own dense attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsek_dist import sparsify
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.families import FAMILIES, attention_modules
from tests.models.tiny import MODELS, tiny_model, tokens

TIGHT = {"rtol": 0, "atol": 1e-10}


def _kinds(model) -> list[str]:
    return [module.layer_kind for module in attention_modules(model)]


def test_every_family_of_the_table_is_tested():
    assert {settings["type"] for settings in MODELS.values()} | {"gemma"} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_model_up_to_the_window_and_differs_beyond(name):
    model, dense = sparsify(tiny_model(name), num_selected=4, window=40), tiny_model(name)
    before = dense.state_dict()
    after = {key: value for key, value in model.state_dict().items() if ".scorer." not in key}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    short, long = tokens(40), tokens(64)
    torch.testing.assert_close(model(short).logits, dense(short).logits, **TIGHT)
    assert not torch.allclose(model(long).logits, dense(long).logits, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_longer_packed_and_trainable(name):
    model = sparsify(tiny_model(name), num_selected=6, window=5, support=40)
    first, second = tokens(23, seed=1), tokens(31, seed=2)
    positions = torch.cat([torch.arange(23), torch.arange(31)]).expand(2, -1)
    packed = model(torch.cat([first, second], dim=1), position_ids=positions).logits
    apart = torch.cat([model(first).logits, model(second).logits], dim=1)
    torch.testing.assert_close(packed, apart, **TIGHT)
    packed.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    selecting = [module for module in attention_modules(model) if module.layer_kind == "sparsek"]
    assert selecting and all(float(module.scorer.weight.grad.abs().sum()) > 0 for module in selecting)


@pytest.mark.parametrize("name", MODELS)
def test_full_layers_packed_and_padded(name):
    """All layers but the first dense, and a window over everything: packing and padding as transformers does them."""
    full = "none" if "sliding" in name or name == "gemma3_text" else "1,2"
    model, dense = sparsify(tiny_model(name), num_selected=4, window=64, full_layers=full), tiny_model(name)
    positions = torch.cat([torch.arange(23), torch.arange(31)]).expand(2, -1)
    text = tokens(54)
    # transformers looks for packed documents only where there is no cache.
    packed = {"position_ids": positions, "use_cache": False}
    torch.testing.assert_close(model(text, **packed).logits, dense(text, **packed).logits, **TIGHT)
    mask = torch.ones_like(text)
    mask[0, :13] = 0
    padded = (mask.cumsum(1) - 1).clamp_min(0)
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": padded}):
        ours, theirs = model(text, **arguments).logits, dense(text, **arguments).logits
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **TIGHT)


def test_padding_to_the_left_changes_nothing_beyond_the_window():
    model = sparsify(tiny_model("llama"), num_selected=6, window=5, support=9, full_layers="1")
    text = tokens(50)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[:, :10] = 0
    longer, positions = torch.cat([tokens(10, seed=9), text], dim=1), (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(longer, attention_mask=mask, position_ids=positions).logits[:, 10:]
    torch.testing.assert_close(padded, model(text).logits, **TIGHT)
    # Positions that do not know of the padding turn the rotary angles, which transformers rounds to float32.
    padded = model(longer, attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(padded, model(text).logits, rtol=0, atol=1e-5)


def test_padding_to_the_right_is_harmless_and_holes_are_refused():
    model = sparsify(tiny_model("llama"), num_selected=6, window=5)
    text, mask = tokens(30), torch.ones(2, 30, dtype=torch.long)
    mask[0, 20:] = 0
    torch.testing.assert_close(model(text, attention_mask=mask).logits[0, :20], model(text).logits[0, :20], **TIGHT)
    mask[0, 25:] = 1
    with pytest.raises(ConfigError, match="hides tokens between others"):
        model(text, attention_mask=mask)
    with pytest.raises(ConfigError, match="no attention_mask of its own shape"):
        model(text, attention_mask=torch.ones(2, 1, 30, 30, dtype=torch.bool))


@pytest.mark.parametrize(
    ("full", "kinds"),
    [("none", "sss"), ("every_other", "sfs"), ("0,2", "fsf")],
)
def test_choice_of_layers(full, kinds):
    model = sparsify(tiny_model("qwen3"), num_selected=6, window=5, full_layers=full)
    assert "".join(kind[0] for kind in _kinds(model)) == kinds
    assert [hasattr(module, "scorer") for module in attention_modules(model)] == [kind == "s" for kind in kinds]
    dense = sparsify(tiny_model("qwen3"), num_selected=6, window=5)
    assert not torch.allclose(model(tokens(60)).logits, dense(tokens(60)).logits, atol=1e-4) or full == "none"


def test_sliding_layers_stay_or_are_replaced():
    name = "qwen2 with sliding layers"
    assert _kinds(sparsify(tiny_model(name))) == ["sparsek", "sliding", "sliding"]
    kept, dense = sparsify(tiny_model(name), num_selected=4, window=60), tiny_model(name)
    torch.testing.assert_close(kept(tokens(60)).logits, dense(tokens(60)).logits, **TIGHT)
    replaced = sparsify(tiny_model(name), num_selected=4, window=9, sliding_layers="replace")
    assert _kinds(replaced) == ["sparsek"] * 3
    torch.testing.assert_close(replaced(tokens(9)).logits, dense(tokens(9)).logits, **TIGHT)
    mistral = {"sliding_window": 16}
    with pytest.raises(ConfigError, match="sliding_layers = replace"):
        sparsify(tiny_model("mistral", **mistral))
    assert _kinds(sparsify(tiny_model("mistral", **mistral), sliding_layers="replace")) == ["sparsek"] * 3


@pytest.mark.parametrize("kind", ["random", "sink_window", "window"])
def test_baselines(kind):
    model, dense = sparsify(tiny_model("gpt2"), kind=kind, num_selected=8, window=32), tiny_model("gpt2")
    torch.testing.assert_close(model(tokens(40)).logits, dense(tokens(40)).logits, **TIGHT)


REFUSALS = {
    "opt": ({"type": "opt"}, r"model_type = opt is not supported: use one of gemma, .*starcoder2"),
    "gemma2": ({"type": "gemma2"}, "attn_logit_softcapping = 50"),
    "cross": ({"type": "gpt2", "add_cross_attention": True}, "add_cross_attention = True"),
    "two ways": ({"type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "dropout": ({"type": "llama", "attention_dropout": 0.1}, r"attention_dropout = 0.1 .*--no-attention-dropout"),
    "gpt2 dropout": ({"type": "gpt2"}, r"attn_pdrop = 0.1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_honoured_is_refused(case):
    settings, message = REFUSALS[case]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8, "pad_token_id": 0}
    settings = sizes | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 8, **settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("type"), **settings))
    with pytest.raises(ConfigError, match=message):
        sparsify(model)


WRONG = {
    "full_layers=1,7": ({"full_layers": "1,7"}, "names layer 7, but the model has 3: use 0 to 2"),
    "full_layers=1;2": ({"full_layers": "1;2"}, "attention.full_layers = '1;2'"),
    "all full": ({"full_layers": "0,1,2"}, "leave none of 3 layers"),
    "window=0": ({"window": 0}, "attention.window = 0 must be at least 1"),
    "support": ({"num_selected": 8, "support": 8}, "attention.support = 8 must exceed"),
    "typo": ({"num_selectd": 8}, "sparsify: .*num_selectd"),
    "full": ({"kind": "full"}, "attention.kind = full"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case):
    settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        sparsify(tiny_model("llama"), **settings)


def test_twice_is_refused():
    with pytest.raises(ConfigError, match="has SPARSEK attention already"):
        sparsify(sparsify(tiny_model("llama")))


def test_dropout_can_be_turned_off():
    model = tiny_model("gpt2", attn_pdrop=0.1)
    sparsify(model, attention_dropout="off", num_selected=4, window=4)
    model.train()
    model(tokens(20))
    assert model.config.attn_pdrop == 0
    assert model.transformer.h[0].attn.resid_dropout.p == 0.1
