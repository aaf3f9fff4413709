"""What the fast path rests on: thresholds never fall, every key is seen during one interval, blocks share their keys.

Every property is tested on the reference, where it is mathematics, and on `select`, where it is a claim about code.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsek_kernels.reference import selection_reference
from tests.kernels.cases import EDGE_CASES, QUARTERS, Case, document_start, score_entries

INF = float("inf")
ROUNDING = 1e-12
"""Two thresholds over the same scores may be summed in different orders."""


@dataclass(frozen=True)
class Problem:
    """scores [b, s, g] and document_ids [b, s] with the three numbers of the selection."""

    scores: Tensor
    document_ids: Tensor | None
    num_selected: int
    window: int
    support: int

    def same_document(self) -> Tensor:
        b, s, _ = self.scores.shape
        start = document_start(self.document_ids, b, s)
        return (start[:, None, :, None] == start[:, None, None, :]).expand(b, self.scores.shape[2], s, s)

    def age(self) -> Tensor:
        index = torch.arange(self.scores.shape[1])
        return index[:, None] - index[None, :]


@dataclass(frozen=True)
class Found:
    """visible [b, g, s, t] (window and selection), tau [b, g, s] and support_size [b, g, s]."""

    visible: Tensor
    tau: Tensor
    support_size: Tensor


def find_by_reference(problem: Problem) -> Found:
    selection = selection_reference(
        problem.scores, num_selected=problem.num_selected, window=problem.window, support=problem.support,
        document_ids=problem.document_ids,
    )  # fmt: skip
    in_window = problem.same_document() & (problem.age() >= 0) & (problem.age() < problem.window)
    return Found(in_window | selection.selected, selection.tau, selection.support_size)


def find_by_select(problem: Problem) -> Found:
    # Imported here so that the reference's half of the suite runs without the fast path.
    from sparsek_kernels.selection import select

    b, s, _ = problem.scores.shape
    selection = select(
        problem.scores.transpose(1, 2).contiguous(), num_selected=problem.num_selected, window=problem.window,
        support=problem.support, document_start=document_start(problem.document_ids, b, s),
    )  # fmt: skip
    assert selection.visible_until.dtype == torch.int64
    # Entries carried over from an earlier shard and the halo come first: a whole sequence has none, so none is seen.
    assert (selection.visible_until[..., :-s] <= 0).all()
    visible = (problem.age() >= 0) & (torch.arange(s)[:, None] < selection.visible_until[:, :, None, -s:])
    return Found(visible, selection.tau, selection.support_size)


FINDERS = pytest.mark.parametrize("find", [find_by_reference, find_by_select])
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One row and one KV head of up to 40 tokens, with ties, packed into documents of any length from 1."""
    s = draw(st.integers(1, 40))
    entry = draw(st.sampled_from([QUARTERS, score_entries(3), score_entries(3).map(lambda score: score / 32)]))
    scores = torch.tensor(draw(st.lists(entry, min_size=s, max_size=s)), dtype=torch.float64)
    slope = draw(st.sampled_from([0.0, 0.0, 0.25, -0.25]))
    starts = draw(st.lists(st.sampled_from([0] * 9 + [1]), min_size=s, max_size=s))
    num_selected = draw(st.integers(1, 8))
    return Problem(
        scores=(scores + slope * torch.arange(s))[None, :, None],
        document_ids=torch.tensor(starts).cumsum(0)[None],
        num_selected=num_selected,
        window=draw(st.integers(1, 6)),
        support=num_selected + draw(st.integers(1, 20)),
    )


def assert_never_falls(thresholds: Tensor, problem: Problem) -> None:
    """thresholds [b, g, s] along each document."""
    follows = problem.same_document().diagonal(offset=-1, dim1=2, dim2=3)
    before, after = thresholds[..., :-1][follows], thresholds[..., 1:][follows]
    assert (after >= before - ROUNDING).all()


@FINDERS
@property_test
@given(problem=problems())
def test_thresholds_never_fall_within_a_document(find, problem: Problem) -> None:
    found = find(problem)
    assert_never_falls(found.tau, problem)
    selected = found.visible & (problem.age() >= problem.window)
    scores = problem.scores.transpose(1, 2)[:, :, None, :]
    kth_best = torch.where(selected, scores, INF).amin(-1)
    is_full = selected.sum(-1) == problem.num_selected
    assert_never_falls(torch.where(is_full, kth_best, -INF), problem)


@FINDERS
@property_test
@given(problem=problems())
def test_every_key_is_visible_during_one_interval(find, problem: Problem) -> None:
    visible = find(problem).visible
    s = visible.shape[-1]
    assert visible.diagonal(dim1=2, dim2=3).all(), "a key is visible to its own query"
    assert not (visible & ~problem.same_document()).any(), "a key is visible within its document only"
    until = torch.arange(s) + visible.sum(2)
    interval = (problem.age() >= 0) & (torch.arange(s)[:, None] < until[:, :, None, :])
    assert torch.equal(visible, interval)


@FINDERS
@property_test
@given(problem=problems())
def test_gates_of_a_key_never_rise(find, problem: Problem) -> None:
    """One, then fractional during one interval, then zero."""
    found = find(problem)
    gates = (problem.scores.transpose(1, 2)[:, :, None, :] - found.tau[..., None]).clip(0, 1)
    gates = torch.where(found.visible & (problem.age() >= problem.window), gates, 0.0)
    candidate_twice = problem.same_document() & (problem.age() > problem.window)
    rise = gates[:, :, 1:] - gates[:, :, :-1]
    assert (rise[candidate_twice[:, :, 1:]] <= ROUNDING).all()


