"""Scores that are not finite end a forward with the layer named, and one look per forward finds them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig
from sparsek_dist.errors import NumericsError
from sparsek_dist.models import build_model
from sparsek_dist.models.families import attention_modules
from sparsek_dist.parallel.mesh import Mesh, RankGroup
from sparsek_kernels.device_checks import DeviceChecks
from tests.distributed import run_distributed

VOCABULARY, BROKEN = 13, 1
SMALL = ModelConfig(hidden_size=16, intermediate_size=16, num_layers=3, num_query_heads=2, num_kv_heads=1, head_dim=8)
MESSAGE = f"layer {BROKEN}: attention scores hold NaN or infinity; the run has diverged"


def _model(*, recompute: bool = False, broken: bool = True, mesh: Mesh | None = None):
    config = Config(model=SMALL, attention=AttentionConfig(num_selected=4, window=3), data=DataConfig())
    config = replace(config, train=replace(config.train, activation_checkpointing=recompute))
    model = build_model(config, mesh or Mesh(), vocab_size=VOCABULARY)
    if broken:
        _break(model)
    return model


def _break(model, value: float = float("nan")) -> None:
    with torch.no_grad():
        attention_modules(model)[BROKEN].scorer.weight[0, 0] = value


def _loss(model) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, position_ids=torch.arange(20).expand(2, -1)).logits.square().sum()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many flags each look found."""
    seen: list[int] = []
    failure = DeviceChecks.failure
    monkeypatch.setattr(DeviceChecks, "failure", lambda checks: (seen.append(len(checks._pending)), failure(checks))[1])
    return seen


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_bad_layer_is_named(training: bool, recompute: bool, value: float) -> None:
    model = _model(recompute=recompute, broken=False).train(training)
    _break(model, value)
    with pytest.raises(NumericsError, match=MESSAGE):
        _loss(model)
    # The decoder without its head, and a copy of the model, which watches for itself.
    with pytest.raises(NumericsError, match=MESSAGE):
        model.base_model(torch.arange(9)[None])
    duplicate = copy.deepcopy(model)
    _break(model, 0.5)
    _loss(model)
    with pytest.raises(NumericsError, match=MESSAGE):
        _loss(duplicate)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_one_look_per_forward_and_none_in_the_backward(recompute: bool, looks: list[int]) -> None:
    model = _model(recompute=recompute, broken=False).train()
    _loss(model).backward()
    assert looks == [SMALL.num_layers]
    _loss(model.eval())
    assert looks == [SMALL.num_layers] * 2


@pytest.mark.parametrize("cached", [True, False])
def test_generate_names_the_layer(cached: bool) -> None:
    with pytest.raises(NumericsError, match=MESSAGE):
        _model().eval().generate(torch.arange(3, 9)[None], max_new_tokens=2, use_cache=cached)
    model = _model(broken=False).eval()
    cache = model(torch.arange(3, 9)[None], use_cache=True).past_key_values
    _break(model)
    with pytest.raises(NumericsError, match=MESSAGE), torch.no_grad():
        model(torch.arange(1)[None], past_key_values=cache, use_cache=True)


def test_a_forward_that_fails_later_says_it_too_and_leaves_nothing_behind(looks: list[int]) -> None:
    model = _model()
    last = model.base_model.layers[-1].mlp
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failed:
        _loss(model)
    assert failed.value.__notes__ == [MESSAGE]
    handle.remove()
    _break(model, 0.5)
    _loss(model)
    assert looks == [SMALL.num_layers] * 2


def test_a_layer_on_its_own_is_looked_at_at_once() -> None:
    model = _model()
    hidden, positions = torch.randn(1, 6, 16), torch.arange(6)[None]
    rotary = model.base_model.rotary_emb(hidden, positions)
    with pytest.raises(NumericsError, match=MESSAGE):
        attention_modules(model)[BROKEN](hidden, position_ids=positions, position_embeddings=rotary)


def _what_ranks_say(rank: int, world_size: int) -> str:
    mesh = Mesh(sequence=RankGroup(ranks=tuple(range(world_size)), rank=rank))
    model = _model(broken=rank == 0, mesh=mesh)
    try:
        _loss(model)
    except NumericsError as error:
        return str(error)
    return "nothing"


def test_no_rank_of_a_sequence_waits_for_ever() -> None:
    """The rank that made the NaN names its layer, after all exchanges of the forward: no rank is left in one.

    Its scores gate what the other rank selects, whose next layer is then the first that is not finite.
    """
    assert run_distributed(_what_ranks_say, 2) == [MESSAGE, MESSAGE.replace("layer 1", "layer 2")]
