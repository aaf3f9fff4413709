"""Statistics of the selection against a count over the whole mask, and pictures that show it."""

from __future__ import annotations

import pytest
import torch

from sparsek_dist.config import AttentionConfig, Config, ModelConfig
from sparsek_dist.models import build_model
from sparsek_dist.models.families import attention_modules
from sparsek_dist.models.observe import observe
from sparsek_dist.parallel.mesh import Mesh
from sparsek_kernels.reference import selection_reference

SMALL = ModelConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=4)


def _observe(**attention):
    model = build_model(Config(model=SMALL, attention=AttentionConfig(**attention)), Mesh(), vocab_size=13)
    caught = []
    for module in attention_modules(model):
        if hasattr(module, "scorer"):
            module.scorer.register_forward_hook(lambda *call: caught.append(call[-1].detach()))
    tokens = torch.randint(0, 13, (2, 90), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(35), torch.arange(55)]).expand(2, -1)
    numbers, figures = observe(model, tokens, positions, Mesh().sequence)
    return numbers, figures, caught


def test_statistics_equal_a_count_over_the_mask():
    numbers, figures, scores = _observe(num_selected=6, window=5, support=9)
    documents = torch.cat([torch.zeros(35), torch.ones(55)]).long().view(1, -1)
    for layer, layer_scores in enumerate(scores):
        expected = selection_reference(
            layer_scores.double(), num_selected=6, window=5, support=9, document_ids=documents
        )
        choosy = expected.tau.isfinite()
        index = torch.arange(90)
        ages = (index.view(-1, 1) - index)[expected.selected.nonzero(as_tuple=True)[2:]].double()
        mass = (expected.gates * expected.selected).sum(-1)[choosy].mean() / 6
        size = expected.support_size[choosy].double()
        name = f"selection/layer_{layer:02d}"
        assert numbers[f"{name}/support_size"] == pytest.approx(float(size.mean()), abs=1e-5)
        assert numbers[f"{name}/selected_mass"] == pytest.approx(float(mass), abs=1e-5)
        assert numbers[f"{name}/mean_age"] == pytest.approx(float(ages.mean()), abs=1e-4)
        assert numbers[f"{name}/support_reached_limit"] == pytest.approx(float((size >= 9).double().mean()), abs=1e-6)
        shade = figures[f"{name}/kept"].axes[0].images[0].get_array()
        kept = expected.selected[0, 0].numpy()
        assert (shade == 1.0).sum() == kept.sum() and bool((shade[kept] == 1.0).all())


@pytest.mark.parametrize("attention", [{"kind": "full"}, {"kind": "window"}, {"num_selected": 0}])
def test_nothing_to_observe_without_a_selection(attention):
    assert _observe(**attention)[:2] == ({}, {})
