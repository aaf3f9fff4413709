"""The fast SPARSEK operator: equal to the reference in values and gradients, and true to its invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsek_kernels import sparsek
from sparsek_kernels.reference import sparsek_reference
from tests.kernels.cases import QUARTERS, score_entries

SIZES = [(1, 1), (1, 3), (2, 1), (3, 3), (7, 2), (16, 15), (33, 8), (33, 40), (100, 1), (257, 64)]


def random_scores(pattern: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    random = torch.randn(*shape, dtype=torch.float64, generator=generator)
    ties = torch.randint(-3, 4, shape, generator=generator).double() / 4
    return {"random": random, "ties": ties, "huge": 1e30 * random, "tiny": 1e-30 * random, "mild": 0.1 * random}[
        pattern
    ]


@pytest.mark.parametrize("pattern", ["random", "ties", "huge", "tiny", "mild"])
@pytest.mark.parametrize("n, num_selected", SIZES)
def test_values_and_gradients_equal_the_reference(n: int, num_selected: int, pattern: str) -> None:
    scores = random_scores(pattern, 2, 3, n)
    upstream = random_scores("random", 2, 3, n)
    results = []
    for operator in (sparsek, sparsek_reference):
        leaf = scores.clone().requires_grad_()
        gates = operator(leaf, num_selected)
        # The n <= k case is constant; a factor keeps it attached to the leaf, with a zero gradient.
        (gradient,) = torch.autograd.grad((gates * upstream).sum() + 0 * leaf.sum(), leaf)
        results.append((gates.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (1, 1, 2, 9)])
def test_batched_shapes_are_independent_projections(shape: tuple[int, ...]) -> None:
    scores = random_scores("random", *shape)
    gates = sparsek(scores, 3)
    assert gates.shape == scores.shape and gates.dtype == scores.dtype
    for row, result in zip(scores.reshape(-1, 9), gates.reshape(-1, 9), strict=True):
        torch.testing.assert_close(result, sparsek(row, 3), rtol=0, atol=1e-15)


def test_non_contiguous_scores() -> None:
    scores = random_scores("random", 9, 4)
    torch.testing.assert_close(sparsek(scores.T, 3), sparsek(scores.T.contiguous(), 3), rtol=0, atol=0)


def test_input_is_left_alone() -> None:
    scores = random_scores("random", 4, 9)
    before = scores.clone()
    sparsek(scores, 3)
    assert torch.equal(scores, before)


def test_k_1_is_sparsemax() -> None:
    scores = random_scores("random", 50, 12)
    # Martins and Astudillo, arXiv 1602.02068: the support is the largest r with 1 + r z_(r) > z_(1) + ... + z_(r).
    ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(1, 13, dtype=torch.float64)
    support = (1 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    tau = (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support
    torch.testing.assert_close(sparsek(scores, 1), (scores - tau).clip(min=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "scores, num_selected, gates",
    [
        ([0.6, 0.2, -0.5], 1, [0.7, 0.3, 0.0]),
        ([2.0, 0.5, 0.1, -3.0], 2, [1.0, 0.7, 0.3, 0.0]),
        ([3.0, 1.5, 0.5], 2, [1.0, 1.0, 0.0]),
        ([5.0, -5.0, 4.0], 2, [1.0, 0.0, 1.0]),
        ([1e30, 0.3, 0.1], 2, [1.0, 0.6, 0.4]),
        ([-0.0, 0.0], 1, [0.5, 0.5]),
        ([0.3, -7.0], 5, [1.0, 1.0]),
        ([0.3, 0.3, -7.0], 0, [0.0, 0.0, 0.0]),
    ],
)
def test_by_hand(scores: list[float], num_selected: int, gates: list[float]) -> None:
    result = sparsek(torch.tensor(scores, dtype=torch.float64), num_selected)
    torch.testing.assert_close(result, torch.tensor(gates, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, num_selected", [(6, 1), (6, 3), (6, 5), (9, 4)])
def test_gradcheck(n: int, num_selected: int) -> None:
    scores = (0.5 * random_scores("random", 4, n)).requires_grad_()
    # Finite differences are valid only away from the kinks, where a gate enters or leaves (0, 1).
    gates = sparsek_reference(scores.detach(), num_selected)
    fractional = gates[(gates > 0) & (gates < 1)]
    assert len(fractional) > 4 and torch.minimum(fractional, 1 - fractional).min() > 1e-4
    assert torch.autograd.gradcheck(lambda z: sparsek(z, num_selected), (scores,))


@pytest.mark.parametrize("scores", [[3.0, 1.5, 0.5], [9.0, 7.0, -2.0, -8.0], [3.0, 2.0, 0.0, 0.0]])
def test_hard_top_k_has_no_gradient(scores: list[float]) -> None:
    point = torch.tensor(scores, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: sparsek(z, 2), point)
    assert torch.equal(jacobian, torch.zeros_like(jacobian))


def test_float32_keeps_its_dtype_and_precision() -> None:
    scores = random_scores("random", 20, 300).float().requires_grad_()
    gates = sparsek(scores, 40)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.double(), sparsek_reference(scores.double(), 40), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(gates.square().sum(), scores)
    assert gradient.dtype == torch.float32


def test_a_large_common_offset_changes_nothing() -> None:
    scores = random_scores("random", 5, 50)
    torch.testing.assert_close(sparsek(scores + 2.0**20, 7), sparsek(scores, 7), rtol=0, atol=1e-8)


def test_negative_num_selected_is_refused() -> None:
    with pytest.raises(ValueError, match="num_selected"):
        sparsek(torch.zeros(3), -1)


@st.composite
def projections(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Scores with and without ties, at four scales, and k from 0 to beyond n."""
    n = draw(st.integers(1, 24))
    entries = draw(st.lists(st.one_of(QUARTERS, score_entries(3)), min_size=n, max_size=n))
    scale = draw(st.sampled_from([2.0**-16, 1.0, 1.0, 8.0]))
    return scale * torch.tensor(entries, dtype=torch.float64), draw(st.integers(0, n + 2))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(projections())
def test_gates_are_feasible_ordered_and_optimal(projection: tuple[Tensor, int]) -> None:
    scores, num_selected = projection
    gates = sparsek(scores, num_selected)
    assert (gates >= 0).all() and (gates <= 1).all()
    assert abs(gates.sum().item() - min(num_selected, len(scores))) < 1e-10
    higher = scores[:, None] >= scores[None, :]
    assert (gates[:, None] >= gates[None, :])[higher].all()
    torch.testing.assert_close(gates, sparsek_reference(scores, num_selected), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(projections())
def test_jacobian_is_the_stated_one(projection: tuple[Tensor, int]) -> None:
    scores, num_selected = projection
    gates = sparsek(scores, num_selected)
    jacobian = torch.autograd.functional.jacobian(lambda z: sparsek(z, num_selected) + 0 * z, scores)
    inside = ((gates > 0) & (gates < 1)).double()
    expected = torch.diag(inside) - torch.outer(inside, inside) / inside.sum().clip(min=1)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian.sum(-1), torch.zeros_like(scores), rtol=0, atol=1e-12)
