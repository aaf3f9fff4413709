"""The reference against brute force: optimality conditions, plain loops, literal numbers and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsek_kernels.reference import attention_reference, dense_reference, selection_reference, sparsek_reference
from tests.kernels.cases import EDGE_CASES, GATES, Case

INF = math.inf


def assert_optimal(gates: Tensor, scores: Tensor, num_selected: int) -> None:
    """The KKT conditions of min ||p - z||^2 on 0 <= p <= 1, sum p = k: necessary and sufficient, as it is convex."""
    slack = 1e-12
    assert (gates >= -slack).all() and (gates <= 1 + slack).all()
    torch.testing.assert_close(gates.sum(-1), torch.full_like(gates.sum(-1), num_selected), rtol=0, atol=1e-10)
    # The multiplier tau of the sum equals z - p inside, is at least z where p = 0, and at most z - 1 where p = 1.
    lower = torch.where(gates < 1 - slack, scores - gates, -INF).amax(-1)
    upper = torch.where(gates > slack, scores - gates, INF).amin(-1)
    assert (lower <= upper + slack * (1 + scores.abs().amax(-1))).all()


@pytest.mark.parametrize("std", [1e-6, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("n, num_selected", [(2, 1), (3, 2), (9, 1), (9, 4), (9, 8), (50, 7), (50, 49)])
def test_operator_satisfies_the_optimality_conditions(n: int, num_selected: int, std: float) -> None:
    scores = std * torch.randn(20, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert_optimal(sparsek_reference(scores, num_selected), scores, num_selected)


def test_operator_is_closer_than_every_other_feasible_point() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(6, dtype=torch.float64, generator=generator)
    best = (sparsek_reference(scores, 2) - scores).square().sum()
    points = torch.rand(5000, 6, dtype=torch.float64, generator=generator)
    points = 2 * points / points.sum(-1, keepdim=True)
    points = points[(points <= 1).all(-1)]
    assert len(points) > 1000
    assert ((points - scores).square().sum(-1) >= best).all()


@pytest.mark.parametrize(
    "scores, num_selected, gates",
    [
        ([0.6, 0.2, -0.5], 1, [0.7, 0.3, 0.0]),
        ([2.0, 0.5, 0.1, -3.0], 2, [1.0, 0.7, 0.3, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], 3, [0.75, 0.75, 0.75, 0.75]),
        ([3.0, 1.5, 0.5], 2, [1.0, 1.0, 0.0]),
        ([5.0, -5.0, 4.0], 2, [1.0, 0.0, 1.0]),
        ([1e30, 0.3, 0.1], 2, [1.0, 0.6, 0.4]),
        ([1e30, 1e30, 1e30, 1e30], 1, [0.25, 0.25, 0.25, 0.25]),
        ([-0.0, 0.0], 1, [0.5, 0.5]),
        ([0.3, -7.0], 2, [1.0, 1.0]),
        ([0.3, -7.0], 5, [1.0, 1.0]),
        ([0.3, 0.3, -7.0], 0, [0.0, 0.0, 0.0]),
        ([0.6, -INF, 0.2, -INF], 1, [0.7, 0.0, 0.3, 0.0]),
        ([0.6, -INF], 1, [1.0, 0.0]),
    ],
)
def test_operator_by_hand(scores: list[float], num_selected: int, gates: list[float]) -> None:
    result = sparsek_reference(torch.tensor(scores, dtype=torch.float64), num_selected)
    torch.testing.assert_close(result, torch.tensor(gates, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "scores, num_selected, jacobian",
    [
        ([2.0, 0.5, 0.1, -3.0], 2, [[0, 0, 0, 0], [0, 0.5, -0.5, 0], [0, -0.5, 0.5, 0], [0, 0, 0, 0]]),
        ([3.0, 1.5, 0.5], 2, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        # tau = 0: the second entry sits exactly on the lower border and the third exactly on the upper.
        ([0.5, 0.0, 1.0, 0.5], 2, [[0.5, 0, 0, -0.5], [0, 0, 0, 0], [0, 0, 0, 0], [-0.5, 0, 0, 0.5]]),
        ([0.3, 0.1], 2, [[0, 0], [0, 0]]),
        ([0.3, 0.3], 0, [[0, 0], [0, 0]]),
    ],
)
def test_jacobian_by_hand(scores: list[float], num_selected: int, jacobian: list[list[float]]) -> None:
    point = torch.tensor(scores, dtype=torch.float64)
    result = torch.autograd.functional.jacobian(lambda z: sparsek_reference(z, num_selected), point)
    torch.testing.assert_close(result, torch.tensor(jacobian, dtype=torch.float64), rtol=0, atol=1e-15)


def test_operator_gradcheck() -> None:
    scores = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparsek_reference(z, 4), (scores,))


def test_selection_by_hand() -> None:
    scores = torch.tensor([0.4, 0.9, 0.4, -1.0, 0.4, 0.0], dtype=torch.float64)[None, :, None]
    selection = selection_reference(scores, num_selected=2, window=2, support=3)
    # Query 4 has the candidates 0, 1, 2: of the equal scores 0.4 the later key, 2, is selected.
    selected = [[], [], [0], [0, 1], [1, 2], [1, 2]]
    found = [selection.selected[0, 0, i].nonzero().flatten().tolist() for i in range(6)]
    assert found == selected
    # Query 4: 0.9 - tau + 2 (0.4 - tau) = 2 gives tau = -0.1, and 0.9 + 0.1 is exactly saturated.
    gates = torch.tensor([0.5, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(selection.gates[0, 0, 4], gates, rtol=0, atol=1e-15)
    torch.testing.assert_close(selection.gates[0, 0, 5], gates, rtol=0, atol=1e-15)
    tau = torch.tensor([-INF, -INF, -INF, -INF, -0.1, -0.1], dtype=torch.float64)
    torch.testing.assert_close(selection.tau[0, 0], tau, rtol=0, atol=1e-15)
    assert selection.support_size[0, 0].tolist() == [0, 0, 1, 2, 3, 3]


def test_support_budget_cuts_ties_by_index() -> None:
    selection = selection_reference(torch.zeros(1, 6, 1).double(), num_selected=1, window=1, support=2)
    assert selection.gates[0, 0, 5].tolist() == [0, 0, 0, 0.5, 0.5, 0]
    assert selection.selected[0, 0, 5].tolist() == [False, False, False, False, True, False]


def attention_by_loops(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, gate: str, num_selected: int, window: int,
    support: int | None, document_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """Section by section what a reader of the definition would write with lists, in Python floats."""
    support = 4 * num_selected if support is None else support
    b, s, h, d = query.shape
    output = torch.zeros_like(query)
    for row, head, i in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(s)).tolist():
        shared = head // (h // key.shape[2])
        document = [0] * s if document_ids is None else document_ids[row].tolist()
        past = [j for j in range(i + 1) if document[j] == document[i]]
        u = scores[row, :, shared].tolist()
        ranked = sorted((j for j in past if j <= i - window), key=lambda j: (u[j], j), reverse=True)
        gates = {j: 1.0 for j in past if j > i - window}
        tau = threshold_by_breakpoints([u[j] for j in ranked[:support]], num_selected)
        gates |= {j: min(max(u[j] - tau, 0.0), 1.0) for j in ranked[:num_selected]}
        logits = {j: torch.dot(query[row, i, head], key[row, j, shared]).item() / math.sqrt(d) for j in gates}
        if gate == "key_value":
            logits = {j: gates[j] * logit for j, logit in logits.items()}
        total = sum(math.exp(logit) for logit in logits.values())
        for j, logit in logits.items():
            output[row, i, head] += math.exp(logit) / total * gates[j] * value[row, j, shared]
    return output


def threshold_by_breakpoints(scores: list, num_selected: int):
    """tau with sum clip(z - tau, 0, 1) = k, by linear interpolation between two breakpoints; of floats or Fractions."""
    if len(scores) <= num_selected:
        return -INF

    def mass(tau):
        return sum(min(max(z - tau, 0), 1) for z in scores)

    breakpoints = sorted({*scores, *(z - 1 for z in scores)})
    for left, right in pairwise(breakpoints):
        if mass(left) >= num_selected > mass(right):
            return left + (mass(left) - num_selected) / (mass(left) - mass(right)) * (right - left)
    # Only k = 0 gets here: no mass at all, above every score.
    return breakpoints[-1]


@pytest.mark.parametrize("seed", range(60))
def test_borders_are_exact_on_a_grid(seed: int) -> None:
    """Gates of exactly 0 and 1 are no part of the interior: on multiples of 1/4 they are frequent and decidable."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (5 + seed % 13,), generator=generator).double() / 4
    num_selected = 1 + seed % 5
    exact = [Fraction(score) for score in scores.tolist()]
    tau = threshold_by_breakpoints(exact, num_selected)
    gates = [1 if tau == -INF else min(max(z - tau, 0), 1) for z in exact]
    inside = torch.tensor([float(0 < gate < 1) for gate in gates], dtype=torch.float64)
    jacobian = torch.diag(inside) - torch.outer(inside, inside) / inside.sum().clip(min=1)

    found = sparsek_reference(scores, num_selected)
    torch.testing.assert_close(
        found, torch.tensor([float(gate) for gate in gates], dtype=torch.float64), rtol=0, atol=1e-15
    )
    found = torch.autograd.functional.jacobian(lambda z: sparsek_reference(z, num_selected), scores)
    torch.testing.assert_close(found, jacobian, rtol=0, atol=1e-15)


