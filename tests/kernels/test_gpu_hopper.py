"""The forward written for Hopper against the Triton kernel that it stands in for, and against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsek_kernels import shard_attention, sparsek_attention
from sparsek_kernels.gpu import attention
from sparsek_kernels.gpu.call import Call
from sparsek_kernels.reference import attention_reference
from tests.kernels import test_shards
from tests.kernels.cases import Case, num_fractional_gates

WIDE = {"num_selected": 150, "window": 130, "h": 8, "g": 2, "d": 128, "b": 1}
CASES = [
    Case("hopper_long", s=1237, **WIDE),
    Case("hopper_packed", s=1237, documents="random", **WIDE),
    Case("hopper_halves", s=999, documents="halves", **WIDE),
    Case("hopper_increasing", s=700, scores="increasing", **WIDE),
    Case("hopper_decreasing", s=700, scores="decreasing", **WIDE),
    Case("hopper_one_token", s=1, **WIDE),
    Case("hopper_two_tiles", s=63, **WIDE),
    Case("hopper_k_0_window_1", s=300, num_selected=0, window=1, h=4, d=128),
    Case("hopper_k_0", s=700, num_selected=0, window=200, h=4, d=64),
    Case("hopper_window_1", s=515, num_selected=70, window=1, h=4, d=64),
    Case("hopper_k_beyond_n", s=301, num_selected=400, window=20, d=64, documents="random"),
    Case("hopper_heads", s=600, num_selected=140, window=70, b=1, h=32, g=8, d=128),
    *(
        Case(f"hopper_group_{group}", s=450, num_selected=70, window=65, h=2 * group, g=2, d=d, documents="random")
        for group, d in [(1, 64), (2, 128), (4, 64), (5, 128), (8, 64), (16, 128), (64, 64), (64, 128)]
    ),
]


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every forward runs by both kernels and must agree; the calls so far."""
    calls: list[Call] = []
    forward, applies = attention.forward, attention.hopper_forward_applies

    def both(call: Call) -> tuple[Tensor, Tensor]:
        assert applies(call)
        out, lse = forward(call)
        again = forward(call)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "hopper_forward_applies", lambda call: False)
            triton_out, triton_lse = forward(call)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])
        torch.testing.assert_close(lse, triton_lse, rtol=1e-5, atol=1e-5)
        tolerance = 2 * torch.finfo(out.dtype).eps
        torch.testing.assert_close(out, triton_out, rtol=tolerance, atol=tolerance)
        calls.append(call)
        return out, lse

    monkeypatch.setattr(attention, "forward", both)
    return calls


GATES = ["none", "straight_through", "value"]
GATED = [
    # Half of the pairs a chunk lists, and more, have a gate below 1.
    Case("hopper_fractional", s=1237, scores="mild", **WIDE),
    Case("hopper_fractional_64", s=1500, num_selected=300, window=64, h=6, g=2, d=64, scores="mild"),
    Case("hopper_fractional_packed", s=1237, scores="mild", documents="halves", **WIDE),
    Case("hopper_drift", s=1237, scores="drift", **WIDE),
    Case("hopper_plain_and_fractional", s=1500, num_selected=500, window=130, b=1, h=8, g=2, d=128),
]
WITHOUT_FRACTIONS = {"hopper_increasing", "hopper_one_token", "hopper_two_tiles", "hopper_k_0_window_1", "hopper_k_0"}
"""Cases that may lack gates between 0 and 1; so may those with short documents."""


def half(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the GPU, as leaves; scores stay float32."""
    return {
        n: x.detach().to("cuda", dtype if n != "scores" else torch.float32).requires_grad_() for n, x in inputs.items()
    }


def results(attend: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    output = attend(inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(torch.bfloat16).to(output)
    grads = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True, materialize_grads=True)
    found = {"output": output.detach(), **dict(zip(inputs, grads, strict=True))}
    return {name: x.double().cpu() for name, x in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> None:
    """Outputs entry by entry; of gradients, which sum many rounded numbers, relative to their largest entry, too."""
    torch.testing.assert_close(found["output"], expected["output"], rtol=0, atol=8 * eps)
    for name in found.keys() - {"output"}:
        largest = max(float(expected[name].abs().max()), 1.0)
        apart = float((found[name] - expected[name]).abs().max())
        assert apart <= 8 * eps * largest, f"d{name}: {apart} of {largest}"


def num_fractional(call: Call) -> int:
    return num_fractional_gates(call.tau, call.scores, call.visible_until, call.fractional_from)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [*CASES, *GATED], ids=lambda case: case.name)
def test_equals_the_triton_kernel_and_the_reference(
    case: Case, dtype: torch.dtype, gate: str, compared: list[Call]
) -> None:
    settings, inputs = case.settings(), half(case.inputs(), dtype)
    exact = {n: x.detach().cpu().double().requires_grad_() for n, x in inputs.items()}
    expected = results(lambda x: attention_reference(**x, gate=gate, **settings), exact)
    ids = settings.pop("document_ids")
    ids = None if ids is None else ids.cuda()
    found = results(lambda x: sparsek_attention(**x, document_ids=ids, gate=gate, backend="triton", **settings), inputs)
    (call,) = compared
    assert num_fractional(call) > 1000 or case.name in WITHOUT_FRACTIONS or case.documents == "random"
    assert_near(found, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("documents", [None, "random", "halves"])
def test_shards_with_a_carry(
    documents: str | None, gate: str, compared: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a halo and carried pairs."""
    monkeypatch.setattr(
        test_shards, "shard_attention", lambda *args, **settings: shard_attention(*args, backend="triton", **settings)
    )
    case = Case("hopper_shards", s=1237, documents=documents, scores="mild", **WIDE)
    inputs = half(case.inputs(), torch.bfloat16)
    found = results(lambda x: test_shards.attend_in_shards(x, [333, 800], case, 600, gate), inputs)
    assert [call.has_carry for call in compared] == [True, True, True]
    assert documents == "random" or min(map(num_fractional, compared)) > 1000
    exact = {n: x.detach().cpu().double().requires_grad_() for n, x in inputs.items()}
    expected = results(lambda x: attention_reference(**x, gate=gate, **case.settings()), exact)
    assert_near(found, expected, torch.finfo(torch.bfloat16).eps)
