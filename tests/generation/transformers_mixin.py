"""transformers' own GenerationTesterMixin on a converted Llama; each failure has its reason here, or is one.

    TRANSFORMERS_TESTS=transformers/tests python -m pytest -o addopts= tests/generation/transformers_mixin.py

It needs a checkout of transformers, whose package does not hold its tests, and the package `parameterized`, so it is no
part of the suite: `test_modes.py` asks the same in our words. DENSE=1 runs the Llama as it was, for comparison.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

from sparsek_dist import sparsify

FOLDER, DENSE = os.environ.get("TRANSFORMERS_TESTS"), os.environ.get("DENSE") == "1"
if FOLDER is None:
    pytest.skip("TRANSFORMERS_TESTS names no folder of transformers' tests", allow_module_level=True)

TAKEN_BACK = "rejected tokens must be taken back, and a dropped pair is gone"
STATIC = "a static cache is refused, as this one is of constant size anyway"
SHAPES = "there are no keys [b, g, n, d] in the cache, whose shape is looked at"
EXPLAINED = {
    "test_assisted_decoding_matches_greedy_search_0_random": TAKEN_BACK,
    "test_assisted_decoding_matches_greedy_search_1_same": TAKEN_BACK,
    "test_assisted_decoding_sample": TAKEN_BACK,
    "test_beam_search_generate_dict_outputs_use_cache": SHAPES,
    "test_custom_4d_attention_mask": "visibility follows from positions: masks [b, 1, s, t] are refused",
    "test_generate_compilation_all_outputs": STATIC,
    "test_generate_compile_model_forward_fullgraph": STATIC,
    "test_generate_from_inputs_embeds_with_static_cache": STATIC,
    "test_generate_with_static_cache": STATIC,
    "test_greedy_generate_dict_outputs_use_cache": SHAPES,
    "test_past_key_values_format": SHAPES,
}


def random_ids(shape: list[int], vocab_size: int, rng: object = None, name: str | None = None) -> Tensor:
    return torch.randint(0, vocab_size, tuple(shape))


def random_floats(shape: list[int], scale: float = 1.0, rng: object = None, name: str | None = None) -> Tensor:
    return torch.rand(tuple(shape)) * scale


def load_mixin() -> type:
    """From the folder, as a package of another name than ours. Of its helpers it gets the two that it uses."""
    for name in ("", ".generation"):
        package = sys.modules["transformers_tests" + name] = ModuleType("transformers_tests" + name)
        package.__path__ = [str(FOLDER) + name.replace(".", "/")]
    helpers = sys.modules["transformers_tests.test_modeling_common"] = ModuleType("test_modeling_common")
    helpers.ids_tensor, helpers.floats_tensor = random_ids, random_floats
    return importlib.import_module("transformers_tests.generation.test_utils").GenerationTesterMixin


class SparsekLlama(LlamaForCausalLM, GenerationMixin):
    """A Llama that is converted as soon as it is made, with a budget that the mixin's prompts of 7 tokens exceed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        if not DENSE:
            sparsify(self, num_selected=2, window=2, support=6)


class Inputs:
    """What the mixin asks for: a config, and a batch. Its own pads to the right, which no text can go on from here."""

    batch_size, seq_length, vocab_size, is_training = 13, 7, 99, True

    def get_config(self) -> LlamaConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        return LlamaConfig(vocab_size=self.vocab_size, num_hidden_layers=2, pad_token_id=0, **sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[LlamaConfig, dict[str, Tensor]]:
        ids = random_ids([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril().flip(1)}


class TestGeneration(load_mixin(), unittest.TestCase):
    all_model_classes = all_generative_model_classes = (SparsekLlama,)
    has_attentions, _is_stateful, is_encoder_decoder, test_torch_exportable = True, False, False, False

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = Inputs()


if not DENSE:
    for test, reason in EXPLAINED.items():
        marked = pytest.mark.xfail(strict=True, reason=reason)(getattr(TestGeneration, test))
        setattr(TestGeneration, test, marked)
