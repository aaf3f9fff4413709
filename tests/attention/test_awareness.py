"""A layer that mixes tokens and does not exchange with other ranks is refused by name."""

import pytest
from torch import nn

from sparsek_dist.attention.awareness import refuse_unaware_layers
from sparsek_dist.errors import ConfigError


class ToyAttention(nn.Module):
    def __init__(self, *, aware: str = "") -> None:
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        if aware:
            setattr(self, aware, object())


class GatedDeltaNet(nn.Module):
    pass


def _model(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"norm": nn.LayerNorm(2), "layers": nn.ModuleList(layers)})


@pytest.mark.parametrize("aware", ["parallel_attention", "ulysses_attention"])
def test_aware_layers_pass(aware):
    refuse_unaware_layers(_model(ToyAttention(aware=aware), nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (ToyAttention(), r"layers\.1 \(ToyAttention\)"),
        (GatedDeltaNet(), r"layers\.1 \(GatedDeltaNet\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 3)), r"layers\.1\.1 \(Conv1d\)"),
        (nn.LSTM(2, 2), r"layers\.1 \(LSTM\)"),
    ],
)
def test_others_are_refused_with_the_cure(layer, told):
    with pytest.raises(ConfigError, match=told + ".*set parallel.sequence_degree to 1"):
        refuse_unaware_layers(_model(ToyAttention(aware="parallel_attention"), layer))