@pytest.mark.parametrize("gate", ["value", "key_value"])
@pytest.mark.parametrize("case", [case for case in EDGE_CASES if case.s < 42 and case.d == 8], ids=lambda c: c.name)
def test_attention_equals_plain_loops(case: Case, gate: str) -> None:
    case = replace(case, b=1, d=2, h=min(case.h, 3 * case.g))
    inputs = {name: tensor.detach() for name, tensor in case.inputs().items()}
    expected = attention_by_loops(**inputs, gate=gate, **case.settings())
    result = attention_reference(**inputs, gate=gate, **case.settings())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def distance_to_kinks(scores: Tensor, **settings) -> float:
    """How far scores may move before a gate enters or leaves (0, 1), or two scores swap."""
    gaps = scores.sort(dim=1).values.diff(dim=1).amin().item()
    selection = selection_reference(scores, **settings)
    has_tau = selection.tau > -INF
    margin = (scores.transpose(1, 2)[:, :, None, :] - selection.tau[..., None])[has_tau]
    return min(gaps, margin.abs().amin().item(), (margin - 1).abs().amin().item())


@pytest.mark.parametrize("gate", ["value", "key_value", "none"])
@pytest.mark.parametrize("documents", [None, "halves"])
def test_attention_gradcheck(gate: str, documents: str | None) -> None:
    case = Case("reference_gradcheck", s=9, num_selected=2, window=2, support=4, b=1, h=2, g=1, d=2, scores="mild")
    inputs = case.inputs()
    document_ids = None if documents is None else (torch.arange(9) >= 3).long()[None]
    settings = {"num_selected": 2, "window": 2, "support": 4, "document_ids": document_ids}
    assert distance_to_kinks(inputs["scores"].detach(), **settings) > 1e-4

    def attend(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attention_reference(query, key, value, scores, gate=gate, **settings)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


def test_straight_through_is_hard_forward_and_value_backward() -> None:
    case = Case("straight_through", g=2, h=4)
    outputs, gradients = {}, {}
    for gate in GATES:
        inputs = case.inputs()
        output = attention_reference(**inputs, gate=gate, **case.settings())
        upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
        outputs[gate] = output.detach()
        gradients[gate] = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    torch.testing.assert_close(outputs["straight_through"], outputs["none"], rtol=0, atol=1e-15)
    assert (outputs["value"] - outputs["none"]).abs().max() > 1e-2
    for straight_through, gated in zip(gradients["straight_through"], gradients["value"], strict=True):
        assert torch.equal(straight_through, gated)
    assert gradients["none"][3] is None
    assert gradients["value"][3].abs().max() > 1e-3


def test_unselected_pairs_of_the_support_get_a_gradient() -> None:
    scores = torch.tensor([0.5, 0.4, 0.3, 0.0], dtype=torch.float64)[None, :, None].requires_grad_()
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 4, 1, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    output = attention_reference(query, key, value, scores, num_selected=1, window=1, support=3, gate="value")
    (gradient,) = torch.autograd.grad(output[0, 3].sum(), scores)
    # Query 3 selects key 0 and its support is {0, 1, 2}: the gradient is g (1 - 1/3, -1/3, -1/3, 0).
    direction = gradient.flatten() / gradient.flatten()[0]
    torch.testing.assert_close(direction, torch.tensor([1, -0.5, -0.5, 0], dtype=torch.float64))


@pytest.mark.parametrize("documents", [None, "random"])
def test_everything_selected_is_dense(documents: str | None) -> None:
    case = Case("dense", s=19, num_selected=19, window=3, h=6, g=2, documents=documents)
    inputs = case.inputs()
    scores = inputs.pop("scores")
    dense = dense_reference(**inputs, document_ids=case.document_ids(), scale=0.3)
    for gate in GATES:
        sparse = attention_reference(**inputs, scores=scores, gate=gate, scale=0.3, **case.settings())
        torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-14)


@pytest.mark.parametrize("documents", [None, "random"])
def test_dense_equals_torch(documents: str | None) -> None:
    case = Case("dense_torch", s=19, h=6, g=2, documents=documents)
    inputs = case.inputs()
    inputs.pop("scores")
    ids = case.document_ids() if documents else torch.zeros(case.b, case.s)
    mask = torch.ones(case.s, case.s, dtype=torch.bool).tril() & (ids[:, None, :, None] == ids[:, None, None, :])
    heads_first = [tensor.transpose(1, 2) for tensor in inputs.values()]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    result = dense_reference(**inputs, document_ids=case.document_ids())
    torch.testing.assert_close(result, expected.transpose(1, 2), rtol=0, atol=1e-13)


def test_unknown_gate_is_refused() -> None:
    inputs = Case("unknown_gate").inputs()
    with pytest.raises(ValueError, match="gate is 'soft'"):
        attention_reference(**inputs, num_selected=1, window=1, gate="soft")
