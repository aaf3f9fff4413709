"""Decoding one token at a time: every output equals attention over the whole past, and the state never grows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsek_kernels import sparsek_attention
from sparsek_kernels.decode import decode_step, empty_state, extend, prefill, reorder, state_bytes
from sparsek_kernels.reference import attention_reference
from tests.kernels.cases import GATES, Case

STEPS = 300

CASES = [
    Case("decode", num_selected=6, window=5, h=4, g=2, d=4),
    Case("decode_group_1", num_selected=6, window=5, h=2, g=2, d=4),
    Case("decode_group_3", num_selected=7, window=3, h=6, g=2, d=4),
    Case("decode_ties", num_selected=6, window=5, d=4, scores="ties"),
    Case("decode_two_values", num_selected=6, window=5, d=4, scores="two_values"),
    Case("decode_signed_zeros", num_selected=6, window=5, d=4, scores="signed_zeros"),
    Case("decode_constant", num_selected=6, window=5, d=4, scores="constant"),
    Case("decode_increasing", num_selected=6, window=5, d=4, scores="increasing"),
    Case("decode_decreasing", num_selected=6, window=5, d=4, scores="decreasing"),
    Case("decode_narrow", num_selected=6, window=5, support=11, d=4, scores="narrow"),
    Case("decode_wide", num_selected=6, window=5, d=4, scores="wide"),
    Case("decode_drift", num_selected=6, window=5, d=4, scores="drift"),
    Case("decode_support_k_plus_1", num_selected=6, window=5, support=7, d=4, scores="mild"),
    Case("decode_support_beyond_n", num_selected=6, window=5, support=400, d=4, scores="mild"),
    Case("decode_k_beyond_n", num_selected=400, window=5, d=4, b=1),
    Case("decode_k_0", num_selected=0, window=5, d=4),
    Case("decode_k_0_window_1", num_selected=0, window=1, d=4),
    Case("decode_window_1", num_selected=6, window=1, d=4),
    Case("decode_window_1_k_1", num_selected=1, window=1, d=4, scores="ties"),
    Case("decode_window_beyond_n", num_selected=6, window=400, d=4, b=1),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs_of(case: Case, steps: int = STEPS) -> dict[str, Tensor]:
    grown = Case(**{**vars(case), "s": steps})
    return {name: x.detach() for name, x in grown.inputs().items()}


def sizes_of(case: Case) -> dict[str, int]:
    support = 4 * case.num_selected if case.support is None else case.support
    return {"num_selected": case.num_selected, "window": case.window, "support": support}


def fresh_state(case: Case, document_start: Tensor | None = None):
    return empty_state(
        case.b, case.g, case.d, **sizes_of(case), dtype=torch.float64, device="cpu", document_start=document_start
    )


def pieces(inputs: dict[str, Tensor], cuts: list[int]) -> Iterator[dict[str, Tensor]]:
    bounds = [0, *cuts, inputs["query"].shape[1]]
    for first, last in pairwise(bounds):
        yield {name: x[:, first:last] for name, x in inputs.items()}


def decode(inputs: dict[str, Tensor], state, **settings) -> Tensor:
    steps = range(1, inputs["query"].shape[1])
    return torch.cat([decode_step(**piece, state=state, **settings) for piece in pieces(inputs, list(steps))], dim=1)


def without_query(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name != "query"}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", ["key_value", "straight_through"])
@named
def test_every_step_equals_attention_over_the_whole_past(case: Case, gate: str) -> None:
    inputs = inputs_of(case)
    state = fresh_state(case)
    before = state_bytes(state)
    found = decode(inputs, state, gate=gate)
    assert_equal(found, sparsek_attention(**inputs, gate=gate, **sizes_of(case)))
    assert state_bytes(state) == before


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_equals_the_reference(gate: str) -> None:
    case = Case("decode_reference", num_selected=4, window=3, h=4, g=2, d=4, scores="mild")
    inputs = inputs_of(case, 80)
    expected = attention_reference(**inputs, gate=gate, scale=0.7, **sizes_of(case))
    assert_equal(decode(inputs, fresh_state(case), gate=gate, scale=0.7), expected)


def test_gates_differ_where_they_should() -> None:
    case = CASES[0]
    outputs = [decode(inputs_of(case, 60), fresh_state(case), gate=gate) for gate in GATES]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (outputs[i] - outputs[j]).abs().max() > 1e-2
    assert torch.equal(outputs[2], outputs[3])


@pytest.mark.parametrize("cuts", [[1], [3, 4, 9], [40], [7, 8, 33, 71]], ids=str)
@named
def test_prefill_leaves_what_decoding_leaves(case: Case, cuts: list[int]) -> None:
    inputs = inputs_of(case, 83)
    expected = fresh_state(case)
    decode(inputs, expected, gate="none")
    state = None
    for piece in pieces(inputs, cuts):
        state = prefill(**without_query(piece), **sizes_of(case), state=state)
    assert_same_past(state, expected)


def assert_same_past(found, expected) -> None:
    """Equal ring and length, equal selections and supports as sets."""
    for name in ("window_key", "window_value", "window_scores", "length", "document_start"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for kind in ("selected", "support"):
        a, b = (by_position(state, kind) for state in (found, expected))
        for name, x in a.items():
            assert torch.equal(x, b[name]), f"{kind}_{name}"


def by_position(state, kind: str) -> dict[str, Tensor]:
    """The slots in order of position; empty ones, which may hold anything, cleared."""
    positions = getattr(state, f"{kind}_positions")
    order = positions.argsort(dim=-1)
    slots = {name: getattr(state, f"{kind}_{name}").gather(-1, order) for name in ("positions", "scores")}
    if kind == "selected":
        index = order.unsqueeze(-1).expand(-1, -1, -1, state.key.shape[-1])
        filled = (slots["positions"] >= 0).unsqueeze(-1)
        for name in ("key", "value"):
            slots[name] = getattr(state, f"selected_{name}").gather(2, index).masked_fill(~filled, 0)
    return slots


@pytest.mark.parametrize("gate", ["key_value", "straight_through"])
@named
def test_pieces_of_any_size_equal_the_whole(case: Case, gate: str) -> None:
    inputs = inputs_of(case, 130)
    expected = sparsek_attention(**inputs, gate=gate, **sizes_of(case))
    state, outputs = None, []
    parts = list(pieces(inputs, [2, 3, 10, 41, 42, 77, 78, 79, 121]))
    for number, piece in enumerate(parts):
        size = piece["query"].shape[1]
        if state is None:
            state = prefill(**without_query(piece), **sizes_of(case))
            outputs.append(expected[:, :size])
        elif size == 1 or number % 3 == 0:
            outputs.append(decode(piece, state, gate=gate))
        else:
            outputs.append(extend(**piece, state=state, gate=gate))
    assert_equal(torch.cat(outputs, dim=1), expected)


@pytest.mark.parametrize("gate", ["value", "straight_through"])
@pytest.mark.parametrize("how", ["decode", "prefill", "extend"])
def test_left_padding_does_not_exist(how: str, gate: str) -> None:
    case = Case("decode_padding", b=4, num_selected=6, window=5, h=4, g=2, d=4, scores="ties")
    inputs = inputs_of(case, 70)
    start = torch.tensor([0, 3, 17, 30])
    ids = (torch.arange(70) >= start[:, None]).long()
    expected = sparsek_attention(**inputs, gate=gate, document_ids=ids, **sizes_of(case))
    head, middle, tail = pieces(inputs, [12, 25])
    outputs = []
    if how == "prefill":  # the third and fourth row begin with pieces of padding alone
        state = prefill(**without_query(head), **sizes_of(case), document_start=start)
        state = prefill(**without_query(middle), **sizes_of(case), state=state)
        outputs = [expected[:, :25]]
    else:
        state = fresh_state(case, document_start=start)
        for piece in (head, middle):
            run = decode if how == "decode" else lambda inputs, state, gate: extend(**inputs, state=state, gate=gate)
            outputs.append(run(piece, state, gate=gate))
    outputs.append(decode(tail, state, gate=gate))
    found = torch.cat(outputs, dim=1)
    assert found.isfinite().all()
    real = ids.bool()
    assert_equal(found[real], expected[real])


def test_rows_of_different_length_share_a_batch() -> None:
    case = Case("decode_uneven", b=1, num_selected=6, window=5, d=4)
    inputs = inputs_of(case, 90)
    lengths = [3, 20, 61]
    rows = [prefill(**{n: x[:, :m] for n, x in without_query(inputs).items()}, **sizes_of(case)) for m in lengths]
    state = fresh_state(Case(**{**vars(case), "b": 3}))
    for name, x in state.tensors().items():
        x.copy_(torch.cat([getattr(row, name) for row in rows]))
    expected = sparsek_attention(**inputs, gate="value", **sizes_of(case))
    for step in range(25):
        piece = {name: torch.cat([x[:, m + step : m + step + 1] for m in lengths]) for name, x in inputs.items()}
        found = decode_step(**piece, state=state, gate="value")
        assert_equal(found, torch.stack([expected[0, m + step : m + step + 1] for m in lengths]))


def test_reorder_moves_whole_rows() -> None:
    case = Case("decode_beams", b=3, num_selected=4, window=3, d=4)
    inputs = inputs_of(case, 40)
    head, tail = pieces(inputs, [30])
    state = prefill(**without_query(head), **sizes_of(case))
    addresses = {name: x.data_ptr() for name, x in state.tensors().items()}
    order = torch.tensor([2, 0, 2])
    reorder(state, order)
    shuffled = {name: x[order] for name, x in inputs.items()}
    expected = sparsek_attention(**shuffled, gate="value", **sizes_of(case))[:, 30:]
    assert_equal(decode({name: x[order] for name, x in tail.items()}, state, gate="value"), expected)
    assert addresses == {name: x.data_ptr() for name, x in state.tensors().items()}


def test_prefill_leaves_the_given_state_alone() -> None:
    case = CASES[0]
    head, tail = pieces(inputs_of(case, 30), [20])
    state = prefill(**without_query(head), **sizes_of(case))
    before = {name: x.clone() for name, x in state.tensors().items()}
    prefill(**without_query(tail), **sizes_of(case), state=state)
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())


def test_a_step_keeps_no_graph() -> None:
    case = CASES[0]
    grown = Case(**{**vars(case), "s": 1})
    state = fresh_state(case)
    out = decode_step(**grown.inputs(), state=state, gate="value")
    assert not out.requires_grad and not state.key.requires_grad


def test_lower_precision_keeps_scores_in_float32() -> None:
    case = Case("decode_bfloat16", num_selected=6, window=5, h=4, g=2, d=8)
    inputs = inputs_of(case, 60)
    expected = sparsek_attention(**inputs, gate="value", **sizes_of(case))
    sizes = sizes_of(case)
    state = empty_state(case.b, case.g, case.d, **sizes, dtype=torch.bfloat16, device="cpu")
    low = {name: x.to(torch.float32 if name == "scores" else torch.bfloat16) for name, x in inputs.items()}
    found = decode(low, state, gate="value")
    assert state.scores.dtype == torch.float32 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-2)


def test_errors_name_what_is_wrong() -> None:
    case = CASES[0]
    inputs = inputs_of(case, 2)
    one = {name: x[:, :1] for name, x in inputs.items()}
    state = fresh_state(case)
    with pytest.raises(ValueError, match="decode_step takes one"):
        decode_step(**inputs, state=state, gate="value")
    with pytest.raises(ValueError, match="gate = 'hard'"):
        decode_step(**one, state=state, gate="hard")
    with pytest.raises(ValueError, match="NaN"):
        decode_step(**(one | {"scores": one["scores"] * torch.nan}), state=state, gate="value")
    with pytest.raises(ValueError, match="state holds"):
        decode_step(**{name: x.float() for name, x in one.items()}, state=state, gate="value")
    with pytest.raises(ValueError, match="does not fit"):
        decode_step(**{name: x[:1] for name, x in one.items()}, state=state, gate="value")
    with pytest.raises(ValueError, match="window = 9 is not that of the state"):
        prefill(**without_query(one), **(sizes_of(case) | {"window": 9}), state=state)
    with pytest.raises(ValueError, match="first piece"):
        prefill(**without_query(one), **sizes_of(case), state=state, document_start=torch.zeros(case.b).long())
    with pytest.raises(ValueError, match="document_start must be"):
        prefill(**without_query(one), **sizes_of(case), document_start=torch.zeros(case.b + 1).long())
    with pytest.raises(ValueError, match="support = 6"):
        prefill(**without_query(one), **(sizes_of(case) | {"support": 6}))
    for backend, message in (("reference", "whole sequences"), ("fast", "must be")):
        with pytest.raises(ValueError, match=message):
            decode_step(**one, state=state, gate="value", backend=backend)
    assert int(state.length.max()) == 0
