"""The operator in Triton: equal to the PyTorch one in values and gradients, and a well-behaved torch operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsek_kernels.gpu import operator as kernel
from sparsek_kernels.operator import sparsek
from sparsek_kernels.reference import sparsek_reference
from tests.kernels.cases import make_scores
from tests.kernels.compile_only import compile_kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def draw(pattern: str, rows: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rows * n)
    return make_scores(pattern, (1, n, rows), generator)[0].T.contiguous().to(dtype).to(DEVICE)


def values_and_gradient(project, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    gates = project(leaf, k)
    upstream = torch.randn(gates.shape, generator=torch.Generator().manual_seed(5)).to(gates)
    return gates.detach(), torch.autograd.grad(gates, leaf, upstream)[0]


def assert_equal(scores: Tensor, k: int, against=sparsek) -> None:
    atol = TOLERANCE[scores.dtype]
    names = ("gates", "gradient")
    found, expected = (values_and_gradient(project, scores, k) for project in (kernel.project, against))
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("k", "dtype"), [(1, torch.float64), (4, torch.float32), (19, torch.float64)])
@pytest.mark.parametrize(
    "pattern",
    ["random", "wide", "mild", "narrow", "ties", "two_values", "constant", "signed_zeros", "increasing", "steep"],
)
def test_equals_the_torch_operator(pattern: str, k: int, dtype: torch.dtype) -> None:
    assert_equal(draw(pattern, 2, 37, dtype), k)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (2, 1), (5, 0), (5, 5), (5, 9), (5, 4), (16, 8)])
def test_borders(n: int, k: int) -> None:
    assert_equal(draw("random", 2, n), k)


def test_rows_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 16)
    for pattern in ("random", "ties", "narrow"):
        assert_equal(draw(pattern, 2, 53), 11)


def test_equals_the_reference() -> None:
    assert_equal(draw("random", 3, 29), 6, against=sparsek_reference)


@pytest.mark.parametrize("offset", [1e6, -1e6, 1e12])
def test_large_scores_keep_exact_gates(offset: float) -> None:
    scores = draw("ties", 2, 24) + offset
    gates = kernel.project(scores, 5)
    torch.testing.assert_close(gates, sparsek(scores - offset, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top", [1e38, 3e-39, -1e38])
def test_extreme_float32(top: float) -> None:
    scores = torch.tensor([[top, 0.3, 0.1, -0.2, -1e38, -1e-39]], device=DEVICE)
    assert_equal(scores, 2)


def test_a_tiny_newton_step_from_the_wrong_piece_is_not_the_end() -> None:
    # The search starts 1e-8 below 40 equal entries, where f is steep; tau lies 1e-5 above them, where it is not.
    corner, tau = -0.5 + 1e-8, -0.5 + 1e-8 + 1e-5
    half = (1 + tau) / 2 + tau
    scores = torch.tensor([0.0, half, half, *[corner] * 40], dtype=torch.float64, device=DEVICE)
    assert_equal(scores[None], 1)
    torch.testing.assert_close(kernel.project(scores, 1)[0], scores.new_tensor(-tau), rtol=0, atol=1e-12)


def test_lower_precision() -> None:
    scores = draw("mild", 2, 33, torch.float16)
    gates = kernel.project(scores, 7)
    assert gates.dtype == torch.float16
    torch.testing.assert_close(gates, sparsek(scores, 7), rtol=0, atol=1e-3)


def test_any_shape_and_stride() -> None:
    scores = draw("random", 6, 20).view(2, 3, 20).transpose(0, 1)[..., ::2]
    assert_equal(scores, 3)
    assert_equal(draw("random", 1, 12)[0], 3)
    assert kernel.project(torch.empty(0, 7, device=DEVICE), 3).shape == (0, 7)


def separated(rows: int, n: int) -> Tensor:
    """Scores whose gates stay clear of 0 and 1 when nudged."""
    steps = torch.linspace(-0.9, 0.9, n, dtype=torch.float64)
    return torch.stack([steps[torch.randperm(n, generator=torch.Generator().manual_seed(i))] for i in range(rows)])


def test_gradcheck() -> None:
    scores = separated(2, 7).to(DEVICE).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kernel.project(z, 3), (scores,), eps=1e-6, atol=1e-8)


def test_opcheck() -> None:
    scores = separated(2, 7).to(DEVICE)
    torch.library.opcheck(kernel.project, (scores.clone().requires_grad_(), 3))
    torch.library.opcheck(kernel.project, (scores.T, 1))
    torch.library.opcheck(kernel.project_backward, (kernel.project(scores, 3), torch.ones_like(scores)))


@pytest.mark.parametrize(("kind", "arch"), [("fp32", 80), ("bf16", 90), ("fp64", 90)])
def test_fits_without_spilling(kind: str, arch: int) -> None:
    sizes = {"BLOCK": kernel.BLOCK}
    pointers = dict.fromkeys(("scores", "gates", "grad", "grad_scores"), f"*{kind}") | {"n": "i32", "k": "i32"}
    for function, constants in ((kernel._forward, sizes | {"WIDE": kind == "fp64"}), (kernel._backward, sizes)):
        signature = {name: pointers[name] for name in function.arg_names if name not in constants}
        assert compile_kernel(function, signature, constants, arch=arch).spills == 0
