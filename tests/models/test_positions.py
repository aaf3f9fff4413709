"""How long the contexts were that a model was trained on: written down, kept, and what is made of it."""

from __future__ import annotations

import logging

import pytest

from sparsek_dist.commands.evaluation_target import check_length
from sparsek_dist.models.build import build_model
from sparsek_dist.models.positions import trained_length
from sparsek_dist.models.pretrained import read_spec
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.settings import load
from tests.models.tiny import VOCABULARY, tiny_model

SHAPE = ("hidden_size=8", "intermediate_size=8", "num_layers=1", "num_query_heads=2", "num_kv_heads=1", "head_dim=4")
ATTENTION = ("attention.num_selected=6", "attention.window=5")


def _trained(folder, length: int, *settings: str):
    """The saved description of a model that a run of contexts of `length` tokens makes."""
    config = load(None, [f"data.sequence_length={length}", *ATTENTION, *settings])
    build_model(config, Mesh(), vocab_size=VOCABULARY).save_pretrained(folder)
    return read_spec(folder)


def test_a_model_knows_the_longest_contexts_of_its_runs(tmp_path):
    short = _trained(tmp_path / "short", 32, "model.max_positions=256", *(f"model.{entry}" for entry in SHAPE))
    assert (trained_length(short), short.max_position_embeddings) == (32, 256)
    grown = _trained(tmp_path / "grown", 64, f"model.source={tmp_path / 'short'}")
    assert trained_length(grown) == 64
    assert trained_length(_trained(tmp_path / "tuned", 16, f"model.source={tmp_path / 'grown'}")) == 64


def test_of_a_model_that_does_not_say_all_positions_count(tmp_path):
    tiny_model("llama").float().save_pretrained(tmp_path / "pretrained")
    tuned = _trained(tmp_path / "tuned", 64, f"model.source={tmp_path / 'pretrained'}")
    assert trained_length(tuned) == tuned.max_position_embeddings == 256 and not hasattr(tuned, "trained_length")


def test_longer_contexts_than_it_was_trained_on_are_told(caplog: pytest.LogCaptureFixture):
    spec = tiny_model("llama", trained_length=40).config
    for length, told in (
        (40, None),
        (41, "exceeds the 40 tokens of the contexts it was trained on"),
        (300, "the 256 pos"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_length(spec, length, "--length")
        assert [told in message for message in caplog.messages] == [True] if told else not caplog.messages
