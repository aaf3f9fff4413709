"""Attention through the real Triton kernels: in the interpreter here, compiled where there is a GPU.

In float64 the interpreter's matrix products are exact enough to hold the kernels against the reference at 1e-10.
Bfloat16 products are wrong in the interpreter, so half precision is tested on GPUs alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsek_kernels import dispatch, shard_attention, sparsek_attention
from sparsek_kernels.device_checks import DeviceChecks
from sparsek_kernels.dispatch import resolve
from sparsek_kernels.gpu import attention, call, ops
from sparsek_kernels.gpu.tiles import Tile, Tiles
from sparsek_kernels.reference import attention_reference
from tests.kernels.cases import EDGE_CASES, GATES, Case

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
TOLERANCE = 2e-5 if ON_GPU else 1e-10

QUICK = {
    "one_token", "shorter_than_window", "k_0_packed", "k_beyond_n_packed", "window_1_k_1_packed", "support_reached",
    "ties_packed", "signed_zeros", "increasing_by_2", "decreasing_packed", "documents_of_one_token", "group_3",
    "group_5", "head_dim_80", "length_63", "long_increasing", "long_packed_drift", "long_wide_window_many_selected",
}  # fmt: skip
CASES = [pytest.param(c, marks=[] if c.name in QUICK or ON_GPU else pytest.mark.slow, id=c.name) for c in EDGE_CASES]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and spans even in short sequences; the interpreter's cost is per block, not per number."""
    if not ON_GPU:
        tile = Tile(rows=32, columns=32, warps=4, stages=1, gated_columns=16)
        tiles = Tiles(chunk=32, span=64, forward=tile, grad_query=tile, grad_selected=tile, grad_window=tile)
        # Long sequences add up a pair's rows in many steps: so do these.
        monkeypatch.setattr(attention, "ROWS_AT_ONCE", 2)
        for module in (call, ops):
            monkeypatch.setattr(module, "tiles_for", lambda *_, **__: tiles)


def values_and_gradients(attend, case: Case, **settings) -> dict[str, Tensor]:
    inputs = {name: x.detach().to(DEVICE, DTYPE).requires_grad_() for name, x in case.inputs().items()}
    output = attend(inputs, **settings)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(output)
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def on_triton(inputs: dict[str, Tensor], **settings) -> Tensor:
    ids = settings.pop("document_ids")
    return sparsek_attention(
        **inputs, document_ids=None if ids is None else ids.to(DEVICE), backend="triton", **settings
    )


def expected_of(case: Case, gate: str) -> dict[str, Tensor]:
    """By the reference, in float64 on the CPU."""
    inputs = case.inputs()
    output = attention_reference(**inputs, gate=gate, **case.settings())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).double()
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double().cpu(), tensor.double(), rtol=0, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_edge_case(case: Case) -> None:
    gate = GATES[len(case.name) % 4]
    # Rounding large scores to the kernels' dtype moves the gates, whatever the kernels do.
    rounding = float(case.inputs()["scores"].detach().abs().max()) * torch.finfo(DTYPE).eps
    found = values_and_gradients(on_triton, case, gate=gate, **case.settings())
    assert_close(found, expected_of(case, gate), max(TOLERANCE, 2 * rounding))


@pytest.mark.parametrize("gate", GATES)
def test_every_gate(gate: str) -> None:
    case = Case("gates", s=75, num_selected=6, window=5, support=17, h=4, g=2, documents="random")
    found = values_and_gradients(on_triton, case, gate=gate, **case.settings())
    assert_close(found, expected_of(case, gate))
    for name, tensor in found.items():
        assert (gate == "none" and name == "dscores") or tensor.abs().max() > 1e-2, name


def in_shards(case: Case, borders: list[int], gate: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """With a halo and a carry: what sequence-parallel ranks run."""
    from tests.kernels import test_shards

    monkeypatch.setattr(
        test_shards, "shard_attention", lambda *args, **settings: shard_attention(*args, backend="triton", **settings)
    )
    inputs = {name: x.detach().to(DEVICE, DTYPE).requires_grad_() for name, x in case.inputs().items()}
    output = test_shards.attend_in_shards(inputs, borders, case, 24, gate)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(output)
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream)
    return {"output": output.detach(), **dict(zip(("dquery", "dkey", "dvalue", "dscores"), gradients, strict=True))}


