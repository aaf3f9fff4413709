"""The fused decoding step in Triton: outputs and state equal those of the PyTorch step, and it fits the GPUs.

Without a GPU the kernel runs in Triton's interpreter, one program after the other: races are not seen here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsek_kernels import sparsek_attention
from sparsek_kernels.decode import decode_step, extend, prefill
from sparsek_kernels.decode_state import DecodeState, empty_state
from sparsek_kernels.gpu import decode as kernel
from sparsek_kernels.gpu import decode_state as kernel_state
from sparsek_kernels.gpu.ops import decode_op
from tests.kernels.cases import GATES, Case
from tests.kernels.compile_only import compile_kernel
from tests.kernels.real_heads import REAL_HEADS
from tests.kernels.test_decode import assert_same_past, inputs_of, pieces, sizes_of, without_query

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def two_equal_states(case: Case, past: int, start: Tensor | None = None) -> tuple[dict, DecodeState, DecodeState]:
    """The inputs after `past` tokens, and the state of those tokens twice."""
    inputs = {name: x.float().to(DEVICE) for name, x in inputs_of(case, 64).items()}
    head, tail = pieces(inputs, [past])
    found, expected = (
        prefill(**without_query(head), **sizes_of(case), document_start=None if start is None else start.to(DEVICE))
        for _ in range(2)
    )
    return tail, found, expected


def assert_steps_equal(
    case: Case,
    past: int,
    gate: str,
    *,
    steps: int = 5,
    processors: int = 1,
    block: int = 4 if DEVICE == "cpu" else 16,
    start: Tensor | None = None,
) -> None:
    tail, found, expected = two_equal_states(case, past, start)
    for piece in list(pieces(tail, list(range(1, steps + 1))))[:steps]:
        out = kernel.decode_step_triton(
            **piece, state=found, gate=gate, scale=case.d**-0.5, processors=processors, block=block
        )
        torch.testing.assert_close(
            out, decode_step(**piece, state=expected, gate=gate, backend="torch"), rtol=0, atol=3e-6
        )
        assert_same_past(found, expected)
        assert not found.arrivals.any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("past", [1, 4, 9, 40])
def test_steps_equal_those_of_torch(past: int, gate: str) -> None:
    assert_steps_equal(Case("gpu_decode", num_selected=6, window=5, h=4, g=2, d=8), past, gate)


@pytest.mark.parametrize(
    "case",
    [
        Case("gpu_ties", num_selected=5, window=4, b=1, d=8, scores="ties"),
        Case("gpu_two_values", num_selected=5, window=4, b=1, d=8, scores="two_values"),
        Case("gpu_constant", num_selected=5, window=4, b=1, d=8, scores="constant"),
        Case("gpu_signed_zeros", num_selected=5, window=4, b=1, d=8, scores="signed_zeros"),
        Case("gpu_increasing", num_selected=5, window=4, b=1, d=8, scores="increasing"),
        Case("gpu_decreasing", num_selected=5, window=4, b=1, d=8, scores="decreasing"),
        Case("gpu_narrow", num_selected=5, window=4, support=9, b=1, d=8, scores="narrow"),
        Case("gpu_wide", num_selected=5, window=4, b=1, d=8, scores="wide"),
        Case("gpu_k_0", num_selected=0, window=4, b=1, d=8),
        Case("gpu_window_1", num_selected=5, window=1, b=1, d=8),
        Case("gpu_window_1_k_1", num_selected=1, window=1, b=1, d=8, scores="ties"),
        Case("gpu_k_beyond_n", num_selected=70, window=4, b=1, d=8),
        Case("gpu_group_3", num_selected=5, window=4, b=1, h=6, g=2, d=8),
        Case("gpu_head_dim_20", num_selected=5, window=4, b=1, d=20),
        Case("gpu_many_scores", num_selected=5, window=4, support=9000, b=1, d=8, scores="ties"),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("gate", ["key_value", "straight_through"])
def test_edge_cases(case: Case, gate: str) -> None:
    assert_steps_equal(case, 30, gate, steps=4)


@pytest.mark.parametrize(("processors", "block"), [(1, 16), (3, 4), (100, 4), (100, 2)])
def test_any_split_gives_the_same(processors: int, block: int) -> None:
    case = Case("gpu_splits", num_selected=6, window=5, b=1, h=2, g=2, d=8)
    block = block if DEVICE == "cpu" else max(block, 16)  # the least that a matrix product takes
    assert_steps_equal(case, 30, "value", processors=processors, block=block, steps=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels have their bounds built in")
@pytest.mark.parametrize("scores", ["ties", "constant", "random"])
@pytest.mark.parametrize("past", [3, 40])
def test_parts_of_many_scores_tell_the_same(past: int, scores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_state, "MOST_POSITIONS", 4)
    monkeypatch.setattr(kernel_state, "PART", 2)
    assert_steps_equal(
        Case("gpu_parts", num_selected=5, window=4, support=13, b=1, h=2, g=2, d=8, scores=scores), past, "value"
    )


@pytest.mark.parametrize(
    "hint", [float("nan"), float("inf"), float("-inf"), 5.0, 0.0, "best", "below", "just below", "another row's"]
)
def test_any_beginning_of_the_search_leads_to_the_threshold(hint: float | str) -> None:
    """Also that of other scores: beams change places, prompts go on."""
    case = Case("gpu_hint", num_selected=6, window=5, b=2, h=2, g=2, d=8)
    tail, found, expected = two_equal_states(case, 40)
    best = found.selected_scores.amin(-1)
    named = {"best": best, "below": best - 0.999, "just below": best - 1e-6, "another row's": best.flip(0) - 0.3}
    found.tau.copy_(named[hint] if isinstance(hint, str) else torch.full_like(best, hint))
    for piece in list(pieces(tail, [1, 2, 3]))[:3]:
        out = kernel.decode_step_triton(
            **piece, state=found, gate="value", scale=0.4, processors=1, block=4 if DEVICE == "cpu" else 16
        )
        torch.testing.assert_close(
            out, decode_step(**piece, state=expected, gate="value", scale=0.4, backend="torch"), rtol=0, atol=3e-6
        )
        assert torch.isfinite(found.tau).all()


def test_splits_cover_every_row_once() -> None:
    for heads in (1, 3, 8, 64, 1000):
        for rows in (1, 2, 63, 64, 65, 1024, 1536):
            splits, split_rows = kernel.cut(heads, rows, 132, 64)
            assert (splits - 1) * split_rows < rows <= splits * split_rows and split_rows % 64 == 0


def test_programs_fill_the_processors() -> None:
    """Three fifths of them at least, as far as there are blocks of rows, and few wait for a processor."""
    for heads in range(1, 132):
        splits = kernel.cut(heads, 2048, 132, 64)[0]
        assert min(0.6 * 132, 32 * heads) <= splits * heads <= 132 + heads / 2, heads


def test_left_padding() -> None:
    case = Case("gpu_padding", b=3, num_selected=4, window=3, h=2, g=1, d=8)
    assert_steps_equal(case, 8, "value", steps=4, start=torch.tensor([0, 5, 10]))


def test_strided_inputs() -> None:
    case = Case("gpu_strides", num_selected=4, window=3, h=4, g=2, d=8)
    tail, found, expected = two_equal_states(case, 20)
    one = {name: x[:, :1] for name, x in tail.items()}
    # As a fused projection hands them on: [b, h + 2 g, 1, d], the parts cut out of it.
    fused = torch.cat([one["query"], one["key"], one["value"]], dim=2).transpose(1, 2).contiguous().transpose(1, 2)
    query, key, value = fused.split([4, 2, 2], dim=2)
    out = kernel.decode_step_triton(query, key, value, one["scores"], found, gate="value", scale=0.3)
    torch.testing.assert_close(out, decode_step(**one, state=expected, gate="value", scale=0.3, backend="torch"))
    assert_same_past(found, expected)


def test_a_score_that_is_no_number_shows() -> None:
    case = Case("gpu_nan", num_selected=4, window=3, b=1, h=4, g=2, d=8)
    for bad in (torch.nan, torch.inf, -torch.inf):
        tail, state, _ = two_equal_states(case, 20)
        one = {name: x[:, :1].clone() for name, x in tail.items()}
        one["scores"][0, 0, 1] = bad
        out = kernel.decode_step_triton(**one, state=state, gate="none", scale=0.3)
        assert out[:, :, :2].isfinite().all() and out[:, :, 2:].isnan().all()


def test_several_tokens_at_once_go_through_the_attention_kernels() -> None:
    case = Case("gpu_extend", num_selected=6, window=5, h=4, g=2, d=16)
    tail, found, expected = two_equal_states(case, 40, torch.tensor([0, 3]))
    piece = {name: x[:, :7] for name, x in tail.items()}
    outputs = [
        extend(**piece, state=state, gate="key_value", backend=backend)
        for state, backend in ((found, "triton"), (expected, "torch"))
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=3e-6)
    assert_same_past(found, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_backend_triton_runs_in_the_interpreter_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gpu_backend", num_selected=4, window=3, b=1, h=4, g=2, d=8)
    tail, found, expected = two_equal_states(case, 20)
    one = {name: x[:, :1] for name, x in tail.items()}
    called = []
    step = kernel.decode_step_triton
    monkeypatch.setattr(kernel, "decode_step_triton", lambda *a, **k: called.append(1) or step(*a, **k))
    decode_step(**one, state=expected, gate="value")
    assert not called
    decode_step(**one, state=found, gate="value", backend="triton")
    assert called
    assert_same_past(found, expected)
    with pytest.raises(ValueError, match="float64"):
        wide = empty_state(1, 2, 8, **sizes_of(case), dtype=torch.float64, device="cpu")
        decode_step(**{n: x.double() for n, x in one.items()}, state=wide, gate="value", backend="triton")
    with pytest.raises(ValueError, match="support = 20000"):
        sizes = sizes_of(case) | {"support": 20_000}
        large = empty_state(1, 2, 8, **sizes, dtype=torch.float32, device="cpu")
        decode_step(**one, state=large, gate="value", backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="CUDA"):
        decode_step(**one, state=found, gate="value", backend="triton")


POINTERS = {
    **dict.fromkeys(("query", "key", "value", "out", "old_key", "old_value"), "*bf16"),
    **dict.fromkeys(("scores", "partial_out", "partial_norm", "old_scores", "support_scores", "last_tau"), "*fp32"),
    **dict.fromkeys(("selected_positions", "support_positions", "length", "document_start"), "*i64"),
    "arrivals": "*i32",
    "scale": "fp32",
}


@pytest.mark.parametrize(
    ("h", "d", "k", "gate", "arch"),
    [
        (4, 128, 512, "none", 90),
        (4, 128, 1024, "key_value", 90),
        (4, 128, 1024, "value", 80),
        (1, 64, 1024, "none", 80),
        (1, 64, 512, "value", 90),
        (4, 128, 2048, "value", 90),
        (4, 128, 4096, "value", 80),
        *(
            pytest.param(group, d, 1024, "value", arch, marks=pytest.mark.slow)
            for arch in (80, 90)
            for d, group in REAL_HEADS
        ),
    ],
)
def test_fits_without_spilling(h: int, d: int, k: int, gate: str, arch: int) -> None:
    """One KV head of h32 g8 d128 and of h16 g16 d64; of known models, if there is time."""
    state = empty_state(1, 1, d, num_selected=k, window=k, support=4 * k, dtype=torch.bfloat16, device="cpu")
    constants = kernel.constants(state, torch.empty(1, 1, h, d, dtype=torch.bfloat16), gate)
    signature = {name: POINTERS.get(name, "i32") for name in kernel._step.arg_names}
    found = compile_kernel(kernel._step, signature, constants, arch=arch, num_warps=kernel.warps(state))
    assert found.spills == 0
    assert found.shared <= 80 * 1024, "two blocks fit on one processor"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("gate", ["straight_through", "key_value"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_graph_decodes(dtype: torch.dtype, gate: str) -> None:
    case = Case("gpu_graph", s=400, num_selected=64, window=48, h=32, g=8, d=128, b=2)
    inputs = {name: x.detach().cuda() for name, x in case.inputs().items()}
    low = {name: x.to(torch.float32 if name == "scores" else dtype) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in low.items()}
    expected = sparsek_attention(**exact, gate=gate, **sizes_of(case), backend="torch")
    head, tail = pieces(low, [10])
    state = prefill(**without_query(head), **sizes_of(case))
    fixed = {name: x[:, :1].clone() for name, x in tail.items()}
    before = {name: x.clone() for name, x in state.tensors().items()}
    decode_step(**fixed, state=state, gate=gate)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(**fixed, state=state, gate=gate)
    for name, x in state.tensors().items():
        x.copy_(before[name])
    for step, piece in enumerate(pieces(tail, list(range(1, 390)))):
        for name, x in piece.items():
            fixed[name].copy_(x)
        graph.replay()
        torch.testing.assert_close(out[:, 0].double(), expected[:, 10 + step], rtol=2e-2, atol=1e-2)
    assert state.length.tolist() == [400, 400]


def assert_found_within(
    most: int, state: DecodeState, tokens: list[dict], monkeypatch: pytest.MonkeyPatch, error: float = 3e-6
) -> None:
    """Whether decoding is right although the search for the threshold is cut off after so many steps."""
    monkeypatch.setattr(kernel_state, "MOST_STEPS", most)
    expected = DecodeState(**{name: x.clone() for name, x in state.tensors().items()}, window=state.window)
    for token in tokens:
        out = kernel.decode_step_triton(**token, state=state, gate="value", scale=0.4, processors=1, block=4)
        torch.testing.assert_close(
            out, decode_step(**token, state=expected, gate="value", scale=0.4, backend="torch"), rtol=0, atol=error
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels have their bounds built in")
def test_the_threshold_is_found_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the search is a sum that all threads wait for: what made gates cost as much as the attention."""
    case = Case("gpu_few_steps", num_selected=40, window=5, support=150, b=2, h=2, g=2, d=8)
    tail, state, _ = two_equal_states(Case(**{**vars(case), "s": 64}), 40)
    state.support_scores.normal_(generator=torch.Generator().manual_seed(3))
    state.scores[:, :, 5:] = state.support_scores.sort(dim=-1, descending=True).values[:, :, :40]
    first, *others = list(pieces(tail, list(range(1, 12))))[:11]
    assert_found_within(5, state, [first], monkeypatch)
    # From the threshold of the token before, a single step comes close.
    assert_found_within(1, state, others, monkeypatch, error=2e-4)


@pytest.mark.parametrize("gate", ["value", "key_value"])
def test_a_step_compiles_as_one_graph(gate: str) -> None:
    case = Case("gpu_compile", num_selected=6, window=5, b=1, h=2, g=1, d=16)
    tail, found, expected = two_equal_states(case, 20)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    step = torch.compile(decode_step, fullgraph=True, backend=backend)
    for piece in list(pieces(tail, list(range(1, 4))))[:3]:
        out = step(**piece, state=found, gate=gate, backend="triton")
        torch.testing.assert_close(
            out, decode_step(**piece, state=expected, gate=gate, backend="torch"), rtol=0, atol=3e-6
        )
        assert_same_past(found, expected)


def test_the_step_is_an_operator_as_torch_expects_them() -> None:
    case = Case("gpu_opcheck", num_selected=6, window=5, b=1, h=2, g=1, d=16)
    tail, state, _ = two_equal_states(case, 20)
    token = next(iter(pieces(tail, [1])))
    tensors = (*(token[name] for name in ("query", "key", "value", "scores")), *state.tensors().values())
    torch.library.opcheck(decode_op, (*tensors, state.window, "value", 0.25))
