"""The fast attention on CPU: equal to the reference in the output and in every gradient, and free of leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsek_kernels import sparsek_attention
from sparsek_kernels.reference import attention_reference, dense_reference
from tests.kernels.cases import EDGE_CASES, GATES, Case

PACKED = Case("packed", s=61, b=2, num_selected=6, window=5, support=17, h=4, g=2, documents="random")


def attend(inputs: dict[str, Tensor], **settings) -> Tensor:
    return sparsek_attention(**inputs, backend="torch", **settings)


def output_and_gradients(attention, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """The output and the gradients of all four inputs under one fixed upstream; a missing gradient counts as zero."""
    output = attention(inputs, **settings)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(output.dtype)
    leaves = list(inputs.values())
    gradients = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def reference(inputs: dict[str, Tensor], **settings) -> Tensor:
    return attention_reference(**inputs, **settings)


def assert_equals_reference(case: Case, gate: str, **extra) -> None:
    found = output_and_gradients(attend, case.inputs(), gate=gate, **case.settings(), **extra)
    expected = output_and_gradients(reference, case.inputs(), gate=gate, **case.settings(), **extra)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda case: case.name)
def test_edge_case(case: Case, gate: str) -> None:
    assert_equals_reference(case, gate)


@pytest.mark.parametrize("seed", range(12))
def test_random_packing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    num_selected = draw(1, 12)
    case = Case(
        name=f"random_packing_{seed}", s=draw(20, 140), b=2, h=2, g=2, d=4, num_selected=num_selected,
        window=draw(1, 12), support=num_selected + draw(1, 30), documents="random",
        scores=["random", "ties", "drift", "mild"][seed % 4],
    )  # fmt: skip
    assert_equals_reference(case, "key_value" if seed % 3 == 0 else "value")


def test_cases_exercise_every_input() -> None:
    found = output_and_gradients(attend, PACKED.inputs(), gate="value", **PACKED.settings())
    for name, tensor in found.items():
        assert tensor.abs().max() > 1e-2, name


def test_default_arguments_are_the_documented_ones() -> None:
    inputs = Case("defaults", num_selected=3).inputs()
    expected = output_and_gradients(reference, inputs, num_selected=3, window=4, support=12, gate="value")
    for backend in ({}, {"backend": "auto"}, {"backend": "torch"}):
        found = output_and_gradients(
            lambda tensors, backend=backend: sparsek_attention(**tensors, num_selected=3, window=4, **backend), inputs
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_scale_is_used(gate: str) -> None:
    assert_equals_reference(PACKED, gate, scale=0.7)


def test_int32_document_ids() -> None:
    settings = PACKED.settings()
    expected = attend(PACKED.inputs(), **settings)
    settings["document_ids"] = settings["document_ids"].int()
    assert torch.equal(attend(PACKED.inputs(), **settings), expected)


def test_non_contiguous_inputs() -> None:
    inputs = PACKED.inputs()
    strided = {
        name: t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for name, t in inputs.items()
    }
    assert not strided["query"].is_contiguous()
    expected = output_and_gradients(attend, inputs, gate="value", **PACKED.settings())
    found = output_and_gradients(attend, strided, gate="value", **PACKED.settings())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-14)


@pytest.mark.parametrize("trained", ["query", "key", "value", "scores"])
def test_gradient_of_one_input_alone(trained: str) -> None:
    expected = output_and_gradients(attend, PACKED.inputs(), gate="value", **PACKED.settings())
    inputs = {name: tensor.detach().requires_grad_(name == trained) for name, tensor in PACKED.inputs().items()}
    output = attend(inputs, gate="value", **PACKED.settings())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).double()
    (gradient,) = torch.autograd.grad(output, inputs[trained], upstream)
    torch.testing.assert_close(gradient, expected[f"d{trained}"], rtol=0, atol=1e-14)


def test_runs_are_bit_equal_and_inputs_are_left_alone() -> None:
    inputs = PACKED.inputs()
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    first = output_and_gradients(attend, inputs, gate="value", **PACKED.settings())
    second = output_and_gradients(attend, inputs, gate="value", **PACKED.settings())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_no_grad_gives_the_same_output() -> None:
    expected = attend(PACKED.inputs(), **PACKED.settings()).detach()
    with torch.no_grad():
        assert torch.equal(attend(PACKED.inputs(), **PACKED.settings()), expected)


def test_everything_selected_is_dense() -> None:
    case = replace(PACKED, num_selected=61, support=62)
    inputs = case.inputs()
    output = attend(inputs, gate="value", **case.settings())
    inputs.pop("scores")
    torch.testing.assert_close(output, dense_reference(**inputs, document_ids=case.document_ids()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["value", "key_value", "none"])
@pytest.mark.parametrize("documents", [None, "halves"])
def test_gradcheck(gate: str, documents: str | None) -> None:
    case = Case("gradcheck", s=9, num_selected=2, window=2, support=4, b=1, d=2, scores="mild", documents=documents)

    def attend_positionally(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return sparsek_attention(query, key, value, scores, gate=gate, backend="torch", **case.settings())

    assert torch.autograd.gradcheck(attend_positionally, tuple(case.inputs().values()))


def test_straight_through_has_the_gradients_of_value() -> None:
    found = {gate: output_and_gradients(attend, PACKED.inputs(), gate=gate, **PACKED.settings()) for gate in GATES}
    torch.testing.assert_close(found["straight_through"]["output"], found["none"]["output"], rtol=0, atol=1e-14)
    for name in ("dquery", "dkey", "dvalue", "dscores"):
        torch.testing.assert_close(found["straight_through"][name], found["value"][name], rtol=0, atol=1e-14)
    assert not found["none"]["dscores"].any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", [PACKED, Case("float32_long", s=301, b=1, num_selected=20, window=16)], ids=str)
def test_float32_error_is_that_of_plain_torch(case: Case, gate: str) -> None:
    exact = output_and_gradients(reference, case.inputs(), gate=gate, **case.settings())
    plain = output_and_gradients(reference, case.inputs(torch.float32), gate=gate, **case.settings())
    found = output_and_gradients(attend, case.inputs(torch.float32), gate=gate, **case.settings())
    for name, tensor in exact.items():
        assert found[name].dtype == torch.float32, name
        error = (found[name].double() - tensor).norm()
        budget = 2 * (plain[name].double() - tensor).norm() + 1e-7 * tensor.norm()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def test_float32_hard_top_k_gives_the_scores_no_gradient() -> None:
    """A gate that is 1 or 0 up to rounding must not pass for a fractional one."""
    case = Case("float32_hard", s=60, num_selected=8, window=2, b=3)
    inputs = case.inputs(torch.float32)
    # Gaps of at least 1 and no common binade: u - 1 is not always a float32 number.
    gaps = 1 + torch.rand(60, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    inputs["scores"] = (20 - gaps.cumsum(0))[order].expand(3, 60)[..., None].contiguous().requires_grad_()
    found = output_and_gradients(attend, inputs, gate="value", **case.settings())
    assert not found["dscores"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scores", ["random", "narrow", "ties", "offset", "drift"])
def test_score_gradients_sum_to_zero(scores: str, dtype: torch.dtype) -> None:
    """What one pair gains in mass the others lose, in every document: the rows of the Jacobian sum to zero."""
    case = Case("conservation", s=150, b=2, g=2, num_selected=9, window=5, scores=scores, documents="halves")
    found = output_and_gradients(attend, case.inputs(dtype), gate="value", **case.settings())["dscores"]
    for document in (found[:, :75], found[:, 75:]):
        assert document.abs().sum() > 1e-2
        assert (document.sum(1).abs() <= 100 * torch.finfo(dtype).eps * document.abs().sum(1)).all()


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_with_float32_scores(gate: str) -> None:
    inputs = {
        name: t.detach().bfloat16() if name != "scores" else t.detach()
        for name, t in PACKED.inputs(torch.float32).items()
    }
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    exact = output_and_gradients(reference, exact_inputs, gate=gate, **PACKED.settings())
    found = output_and_gradients(attend, inputs, gate=gate, **PACKED.settings())
    for name, tensor in exact.items():
        assert found[name].dtype == (torch.float32 if name == "dscores" else torch.bfloat16), name
        # The unit roundoff of bfloat16 is 2^-8; products are rounded a handful of times on the way.
        assert (found[name].double() - tensor).norm() <= 4 * 2.0**-8 * tensor.norm(), name


@pytest.mark.parametrize("name", ["query", "key", "value", "scores"])
@pytest.mark.parametrize("position", [1, 30, 64, 100])
def test_later_tokens_do_not_reach_earlier_outputs(name: str, position: int) -> None:
    case = Case("causal", s=111, b=1, num_selected=9, window=6, support=14, h=2, g=2)
    with torch.no_grad():
        expected = attend(case.inputs(), gate="value", **case.settings())
        inputs = case.inputs()
        # Large positive scores make every later token a winner, if it is looked at too early.
        inputs[name][:, position:] = inputs[name][:, position:].abs() + 5
        output = attend(inputs, gate="value", **case.settings())
    assert torch.equal(output[:, :position], expected[:, :position])
    assert not torch.equal(output[:, position:], expected[:, position:])


@pytest.mark.parametrize("perturbed", [0, 1, 2])
@pytest.mark.parametrize("lengths", [(30, 40, 27), (64, 1, 64), (1, 90, 1), (64, 64, 5)])
def test_documents_do_not_reach_each_other(lengths: tuple[int, int, int], perturbed: int) -> None:
    case = Case("packing_leak", s=sum(lengths), b=1, num_selected=7, window=6, support=12, h=2, g=2)
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    settings = {**case.settings(), "document_ids": document_ids, "gate": "value"}
    changed = document_ids[0] == perturbed

    inputs = case.inputs()
    with torch.no_grad():
        expected = attend(inputs, **settings)
        for tensor in inputs.values():
            tensor[:, changed] = 3 * tensor[:, changed] + 5
        output = attend(inputs, **settings)
    assert torch.equal(output[:, ~changed], expected[:, ~changed])
    assert not torch.equal(output[:, changed], expected[:, changed])


@pytest.mark.parametrize("read", [0, 1, 2])
def test_gradients_stay_within_their_document(read: int) -> None:
    case = Case("gradient_leak", s=97, b=1, num_selected=7, window=6, support=12, h=2, g=2)
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 40, 27]))[None]
    inputs = case.inputs()
    output = attend(inputs, gate="value", **{**case.settings(), "document_ids": document_ids})
    output[:, document_ids[0] == read].square().sum().backward()
    for name, tensor in inputs.items():
        assert not tensor.grad[:, document_ids[0] != read].any(), name
        assert tensor.grad[:, document_ids[0] == read].any(), name


def test_packed_documents_equal_separate_calls() -> None:
    case = Case("separate", s=97, b=1, num_selected=7, window=6, support=12, h=2, g=2)
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 40, 27]))[None]
    settings = {**case.settings(), "gate": "value"}
    packed = attend(case.inputs(), **{**settings, "document_ids": document_ids})
    for document in range(3):
        alone = {name: tensor[:, document_ids[0] == document] for name, tensor in case.inputs().items()}
        torch.testing.assert_close(
            packed[:, document_ids[0] == document], attend(alone, **settings), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 17, 36])
@pytest.mark.parametrize("trained", [True, False], ids=["training", "eval"])
def test_scores_that_are_not_finite_are_refused(bad: float, position: int, trained: bool) -> None:
    case = Case("not_finite")
    inputs = {name: tensor.detach().clone() for name, tensor in case.inputs().items()}
    inputs["scores"][1, position, 0] = bad
    inputs = {name: tensor.requires_grad_(trained) for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match=r"(?i)scores.*(nan|inf|finite)"):
        attend(inputs, **case.settings())


@pytest.mark.parametrize(
    "argument, change",
    [
        ("query", lambda t: t[0]),
        ("query", lambda t: t[:1]),
        ("query", lambda t: t[:, :-1]),
        ("query", lambda t: t[:, :, :3]),
        ("query", lambda t: t[..., :-1]),
        ("query", lambda t: t.float()),
        ("query", lambda t: t.long()),
        ("key", lambda t: t[0]),
        ("key", lambda t: t[:1]),
        ("key", lambda t: t[:, :-1]),
        ("key", lambda t: t[:, :, :1]),
        ("key", lambda t: t[..., :-1]),
        ("key", lambda t: t.float()),
        ("value", lambda t: t[0]),
        ("value", lambda t: t[:, :-1]),
        ("value", lambda t: t[:, :, :1]),
        ("value", lambda t: t[..., :-1]),
        ("value", lambda t: t.float()),
        ("scores", lambda t: t[0]),
        ("scores", lambda t: t[:1]),
        ("scores", lambda t: t[:, :-1]),
        ("scores", lambda t: t[:, :, :1]),
        ("scores", lambda t: t[..., None]),
        ("scores", lambda t: t.long()),
    ],
)
def test_wrong_tensors_are_refused(argument: str, change) -> None:
    inputs = {name: tensor.detach() for name, tensor in PACKED.inputs().items()}
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=argument):
        attend(inputs, **PACKED.settings())


@pytest.mark.parametrize(
    "argument, bad",
    [
        ("num_selected", -1),
        ("window", 0),
        ("window", -3),
        ("support", 6),
        ("support", 2),
        ("support", 0),
        ("gate", "soft"),
        ("backend", "magic"),
        ("document_ids", torch.zeros(2, 60, dtype=torch.int64)),
        ("document_ids", torch.zeros(61, dtype=torch.int64)),
        ("document_ids", torch.zeros(2, 61)),
        ("document_ids", torch.arange(61, 0, -1).expand(2, 61)),
    ],
    ids=lambda value: "tensor" if isinstance(value, Tensor) else str(value),
)
def test_wrong_settings_are_refused(argument: str, bad) -> None:
    inputs = {name: tensor.detach() for name, tensor in PACKED.inputs().items()}
    with pytest.raises(ValueError, match=argument):
        sparsek_attention(**inputs, **{"backend": "torch", **PACKED.settings(), argument: bad})