@pytest.mark.parametrize("gate", ["key_value", "straight_through"])
def test_shards_equal_the_whole(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("shards", s=90, num_selected=6, window=5, h=4, g=2, d=4, documents="random", b=1)
    assert_close(in_shards(case, [33, 60], gate, monkeypatch), expected_of(case, gate))


def test_more_heads_than_a_tile_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles share a query: the last of them has rows that are no head's."""
    heads = 20
    if not ON_GPU:
        heads, tile = 6, Tile(rows=4, columns=8, warps=4, stages=1)
        tiles = Tiles(chunk=32, span=64, forward=tile, grad_query=tile, grad_selected=tile, grad_window=tile)
        for module in (call, ops):
            monkeypatch.setattr(module, "tiles_for", lambda *_, **__: tiles)
    case = Case("many_heads", s=36, num_selected=12, window=12, h=heads, g=1, d=4, b=1)
    gate = "straight_through"
    assert_close(in_shards(case, [21], gate, monkeypatch), expected_of(case, gate))


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_in_groups(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences have room for the rows of a few KV heads at a time; here four heads, by ones and by threes."""
    case = Case("head_groups", s=330, num_selected=6, window=5, h=4, g=2, b=2, scores="decreasing")
    rows = -(-case.s // call.tiles_for(case.d, 2, 8).span) * case.num_selected + case.s
    item = torch.empty(0, dtype=DTYPE).element_size()
    monkeypatch.setattr(attention, "ROWS_BYTES", heads * 2 * rows * case.d * item)
    found = values_and_gradients(on_triton, case, gate="value", **case.settings())
    assert_close(found, expected_of(case, "value"))


@pytest.mark.skipif(ON_GPU, reason="compiled kernels take no float64: see the comparisons with the reference")
def test_gradcheck() -> None:
    """Finite differences through the kernels themselves, scores kept apart so that no set changes."""
    generator = torch.Generator().manual_seed(3)
    s, k, window = 11, 3, 2
    query, key, value = (torch.randn(1, s, 2, 3, generator=generator).double() for _ in range(3))
    scores = torch.randperm(s, generator=generator).double().view(1, s, 1) * 0.13
    inputs = (query, key[:, :, :1].clone(), value[:, :, :1].clone(), scores)
    leaves = [x.requires_grad_() for x in inputs]

    def attend(*tensors: Tensor) -> Tensor:
        return sparsek_attention(*tensors, num_selected=k, window=window, support=7, gate="value", backend="triton")

    # Along random directions: every entry apart would take minutes in the interpreter.
    assert torch.autograd.gradcheck(attend, leaves, nondet_tol=0.0, fast_mode=True)


def op_arguments() -> tuple:
    case = Case("opcheck", s=40, num_selected=4, window=3, h=4, g=2, d=8, b=1)
    inputs = {name: x.detach().to(DEVICE, torch.float32) for name, x in case.inputs().items()}
    starts = torch.zeros(1, case.s, dtype=torch.int64, device=DEVICE)
    nothing = inputs["scores"].new_empty(1, 2, 0)
    select = (inputs["scores"].clone(), starts, nothing, nothing.long(), 4, 3, 16, 32)
    tau, visible, from_, until, number, _, _, alive = ops.select_op(*select)
    pairs = inputs["key"].new_empty(1, 2, 0, 8)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value", "scores")]
    attention = (*leaves, pairs, pairs, nothing, tau, visible, from_, until, number, alive, starts, 3, "value", 0.3)
    return select, attention


def test_operators_are_what_torch_expects() -> None:
    select, attention = op_arguments()
    torch.library.opcheck(ops.select_op, select)
    torch.library.opcheck(ops.attention_op, attention)


@pytest.mark.parametrize("strided", [False, True])
def test_the_backward_returns_the_strides_it_promises(strided: bool) -> None:
    """Inductor believes them: also where inputs are strided and heads narrower than their tiles."""
    _, arguments = op_arguments()

    def spread(x: object) -> object:
        """With neighbouring numbers apart in memory."""
        return x.detach().unsqueeze(-1).repeat_interleave(2, -1)[..., 0] if torch.is_tensor(x) else x

    arguments = tuple(map(spread, arguments)) if strided else arguments
    out, lse = ops.attention_op(*arguments)
    grad_out = torch.ones_like(out)
    tests = ("test_schema", "test_faketensor")
    backward = (spread(grad_out) if strided else grad_out, out, lse, *arguments)
    torch.library.opcheck(ops.attention_op, arguments, test_utils=tests)
    torch.library.opcheck(ops.attention_backward_op, backward, test_utils=tests)
    with FakeTensorMode() as fake:
        expected = ops.attention_backward_op(*(fake.from_tensor(x) if torch.is_tensor(x) else x for x in backward))
    for found, wanted in zip(ops.attention_backward_op(*backward), expected, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_compiles_as_one_graph() -> None:
    case = Case("compile", s=70, num_selected=6, window=5, h=2, g=1, b=1)
    settings = {**case.settings(), "gate": "value"}
    backend = "inductor" if ON_GPU or shutil.which("g++") else "aot_eager"
    compiled = torch.compile(on_triton, fullgraph=True, backend=backend)
    found = values_and_gradients(compiled, case, **settings)
    assert_close(found, {name: x.cpu() for name, x in values_and_gradients(on_triton, case, **settings).items()})


def test_the_choice_of_a_backend_is_no_part_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the driver is asked: one question in the graph broke it."""
    properties = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=1 << 18)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cuda", 0)

    def choose(query: Tensor) -> Tensor:
        hindrances = dispatch.no_triton() is None, dispatch._capability(device) < (8, 0)
        return query + len(resolve("auto", query, 1)) * hindrances[0] + dispatch._shared_memory(device)

    query = torch.zeros(1, 2, 1, 8)
    found = torch.compile(choose, fullgraph=True, backend="eager")(query)
    assert torch.equal(found, query + len("torch") + (1 << 18))


def test_runs_are_bit_equal_and_leave_inputs_alone() -> None:
    case = Case("repeat", s=99, num_selected=9, window=7, h=4, g=2, documents="random")
    settings = {**case.settings(), "gate": "straight_through"}
    first = values_and_gradients(on_triton, case, **settings)
    for _ in range(100 if ON_GPU else 1):
        again = values_and_gradients(on_triton, case, **settings)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_strided_inputs() -> None:
    """Heads before tokens in memory, as transformers hands them over."""
    case = Case("strided", s=50, num_selected=6, window=5, h=4, g=2, b=2)
    found = values_and_gradients(
        lambda inputs, **settings: on_triton(
            {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}, **settings
        ),
        case, gate="value", **case.settings(),
    )  # fmt: skip
    assert_close(found, expected_of(case, "value"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_when_all_is_queued(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host looks last, and the kernels end whatever the scores are; likewise for documents out of order."""
    done: list[str] = []
    forward, failure = attention.forward, DeviceChecks.failure
    monkeypatch.setattr(attention, "forward", lambda call: (done.append("kernels"), forward(call))[1])
    monkeypatch.setattr(DeviceChecks, "failure", lambda checks: (done.append("look"), failure(checks))[1])
    case = Case("not_finite", s=70, b=1, documents="random")
    inputs = {name: x.detach().to(DEVICE, DTYPE) for name, x in case.inputs().items()}
    inputs["scores"][0, 9, 0] = bad
    with pytest.raises(ValueError, match="scores hold NaN or infinity"):
        on_triton(inputs, **case.settings())
    inputs["scores"][0, 9, 0] = 0.0
    backwards = case.document_ids().flip(1)
    with pytest.raises(ValueError, match="document_ids must not decrease"):
        on_triton(inputs, **{**case.settings(), "document_ids": backwards})
    on_triton(inputs, **case.settings())
    assert done == ["kernels", "look"] * 3


def test_what_the_kernels_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 2, 1, 512, device=DEVICE)
    with pytest.raises(ValueError, match="512 wide"):
        resolve("triton", wide, 1)
    assert resolve("auto", wide, 1) == "torch"
    with pytest.raises(ValueError, match="int32"):
        resolve("triton", wide.int(), 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not ON_GPU:
        with pytest.raises(ValueError, match="no CUDA device"):
            resolve("triton", torch.zeros(1, 2, 1, 8), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "setting",
    [
        *((d, group, "none") for d, group in [(32, 7), (64, 1), (80, 3), (96, 8), (128, 4), (128, 5), (256, 2)]),
        *((*shape, "value") for shape in [(64, 4), (128, 4), (192, 3), (256, 1), (256, 6), (256, 64)]),
        *((*shape, "straight_through") for shape in [(128, 4), (256, 1), (256, 6)]),
        *((d, 2, "key_value") for d in (64, 128, 256)),
    ],
    ids=str,
)  # fmt: skip
def test_half_precision_errs_like_dense_attention(setting: tuple[int, int, str], dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of torch's dense attention in the same dtype over the same set."""
    d, group, gate = setting
    case = Case(f"half_{d}_{group}", s=451, num_selected=60, window=45, h=2 * group, g=2, d=d, b=1)
    exact = {name: x.detach().to(dtype).double() for name, x in case.inputs().items()}
    exact["scores"] = case.inputs()["scores"].detach()

    def computed(attend: Callable[..., Tensor], kind: torch.dtype, device: str, gate: str) -> list[Tensor]:
        """Output and gradients of query, key and value; scores are float32 at least."""
        kinds = {name: kind if name != "scores" else torch.promote_types(kind, torch.float32) for name in exact}
        leaves = {name: x.to(device, kinds[name]).requires_grad_() for name, x in exact.items()}
        output = attend(**leaves, gate=gate, **case.settings())
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        grads = torch.autograd.grad(output, [leaves[name] for name in ("query", "key", "value")], upstream)
        return [x.double().cpu() for x in (output, *grads)]

    found = computed(partial(sparsek_attention, backend="triton"), dtype, DEVICE, gate)
    # Dense attention in PyTorch over the same set: the reference's own code path, without gates, in half precision.
    dense = computed(attention_reference, dtype, DEVICE, "none")
    expected, plain = (
        computed(partial(sparsek_attention, backend="reference"), torch.float64, "cpu", kind) for kind in (gate, "none")
    )
    for mine, right, theirs, right_for_them in zip(found, expected, dense, plain, strict=True):
        assert torch.isfinite(mine).all()
        error, yardstick = (mine - right).abs().max(), (theirs - right_for_them).abs().max()
        assert error <= 2 * yardstick + 1e-5, (error, yardstick)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    """Offsets beyond 32 bits: the end of a long sequence equals the end computed from its own short past."""
    s, h, d, k, window = 1 << 20, 17, 128, 16, 32
    query = torch.randn(1, s, h, d, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, s, 1, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scores = torch.arange(s, device="cuda", dtype=torch.float32).view(1, s, 1) % 1000
    assert query.numel() > 2**31
    query.requires_grad_()
    out = sparsek_attention(query, key, value, scores, num_selected=k, window=window, gate="none", backend="triton")
    tail = 4096
    ids = torch.zeros(1, s, dtype=torch.int64, device="cuda")
    ids[:, -tail:] = 1
    packed = sparsek_attention(
        query, key, value, scores, num_selected=k, window=window, gate="none", document_ids=ids, backend="triton"
    )
    short = [x[:, -tail:].detach() for x in (query, key, value, scores)]
    alone = sparsek_attention(*short, num_selected=k, window=window, gate="none", backend="triton")
    assert torch.equal(packed[:, -tail:], alone)
    (grad,) = torch.autograd.grad(out.float().square().sum(), query)
    assert torch.isfinite(grad).all() and grad[:, -1].abs().sum() > 0
