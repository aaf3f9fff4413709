"""The forward for Hopper without a GPU: run by numpy (gluon_numpy.py) in float64, held against the reference.

The backward that follows it is the real one, in Triton's interpreter: what it reads of the forward must be right, too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsek_kernels import shard_attention
from sparsek_kernels.gpu import attention, call, hopper, ops
from sparsek_kernels.gpu.call import Call
from sparsek_kernels.gpu.tiles import Tile, Tiles
from tests.kernels import test_shards
from tests.kernels.cases import Case, num_fractional_gates
from tests.kernels.gluon_numpy import KernelInNumpy
from tests.kernels.test_gpu_attention import ON_GPU, assert_close, expected_of, on_triton, values_and_gradients

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(ON_GPU, reason="Triton's kernels would run on the GPU: see test_gpu_hopper.py"),
]

FRACTIONAL = Case("hopper_fractional", s=75, num_selected=30, window=5, support=61, h=4, g=2, b=1, scores="mild")
CASES = [
    (FRACTIONAL, "value"), (FRACTIONAL, "straight_through"),
    (Case("hopper_packed", s=75, num_selected=3, window=2, h=3, documents="random", scores="mild"), "value"),
    (Case("hopper_long", s=150, num_selected=40, window=30, b=1, scores="mild"), "value"),
    (Case("hopper_some_plain", s=110, num_selected=40, window=6, b=1), "value"),
    (Case("hopper_one_token", s=1), "value"), (Case("hopper_k_0", s=40, num_selected=0, window=12), "none"),
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every forward is that for Hopper, with small tiles; the calls so far."""
    seen: list[Call] = []
    tile = Tile(rows=16, columns=8, warps=4, stages=1)
    tiles = Tiles(chunk=32, span=64, forward=tile, grad_query=tile, grad_selected=tile, grad_window=tile)
    for module in (call, ops):
        monkeypatch.setattr(module, "tiles_for", lambda *_, **__: tiles)
    monkeypatch.setattr(hopper, "HOPPER_FORWARD", {8: tile})
    monkeypatch.setattr(hopper, "kernel_for_hopper", KernelInNumpy)
    monkeypatch.setattr(attention, "hopper_forward_applies", lambda made: seen.append(made) or True)
    return seen


def tables_of(made: Call) -> tuple[Tensor, Tensor, Tensor]:
    return made.scores, made.visible_until, made.fractional_from


@pytest.mark.parametrize(("case", "gate"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_output_and_gradients(case: Case, gate: str, calls: list[Call]) -> None:
    found = values_and_gradients(on_triton, case, gate=gate, **case.settings())
    assert_close(found, expected_of(case, gate))
    assert [num_fractional_gates(made.tau, *tables_of(made)) > 20 for made in calls] == [
        case.s > 1 and case.num_selected > 0
    ]


def test_shards_with_a_carry(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a halo and carried pairs, whose gates are below 1, too."""
    monkeypatch.setattr(
        test_shards, "shard_attention", lambda *args, **settings: shard_attention(*args, backend="triton", **settings)
    )
    case = Case("hopper_shards", s=80, num_selected=20, window=7, h=4, g=2, b=1, scores="mild", documents="halves")
    inputs = case.inputs()
    output = test_shards.attend_in_shards(inputs, [25, 61], case, 60, "value")
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).double()
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream)
    found = {"output": output.detach(), **dict(zip(("dquery", "dkey", "dvalue", "dscores"), gradients, strict=True))}
    assert_close(found, expected_of(case, "value"))
    assert [made.has_carry for made in calls] == [True, True, True]
    of_carried = [
        num_fractional_gates(made.tau, *(x[..., : made.carry_scores.shape[-1]] for x in tables_of(made)))
        for made in calls
    ]
    assert [number > 20 for number in of_carried] == [False, True, True]
