"""What transformers asks of every generating model in its own tests (GenerationTesterMixin, not part of its package).

docs/pretrained.md says which modes a model with SPARSEK attention does not have, and why.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationMixin
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from sparsek_dist import sparsify
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.cache import KeptLayer
from tests.models.tiny import tiny_model, tokens


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request):
    return sparsify(tiny_model(request.param), num_selected=5, window=4, support=9)


def _generate(model, **settings):
    torch.manual_seed(0)
    settings = {"inputs": tokens(15), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(eos_token_id=None, **settings)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "top k and p": {"do_sample": True, "top_k": 8, "top_p": 0.9},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7, 8]]},
    "from nothing": {"inputs": torch.full((2, 1), 1)},
}


@pytest.mark.parametrize("mode", MODES)
def test_with_a_cache_as_without(model, mode):
    cached = _generate(model, **MODES[mode])
    assert torch.equal(cached, _generate(model, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("beams", [1, 2])
def test_dictionary_of_outputs(model, beams):
    told = _generate(
        model,
        num_beams=beams,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert isinstance(told, GenerateDecoderOnlyOutput if beams == 1 else GenerateBeamDecoderOnlyOutput)
    assert len(told.scores) == len(told.logits) == len(told.hidden_states) == 12
    assert all(isinstance(layer, KeptLayer) for layer in told.past_key_values.layers)
    assert told.past_key_values.get_seq_length() == 15 + 11
    if beams == 1:
        plain = model(told.sequences[:, :-1], use_cache=False).logits[:, 14:]
        torch.testing.assert_close(torch.stack(told.logits, dim=1), plain.float(), rtol=0, atol=1e-5)


def test_attention_weights_are_none_as_they_never_exist(model):
    # As with transformers' sdpa: whoever asks for them is told to take another attention.
    told = model(tokens(15), output_attentions=True)
    assert told.attentions is None or all(weights is None for weights in told.attentions)


def test_from_embeddings(model):
    embedded = model.get_input_embeddings()(tokens(15))
    from_ids = _generate(model)
    from_embeddings = _generate(model, inputs=None, inputs_embeds=embedded)
    assert torch.equal(from_ids[:, 15:], from_embeddings)


def test_logits_of_the_last_tokens_only(model):
    whole = model(tokens(15)).logits
    torch.testing.assert_close(model(tokens(15), logits_to_keep=3).logits, whole[:, -3:], rtol=0, atol=1e-10)


def test_it_is_a_generating_model(model):
    assert isinstance(model, GenerationMixin) and model.can_generate()


REFUSED = {
    "static cache": ({"cache_implementation": "static"}, "StaticLayer cannot serve"),
    "prompt lookup": ({"inputs": tokens(15, batch=1), "prompt_lookup_num_tokens": 2}, "cannot take tokens back"),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_that_it_does_not_have_are_refused(model, mode):
    settings, message = REFUSED[mode]
    with pytest.raises(ConfigError, match=message):
        _generate(model, **settings)


def test_assisted_generation_is_refused(model):
    assistant = sparsify(tiny_model("llama"), num_selected=5, window=4)
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        _generate(model, inputs=tokens(15, batch=1), assistant_model=assistant, max_new_tokens=30)
