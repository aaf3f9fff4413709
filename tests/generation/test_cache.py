"""The constant-size cache under transformers' generate(): the same words as without it, in the same memory."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparsek_dist import load_pretrained, sparsify
from sparsek_dist.attention.parallel import ParallelAttention
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.cache import KeptLayer, SparsekCache, cache_bytes
from sparsek_dist.models.families import attention_modules
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Budget
from tests.models.tiny import MODELS, tiny_model, tokens

TIGHT = {"rtol": 0, "atol": 1e-9}
SETTINGS = {"num_selected": 6, "window": 5, "support": 11}


def _model(name: str = "llama", **settings):
    return sparsify(tiny_model(name), **(SETTINGS | settings))


def _feed(model, text, sizes, **arguments):
    """Logits of all tokens, given in pieces of these sizes through one cache."""
    cache, done, parts = SparsekCache(model), 0, []
    mask = arguments.get("attention_mask")
    for size in sizes:
        piece = {} if mask is None else {"attention_mask": mask[:, : done + size]}
        if "position_ids" in arguments:
            piece["position_ids"] = arguments["position_ids"][:, done : done + size]
        parts.append(model(text[:, done : done + size], past_key_values=cache, **piece).logits)
        done += size
    assert done == text.shape[1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("gate", ["straight_through", "value", "key_value"])
@pytest.mark.parametrize("sizes", [[1] * 50, [23] + [1] * 27, [3, 20, 1, 1, 25], [50]], ids=str)
@torch.no_grad()
def test_pieces_equal_one_forward_pass(gate, sizes):
    model, text = _model(gate=gate), tokens(50)
    torch.testing.assert_close(_feed(model, text, sizes), model(text, use_cache=False).logits, **TIGHT)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family(name):
    full = "none" if "sliding" in name or name == "gemma3_text" else "1"
    model, text = _model(name, full_layers=full), tokens(40)
    # Families whose norms round to float32 turn rounding in float64 into rounding in float32.
    torch.testing.assert_close(
        _feed(model, text, [17] + [1] * 12 + [11]), model(text, use_cache=False).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["random", "sink_window", "window"])
@torch.no_grad()
def test_baselines(kind):
    model, text = _model(kind=kind, num_selected=7), tokens(40)
    torch.testing.assert_close(_feed(model, text, [17] + [1] * 23), model(text, use_cache=False).logits, **TIGHT)


@pytest.mark.parametrize("sizes", [[8, 4, 4] + [1] * 24, [40], [3, 3, 3, 1, 30]], ids=str)
@pytest.mark.parametrize("told", [True, False], ids=["positions", "mask only"])
@torch.no_grad()
def test_left_padding_in_pieces(sizes, told):
    model, text = _model(full_layers="1"), tokens(40)
    mask = torch.ones_like(text)
    mask[0, :9] = 0
    mask[1, :2] = 0
    told_positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if told else {}
    logits = _feed(model, text, sizes, attention_mask=mask, **told_positions)
    for row, pads in ((0, 9), (1, 2)):
        alone = model(text[row : row + 1, pads:], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, pads:], alone, rtol=0, atol=1e-9 if told else 1e-5)


def _generate(model, text, **settings):
    return model.generate(text, pad_token_id=0, eos_token_id=None, **({"do_sample": False} | settings))


def test_greedy_far_beyond_the_budget_equals_recomputation():
    model, prompt = _model(full_layers="1"), tokens(20)
    cached = _generate(model, prompt, max_new_tokens=200)
    assert torch.equal(cached, _generate(model, prompt, max_new_tokens=200, use_cache=False))
    assert len(cached[0].unique()) > 3


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family_writes_what_it_would_without_a_cache_in_the_same_memory(name):
    """200 greedy tokens held against one pass over all of them, which no later token changes."""
    model, prompt = _model(name), tokens(20, batch=1)
    told = _generate(model, prompt, max_new_tokens=200, return_dict_in_generate=True, output_logits=True)
    logits = model(told.sequences, use_cache=False).logits[:, 19:-1]
    assert torch.equal(told.sequences[:, 20:], logits.argmax(dim=-1))
    # Some repeat one token, which is no evidence by itself. generate() rounds logits to float32.
    torch.testing.assert_close(torch.stack(told.logits, dim=1).double(), logits, rtol=1e-5, atol=1e-5)
    begun = model(prompt, use_cache=True).past_key_values
    assert cache_bytes(told.past_key_values) == cache_bytes(begun) > 0


def test_sampling_depends_on_the_seed_as_without_a_cache():
    model, texts = _model("qwen3"), []
    for cached in (True, False):
        torch.manual_seed(4)
        texts.append(_generate(model, tokens(20), max_new_tokens=40, use_cache=cached, do_sample=True, temperature=2.0))
    assert torch.equal(*texts)


@pytest.mark.parametrize("full", ["none", "1"])
def test_beam_search_reorders_the_cache(full):
    model, settings = _model(full_layers=full), {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 40}
    cached = _generate(model, tokens(20), **settings)
    assert torch.equal(cached, _generate(model, tokens(20), use_cache=False, **settings))


def test_a_padded_batch_says_what_its_rows_say_alone():
    model, settings = _model("gpt2"), {"max_new_tokens": 30}
    long, short = tokens(24, batch=1), tokens(13, batch=1, seed=5)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 11, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :11] = 0
    together = _generate(model, batch, attention_mask=mask, **settings)
    assert torch.equal(together[:1], _generate(model, long, **settings))
    assert torch.equal(together[1:, 11:], _generate(model, short, **settings))


def test_prompts_that_go_on():
    model, first = _model(full_layers="1"), tokens(20)
    told = _generate(model, first, max_new_tokens=10, return_dict_in_generate=True)
    assert isinstance(told.past_key_values.layers[0], KeptLayer)
    longer = torch.cat([told.sequences, tokens(7, seed=3)], dim=1)
    again = _generate(model, longer, max_new_tokens=10, past_key_values=told.past_key_values)
    assert torch.equal(again, _generate(model, longer, max_new_tokens=10, use_cache=False))


def test_prompt_in_chunks():
    model, settings = _model(), {"max_new_tokens": 10}
    whole = _generate(model, tokens(40), **settings)
    assert torch.equal(whole, _generate(model, tokens(40), prefill_chunk_size=16, **settings))


def test_any_dynamic_cache_becomes_constant_in_size(tmp_path):
    _model().save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    sizes = set()
    for length in (12, 40, 90):
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens(length), past_key_values=cache)
            assert cache.get_seq_length() == length
            model(tokens(1), past_key_values=cache)
        assert all(isinstance(layer, KeptLayer) for layer in cache.layers)
        sizes.add(cache_bytes(cache))
    assert len(sizes) == 1
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


def test_bytes_after_a_hundred_thousand_tokens_are_those_after_a_thousand():
    budget = Budget(num_selected=16, window=16, support=64, gate="straight_through")
    layer, sizes = KeptLayer(ParallelAttention(budget, RankGroup(), "torch")), []
    generator = torch.Generator().manual_seed(0)
    for end in (1000, 100_000):
        while layer.seen < end:
            count = min(end - layer.seen, 9900)
            query, key, value = torch.randn(3, 1, count, 2, 4, generator=generator)
            positions = torch.arange(layer.seen, layer.seen + count).unsqueeze(0)
            with torch.no_grad():
                layer.attend(query, key, value, torch.randn(1, count, 2, generator=generator), positions, scale=0.5)
        cache = SparsekCache.__new__(SparsekCache)
        cache.layers = [layer]
        sizes.append(cache_bytes(cache))
    expected = 2 * (32 * (2 * 4 * 4 + 4) + 64 * (4 + 8) + 16 * 8)
    assert sizes[0] == sizes[1] and expected <= sizes[0] <= expected + 100


def test_rows_can_be_chosen_and_repeated():
    model, text = _model(), tokens(30, batch=3)
    cache = SparsekCache(model)
    with torch.no_grad():
        model(text, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        chosen, more = text[[2, 2, 0, 0]], tokens(4, batch=4, seed=8)
        after = model(more, past_key_values=cache).logits
        expected = model(torch.cat([chosen, more], dim=1), use_cache=False).logits[:, 30:]
    torch.testing.assert_close(after, expected, **TIGHT)


def test_the_first_piece_is_differentiable_and_later_ones_refuse():
    model, text = _model(), tokens(30)
    output = model(text, use_cache=True)
    output.logits.square().sum().backward()
    graded = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(text, use_cache=False).logits.square().sum().backward()
    for once, again in zip(graded, [parameter.grad for parameter in model.parameters()], strict=True):
        torch.testing.assert_close(once, again, **TIGHT)
    with pytest.raises(ConfigError, match="gives no gradients"):
        model(tokens(1), past_key_values=output.past_key_values)


@torch.no_grad()
def test_what_cannot_work_is_refused():
    model, text = _model(), tokens(20)
    with pytest.raises(ConfigError, match="StaticLayer cannot serve"):
        model(text, past_key_values=StaticCache(config=model.config, max_cache_len=40))
    filled = tiny_model("llama")(text, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="filled by dense attention"):
        model(tokens(1), past_key_values=filled)
    cache = model(text, use_cache=True).past_key_values
    for positions in (0, 25):
        with pytest.raises(ConfigError, match="begin a new document"):
            model(tokens(1), past_key_values=cache, position_ids=torch.full((2, 1), positions))
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        _generate(model, tokens(20, batch=1), max_new_tokens=20, prompt_lookup_num_tokens=3)
    shared = ParallelAttention(attention_modules(model)[0].parallel_attention.budget, RankGroup(ranks=(0, 1)), "auto")
    with pytest.raises(ConfigError, match="belongs to one process"):
        KeptLayer(shared)