@FINDERS
@property_test
@given(problem=problems(), block=st.integers(1, 12))
def test_a_block_of_queries_shares_its_keys(find, problem: Problem, block: int) -> None:
    selected = find(problem).visible & (problem.age() >= problem.window)
    assert (selected.sum(-1) <= problem.num_selected).all()
    start = document_start(problem.document_ids, *problem.scores.shape[:2])[0]
    for document in start.unique():
        queries = (start == document).nonzero().flatten()
        for first in range(0, len(queries), block):
            members = queries[first : first + block]
            union = selected[:, :, members].any(2).sum(-1)
            assert (union <= problem.num_selected + len(members)).all()


@FINDERS
@property_test
@given(problem=problems())
def test_every_candidate_is_selected_while_there_are_at_most_k(find, problem: Problem) -> None:
    found = find(problem)
    candidates = problem.same_document() & (problem.age() >= problem.window)
    few = candidates.sum(-1) <= problem.num_selected
    selected = found.visible & (problem.age() >= problem.window)
    assert torch.equal(selected[few], candidates[few])
    assert torch.equal(selected.sum(-1), candidates.sum(-1).clip(max=problem.num_selected))
    assert torch.equal(found.tau == -INF, few)


@property_test
@given(left=problems(), right=problems())
def test_top_s_is_a_monoid(left: Problem, right: Problem) -> None:
    """top-S(A + B) = top-S(top-S(A) + top-S(B)) for pairs (score, index), ties included."""
    a = [(score, index) for index, score in enumerate(left.scores.flatten().tolist())]
    b = [(score, len(a) + index) for index, score in enumerate(right.scores.flatten().tolist())]

    def best(pairs: list[tuple[float, int]]) -> list[tuple[float, int]]:
        return sorted(pairs, reverse=True)[: left.support]

    assert best(a + b) == best(best(a) + best(b))


def assert_select_equals_reference(problem: Problem) -> None:
    expected, found = find_by_reference(problem), find_by_select(problem)
    assert torch.equal(found.visible, expected.visible)
    assert torch.equal(found.support_size, expected.support_size)
    # A threshold is unique only where some gate is fractional: compare what it does to the candidates that count.
    scores = problem.scores.transpose(1, 2)[:, :, None, :]
    selected = expected.visible & (problem.age() >= problem.window)
    gates = [torch.where(selected, (scores - side.tau[..., None]).clip(0, 1), 0.0) for side in (found, expected)]
    torch.testing.assert_close(gates[0], gates[1], rtol=0, atol=1e-11)


@property_test
@given(problem=problems())
def test_select_equals_the_reference(problem: Problem) -> None:
    assert_select_equals_reference(problem)


SELECTION_CASES = [case for case in EDGE_CASES if case.num_selected and not case.name.startswith(("group", "head_dim"))]


@pytest.mark.parametrize("case", SELECTION_CASES, ids=lambda case: case.name)
def test_select_equals_the_reference_on_edge_cases(case: Case) -> None:
    support = 4 * case.num_selected if case.support is None else case.support
    scores = case.inputs()["scores"].detach()
    assert_select_equals_reference(Problem(scores, case.document_ids(), case.num_selected, case.window, support))


def test_select_without_documents_is_one_document() -> None:
    from sparsek_kernels.selection import select

    case = Case("no_documents", g=2)
    scores = case.inputs()["scores"].detach().transpose(1, 2).contiguous()
    zeros = torch.zeros(case.b, case.s, dtype=torch.int64)
    plain = select(scores, num_selected=5, window=4, support=20)
    given_start = select(scores, num_selected=5, window=4, support=20, document_start=zeros)
    assert torch.equal(plain.tau, given_start.tau)
    assert torch.equal(plain.visible_until, given_start.visible_until)
    assert torch.equal(plain.support_size, given_start.support_size)


@property_test
@given(problem=problems())
def test_statistics_of_select(problem: Problem) -> None:
    """Fractional entries, their intervals, and the mass on the selected pairs."""
    from sparsek_kernels.selection import select

    b, s, _ = problem.scores.shape
    expected = selection_reference(
        problem.scores,
        num_selected=problem.num_selected,
        window=problem.window,
        support=problem.support,
        document_ids=problem.document_ids,
    )
    found = select(
        problem.scores.transpose(1, 2).contiguous(),
        num_selected=problem.num_selected,
        window=problem.window,
        support=problem.support,
        document_start=document_start(problem.document_ids, b, s),
    )
    has_tau = expected.tau > -INF
    fractional = (expected.gates > 0) & (expected.gates < 1)
    assert torch.equal(found.num_fractional[has_tau], fractional.sum(-1)[has_tau])
    mass = torch.where(expected.selected, expected.gates, 0.0).sum(-1)
    torch.testing.assert_close(found.selected_mass[has_tau], mass[has_tau], rtol=0, atol=1e-11)

    queries = torch.arange(s)[:, None]
    first, last = found.fractional_from[:, :, None, -s:], found.fractional_until[:, :, None, -s:]
    assert torch.equal((queries >= first) & (queries < last), fractional)
