"""A run that starts from a pretrained model: what it takes over, what learns, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomConfig, T5Config

from sparsek_dist import load_pretrained, sparsify
from sparsek_dist.config import AttentionConfig, Config, TuneConfig
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.build import build_model, count_parameters, with_shape
from sparsek_dist.models.export import export_model
from sparsek_dist.models.pretrained import read_spec
from sparsek_dist.models.sharing import least_shard
from sparsek_dist.models.source import check_tokenizer
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.settings import load
from tests.models.tiny import VOCABULARY, tiny_model, tokens

ATTENTION = ("attention.num_selected=6", "attention.window=5")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def _config(folder, *overrides: str, length: int = 64) -> Config:
    return load(None, [f"model.source={folder}", f"data.sequence_length={length}", *ATTENTION, *overrides])


def _build(config: Config):
    return build_model(config, Mesh(), vocab_size=VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_dense_source_gets_scorers_and_keeps_its_weights(folder, name):
    dense = tiny_model(name).float()
    dense.save_pretrained(folder)
    model = _build(_config(folder))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())
    assert any(".scorer." in key for key in state) and model.training and not model.config.use_cache
    config = _config(folder)
    assert count_parameters(config, vocab_size=VOCABULARY) == sum(p.numel() for p in model.parameters())
    shape = with_shape(config, vocab_size=VOCABULARY).model
    assert (shape.num_layers, shape.hidden_size, shape.num_query_heads) == (3, dense.config.hidden_size, 4)


def test_converted_source_keeps_its_scorers_and_its_attention(folder):
    converted = sparsify(tiny_model("llama").float(), num_selected=6, window=5, seed=9)
    converted.save_pretrained(folder)
    model = _build(_config(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"attention\.num_selected=6"):
        _build(_config(folder, "attention.num_selected=7"))
    # Defaults that follow from others are stored as numbers, which mean the same, and can be given.
    assert model.config.sparsek["slope"] == 1 / 22 and model.config.sparsek["support"] == 24
    _build(_config(folder, f"attention.slope={1 / 22}", "attention.support=24"))
    with pytest.raises(ConfigError, match=r": set attention\.slope=0\.0454\d+, or start from") as failed:
        _build(_config(folder, "attention.slope=0"))
    _build(_config(folder, "attention.slope=0", re.findall(r"attention\.slope=\S+(?=,)", str(failed.value))[0]))
    with pytest.raises(ConfigError, match=r": set attention\.kind=sparsek attention\.gate=value, or start"):
        _build(_config(folder, "attention.kind=random", "attention.gate=key_value"))


def test_what_a_baseline_does_not_use_is_no_difference(folder):
    sparsify(tiny_model("llama").float(), num_selected=6, window=5, kind="random", gate="key_value").save_pretrained(
        folder
    )
    _build(_config(folder, "attention.kind=random", "attention.slope=0.5", "attention.score_std=3"))
    with pytest.raises(ConfigError, match=r": set attention\.kind=random, or start"):
        _build(_config(folder))


def test_full_attention_from_a_source_is_the_dense_model(folder):
    dense = tiny_model("llama").float()
    dense.save_pretrained(folder)
    model = _build(_config(folder, "attention.kind=full")).eval()
    assert torch.equal(model(tokens(40)).logits, dense(tokens(40)).logits)


def test_scorer_only(folder):
    tiny_model("llama").save_pretrained(folder)
    model = _build(_config(folder, "tune.parameters=scorer"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"model.layers.{i}.self_attn.scorer.weight" for i in range(3)}
    model(tokens(40)).logits.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.requires_grad)
    config = _config(folder, "tune.parameters=scorer")
    assert count_parameters(config, vocab_size=VOCABULARY) == 3 * 2 * 24


@pytest.mark.parametrize(("name", "layers"), [("llama", "all"), ("llama", "q_proj,v_proj"), ("gpt2", "all")])
def test_low_rank_updates_learn_and_merge(folder, tmp_path, name, layers):
    pytest.importorskip("peft")
    tiny_model(name).float().save_pretrained(folder)
    model = _build(_config(folder, "tune.parameters=lora", "tune.lora_rank=3", f"tune.lora_layers={layers}"))
    plain = _build(_config(folder))
    text = tokens(40)
    # Scorers are drawn before the updates, so both models have the same.
    assert torch.equal(model.eval()(text).logits, plain.eval()(text).logits)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name or ".scorer." in name for name in learning)
    # In float64, as the last bit of a score may decide which pair is kept.
    model, plain, generator = model.double(), plain.double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    (tmp_path / "out").mkdir()
    export_model(model, load_tokenizer("bytes"), model.state_dict(), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not [key for key in stored if "lora" in key or "base_layer" in key]
    merged = load_pretrained(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(merged(text).logits, model(text).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(merged(text).logits, plain(text).logits, atol=1e-2)


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_positions_are_stretched(folder, tmp_path, rope):
    tiny_model("llama", max_position_embeddings=32).float().save_pretrained(folder)
    config = _config(folder, f"model.rope={rope}", length=100)
    model = _build(config).eval()
    assert model.config.max_position_embeddings == 128 and model.config.rope_parameters["factor"] == 4
    plain = _build(_config(folder, length=32)).eval()
    assert not torch.allclose(model(tokens(30)).logits, plain(tokens(30)).logits, atol=1e-3)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(load_pretrained(tmp_path / "out")(tokens(90)).logits, model(tokens(90)).logits)


REFUSALS = {
    "model.num_layers=5": "model.num_layers = 5 has no place beside model.source",
    "tune.lora_rank=0": "tune.lora_rank = 0",
    "model.rope=yarn": "model.rope = yarn has nothing to stretch",
    "data.sequence_length=1000": r"exceeds the 256 positions .*model\.rope=yarn",
    "model.source=missing": "neither a folder nor a model",
    "parallel.sequence_degree=16": "leaves shards of 4 tokens, shorter than the window of 5: .* at least 80",
    "attention.full_layers=1 parallel.sequence_degree=4": "4 must divide the 4 query heads and 2 KV heads .*use 1 or 2",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals(folder, override):
    tiny_model("llama").save_pretrained(folder)
    with pytest.raises(Exception, match=REFUSALS[override]):
        _build(_config(folder, *override.split()))


def test_shards_hold_the_windows_of_layers_that_slide(folder):
    tiny_model("qwen2 with sliding layers").save_pretrained(folder)
    assert least_shard(read_spec(folder), AttentionConfig(window=5), degree=2, told="degree") == 9
    with pytest.raises(ConfigError, match=r"shards of 8 tokens, shorter than the window of 9"):
        count_parameters(_config(folder, "parallel.sequence_degree=8"), vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match=r"layer 1 slides a window of 9 tokens, .* over several ranks"):
        count_parameters(_config(folder, "parallel.sequence_degree=2", "attention.kind=full"), vocab_size=VOCABULARY)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_cannot_be_shared(rope):
    spec = tiny_model("llama").config
    spec.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    assert least_shard(spec, AttentionConfig(window=5), degree=1, told="degree") == 1
    for parameters in (spec.rope_parameters, {"full_attention": spec.rope_parameters}):
        spec.rope_parameters = parameters
        with pytest.raises(ConfigError, match=f"rope_type = {rope} of this llama model changes with the length"):
            least_shard(spec, AttentionConfig(window=5), degree=2, told="degree")


def test_architectures_that_are_not_known_cannot_be_shared():
    with pytest.raises(
        ConfigError, match=r"model_type = bloom cannot share .* over degree = 2: use one of .*starcoder2$"
    ):
        least_shard(BloomConfig(n_layer=1), AttentionConfig(window=5), degree=2, told="degree")
    with pytest.raises(ConfigError, match=r"model_type = t5 cannot share .*, or one process$"):
        least_shard(T5Config(), AttentionConfig(kind="full"), degree=2, told="degree")


def test_learned_positions_cannot_be_stretched(folder):
    tiny_model("gpt2").save_pretrained(folder)
    for rope in ("keep", "yarn"):
        with pytest.raises(ConfigError, match="cannot be stretched"):
            _build(_config(folder, f"model.rope={rope}", length=300))


def test_settings_that_need_a_source():
    for override in ("model.rope=yarn", "tune.parameters=lora", "tune.parameters=scorer"):
        with pytest.raises(ConfigError, match=r"set model\.source"):
            load(None, [override])
    with pytest.raises(ConfigError, match="leaves nothing to learn"):
        load(None, ["model.source=x", "tune.parameters=scorer", "attention.kind=random"])


def test_layers_that_are_not_there(folder):
    pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(folder)
    with pytest.raises(ConfigError, match="some of down_proj, gate_proj"):
        _build(_config(folder, "tune.parameters=lora", "tune.lora_layers=c_attn"))


def test_another_tokenizer_is_refused(folder, tmp_path):
    from tests.models.test_tokenizer import word_tokenizer

    tiny_model("llama", vocab_size=257).save_pretrained(folder)
    config = _config(folder)
    check_tokenizer(config, load_tokenizer("bytes"))
    load_tokenizer("bytes").save_pretrained(folder)
    check_tokenizer(config, load_tokenizer("bytes"))
    with pytest.raises(ConfigError, match=f"set data.tokenizer={folder}"):
        check_tokenizer(config, load_tokenizer(str(word_tokenizer(tmp_path / "words", eos_token="</s>"))))
    with pytest.raises(ConfigError, match="has 300 tokens"):
        build_model(config, Mesh(), vocab_size=300)


def test_without_peft_the_cure_is_named(folder, monkeypatch):
    tiny_model("llama").save_pretrained(folder)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"sparsek-dist\[lora\]"):
        _build(replace(_config(folder), tune=TuneConfig(parameters="lora")))
