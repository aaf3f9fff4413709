"""The forward written for Hopper against the Triton kernel that it stands in for, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsek_kernels import shard_attention, sparsek_attention
from sparsek_kernels.gpu import attention
from sparsek_kernels.gpu.call import Call
from sparsek_kernels.reference import attention_reference
from tests.kernels import test_shards
from tests.kernels.cases import Case

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_triton_kernel_and_the_reference(case: Case, dtype: torch.dtype, compared: list[Call]) -> None:
    exact = {n: x.detach().to(dtype).double() if n != "scores" else x.detach() for n, x in case.inputs().items()}
    expected = attention_reference(**exact, **case.settings())
    settings = case.settings()
    ids = settings.pop("document_ids")
    inputs = {n: x.to("cuda", dtype if n != "scores" else torch.float32) for n, x in exact.items()}
    found = sparsek_attention(
        **inputs, document_ids=None if ids is None else ids.cuda(), backend="triton", **settings
    ).double()
    assert len(compared) == 1
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("documents", [None, "random"])
def test_shards_with_a_carry(documents: str | None, compared: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a halo and carried pairs."""
    monkeypatch.setattr(
        test_shards, "shard_attention", lambda *args, **settings: shard_attention(*args, backend="triton", **settings)
    )
    case = Case("hopper_shards", s=1237, documents=documents, **WIDE)
    inputs = {
        n: x.detach().to("cuda", torch.bfloat16 if n != "scores" else torch.float32) for n, x in case.inputs().items()
    }
    found = test_shards.attend_in_shards(inputs, [333, 800], case, 600, "straight_through")
    assert [call.has_carry for call in compared] == [True, True, True]
    exact = {n: x.double().cpu() for n, x in inputs.items()}
    expected = attention_reference(**exact, **case.settings())
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=0.06)
