"""Attention through the real Triton kernels: in the interpreter here, compiled where there is a GPU.

In float64 the interpreter's matrix products are exact enough to hold the kernels against the reference at 1e-10. Bfloat16
products are wrong in the interpreter, so half precision is tested on GPUs alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsek_kernels import shard_attention, sparsek_attention
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.gpu import call, ops
from sparsek_kernels.gpu.tiles import Tile, Tiles, tiles_for
from sparsek_kernels.reference import attention_reference, dense_reference
from tests.kernels.cases import EDGE_CASES, GATES, Case
from tests.kernels.test_shards import attend_in_shards

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
TOLERANCE = 2e-5 if ON_GPU else 1e-10

QUICK = {
    "one_token", "shorter_than_window", "k_0_packed", "k_beyond_n_packed", "window_1_k_1_packed", "support_reached",
    "ties_packed", "signed_zeros", "increasing_by_2", "decreasing_packed", "documents_of_one_token", "group_3", "group_5",
    "head_dim_80", "length_63", "long_increasing", "long_packed_drift", "long_wide_window_many_selected",
}  # fmt: skip
CASES = [pytest.param(c, marks=[] if c.name in QUICK or ON_GPU else pytest.mark.slow, id=c.name) for c in EDGE_CASES]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and spans even in short sequences; the interpreter's cost is per block, not per number."""
    if not ON_GPU:
        tile = Tile(rows=32, columns=32, warps=4, stages=1)
        tiles = Tiles(chunk=32, span=64, forward=tile, grad_query=tile, gated_columns=16, grad_selected=tile,
                      grad_window=tile)  # fmt: skip
        for module in (call, ops):
            monkeypatch.setattr(module, "tiles_for", lambda *_: tiles)


def values_and_gradients(attend, case: Case, **settings) -> dict[str, Tensor]:
    inputs = {name: x.detach().to(DEVICE, DTYPE).requires_grad_() for name, x in case.inputs().items()}
    output = attend(inputs, **settings)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(output)
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def on_triton(inputs: dict[str, Tensor], **settings) -> Tensor:
    ids = settings.pop("document_ids")
    return sparsek_attention(**inputs, document_ids=None if ids is None else ids.to(DEVICE), backend="triton", **settings)


def expected_of(case: Case, gate: str) -> dict[str, Tensor]:
    """By the reference, in float64 on the CPU."""
    inputs = case.inputs()
    output = attention_reference(**inputs, gate=gate, **case.settings())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).double()
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double().cpu(), tensor.double(), rtol=0, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_edge_case(case: Case) -> None:
    gate = GATES[len(case.name) % 4]
    assert_close(values_and_gradients(on_triton, case, gate=gate, **case.settings()), expected_of(case, gate))


@pytest.mark.parametrize("gate", GATES)
def test_every_gate(gate: str) -> None:
    case = Case("gates", s=75, num_selected=6, window=5, support=17, h=4, g=2, documents="random")
    found = values_and_gradients(on_triton, case, gate=gate, **case.settings())
    assert_close(found, expected_of(case, gate))
    for name, tensor in found.items():
        assert (gate == "none" and name == "dscores") or tensor.abs().max() > 1e-2, name
