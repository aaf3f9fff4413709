"""Saved and loaded again, a converted model is the same to the bit; what is wrong with a folder is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sparsek_dist import load_pretrained, sparsify
from sparsek_dist.errors import CheckpointError, ConfigError
from sparsek_dist.models.families import attention_modules
from tests.models.tiny import MODELS, tiny_model, tokens

SETTINGS = {"num_selected": 6, "window": 5, "support": 9, "gate": "value", "full_layers": "1"}


def _saved(folder, name="llama", **settings):
    model = sparsify(tiny_model(name).float(), **(SETTINGS | settings))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name, tmp_path):
    model = _saved(tmp_path, name, full_layers="none" if "sliding" in name or name == "gemma3_text" else "1")
    loaded = load_pretrained(tmp_path)
    then, now = model.state_dict(), loaded.state_dict()
    assert then.keys() == now.keys() and all(torch.equal(then[key], now[key]) for key in then)
    assert torch.equal(loaded(tokens(60)).logits, model(tokens(60)).logits)
    assert loaded.config.sparsek == model.config.sparsek
    assert not loaded.training


def test_every_setting_survives(tmp_path):
    model = _saved(tmp_path, "qwen2 with sliding layers", kind="random", slope=0.5, full_layers="none", seed=7)
    loaded = load_pretrained(tmp_path)
    assert [m.parallel_attention for m in attention_modules(loaded)] == [
        m.parallel_attention for m in attention_modules(model)
    ]
    assert torch.equal(loaded(tokens(60)).logits, model(tokens(60)).logits)


def test_bfloat16_and_several_files(tmp_path):
    model = sparsify(tiny_model("llama").bfloat16(), **SETTINGS)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_transformers_alone_loads_the_dense_model_and_says_what_it_leaves(tmp_path):
    model = _saved(tmp_path)
    plain, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    scorers = {key for key in model.state_dict() if ".scorer." in key}
    assert scorers and told["unexpected_keys"] == scorers
    assert not told["missing_keys"] and plain.config._attn_implementation == "sdpa"
    dense = tiny_model("llama").float()
    assert torch.equal(plain(tokens(60)).logits, dense(tokens(60)).logits)


def test_transformers_own_noise_is_restored(tmp_path):
    _saved(tmp_path)
    before = logging.get_verbosity()
    load_pretrained(tmp_path)
    assert logging.get_verbosity() == before


def _edit(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a model"):
        load_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no model that transformers knows"):
        load_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="sparsek sparsify"):
        load_pretrained(tmp_path / "dense")


def test_wrong_entries_are_refused(tmp_path):
    model = _saved(tmp_path)
    entry = model.config.sparsek
    _edit(tmp_path, sparsek=entry | {"format": 2})
    with pytest.raises(ConfigError, match="another format than 1"):
        load_pretrained(tmp_path)
    _edit(tmp_path, sparsek=entry | {"window": "wide"})
    with pytest.raises(ConfigError, match="window"):
        load_pretrained(tmp_path)
    _edit(tmp_path, sparsek=entry | {"surprise": 1})
    with pytest.raises(ConfigError, match="surprise"):
        load_pretrained(tmp_path)
    _edit(tmp_path, sparsek=entry | {"full_layers": "none"})
    with pytest.raises(CheckpointError, match="scorers are not those"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing scorer", "missing weight", "surplus weight", "other shape"])
def test_wrong_weights_are_refused(tmp_path, change):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if change == "missing scorer":
        del weights["model.layers.0.self_attn.scorer.weight"]
    elif change == "missing weight":
        del weights["model.layers.0.mlp.up_proj.weight"]
    elif change == "surplus weight":
        weights["model.layers.0.mlp.surplus"] = torch.ones(2)
    else:
        weights["model.layers.0.self_attn.scorer.weight"] = torch.ones(1, 24)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)


def test_neither_pickles_nor_remote_code(tmp_path):
    marker = tmp_path / "ran"
    _saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    _edit(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)
    assert not marker.exists()


def test_sparsify_takes_models_only():
    with pytest.raises(ConfigError, match="takes a transformers model"):
        sparsify(torch.nn.Linear(2, 2))


def test_scorers_depend_on_the_seed_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = sparsify(tiny_model("llama"), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = sparsify(tiny_model("llama"), seed=5), sparsify(tiny_model("llama"), seed=6)
    weights = [attention_modules(model)[0].scorer.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
