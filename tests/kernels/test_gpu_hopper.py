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
        Case(f"hopper_group_{group}", s=450, num_selected=70, window=65, h=2 * group, g=2, d=d, documents="halves")
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


FRACTIONAL = [
    Case("hopper_fractional", s=1237, scores="mild", **WIDE),
    Case("hopper_fractional_packed", s=1237, scores="mild", documents="halves", **WIDE),
    Case("hopper_fractional_64", s=1500, num_selected=300, window=64, b=1, h=6, g=2, d=64, scores="mild"),
]
"""Half of the pairs that a chunk lists, and more, have a gate below 1."""
GATED = [
    *FRACTIONAL, Case("hopper_short_documents", s=1237, num_selected=3, window=2, h=4, g=2, d=64, documents="random"),
    Case("hopper_drift", s=1237, scores="drift", **WIDE),
    Case("hopper_plain_and_fractional", s=1500, num_selected=500, window=130, b=1, h=8, g=2, d=128),
]  # fmt: skip
WITHOUT_FRACTIONS = {"hopper_one_token", "hopper_two_tiles", "hopper_k_0_window_1", "hopper_k_0"}
"""Cases without gates between 0 and 1; so are those whose documents are shorter than k."""


def num_fractional(call: Call) -> int:
    return num_fractional_gates(call.tau, call.scores, call.visible_until, call.fractional_from)


def check_fractions(case: Case, calls: list[Call]) -> None:
    if case.name not in WITHOUT_FRACTIONS and (case.documents != "random" or case.num_selected < 10):
        assert min(map(num_fractional, calls)) > 1000


def compare_with_reference(
    attend: Callable[[dict[str, Tensor]], Tensor], case: Case, dtype: torch.dtype, gate: str, gradients: bool
) -> None:
    """Output and gradients of rounded inputs against those of the reference in float64."""
    inputs = {
        n: x.detach().to("cuda", dtype if n != "scores" else torch.float32).requires_grad_()
        for n, x in case.inputs().items()
    }
    exact = {n: x.detach().cpu().double().requires_grad_() for n, x in inputs.items()}
    expected = attention_reference(**exact, gate=gate, **case.settings())
    found = attend(inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.detach().double().cpu(), expected.detach(), rtol=0, atol=8 * eps)
    if not gradients:
        return
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(11)).to(dtype)
    for name, *pair in zip(
        inputs,
        *(
            torch.autograd.grad(out, list(leaves.values()), upstream.to(out), allow_unused=True, materialize_grads=True)
            for out, leaves in ((found, inputs), (expected, exact))
        ),
        strict=True,
    ):
        # Sums of many rounded numbers: an entry is right up to the size of the largest.
        found_grad, exact_grad = (x.double().cpu() for x in pair)
        largest = max(1.0, float(exact_grad.abs().max()))
        torch.testing.assert_close(
            found_grad, exact_grad, rtol=0, atol=8 * eps * largest, msg=lambda text, name=name: f"d{name}: {text}"
        )


def on_hopper(case: Case, gate: str) -> Callable[[dict[str, Tensor]], Tensor]:
    settings = case.settings()
    ids = settings.pop("document_ids")
    ids = None if ids is None else ids.cuda()
    return lambda inputs: sparsek_attention(**inputs, document_ids=ids, gate=gate, backend="triton", **settings)


@pytest.mark.parametrize(
    ("case", "dtype", "gate"),
    [
        *((case, torch.bfloat16, "straight_through") for case in CASES),
        *((case, torch.float16, "value") for case in [*CASES, *GATED]),
        *((case, torch.bfloat16, "value") for case in GATED),
        *((case, torch.float16, "none") for case in FRACTIONAL),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_equals_the_triton_kernel_and_the_reference(
    case: Case, dtype: torch.dtype, gate: str, compared: list[Call]
) -> None:
    compare_with_reference(on_hopper(case, gate), case, dtype, gate, gradients=False)
    assert len(compared) == 1
    check_fractions(case, compared)


@pytest.mark.parametrize("gate", ["none", "straight_through", "value"])
@pytest.mark.parametrize("case", FRACTIONAL, ids=lambda case: case.name)
def test_gradients(case: Case, gate: str, compared: list[Call]) -> None:
    compare_with_reference(on_hopper(case, gate), case, torch.bfloat16, gate, gradients=True)
    assert len(compared) == 1
    check_fractions(case, compared)


@pytest.mark.parametrize("gate", ["straight_through", "value"])
@pytest.mark.parametrize("documents", [None, "random", "halves"])
def test_shards_with_a_carry(
    documents: str | None, gate: str, compared: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a halo and carried pairs."""
    monkeypatch.setattr(
        test_shards, "shard_attention", lambda *args, **settings: shard_attention(*args, backend="triton", **settings)
    )
    case = Case("hopper_shards", s=1237, documents=documents, scores="mild", **WIDE)
    compare_with_reference(
        lambda inputs: test_shards.attend_in_shards(inputs, [333, 800], case, 600, gate),
        case,
        torch.bfloat16,
        gate,
        True,
    )
    assert [call.has_carry for call in compared] == [True, True, True]
    check_fractions(case, compared)
