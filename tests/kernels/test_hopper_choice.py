"""Which calls the forward for Hopper gets, and what it is launched with; no GPU is asked."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsek_kernels.gpu import hopper
from sparsek_kernels.gpu.call import Call, new_call
from sparsek_kernels.gpu.forward import forward_kernel
from sparsek_kernels.gpu.hopper import forward_on_hopper, hopper_forward_applies, kernel_for_hopper
from tests.kernels.launches import Recorder

B, S, T, G, K, SUPPORT = 2, 16, 16, 2, 5, 9
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def every_device_is_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    kernel_for_hopper.cache_clear()
    yield
    kernel_for_hopper.cache_clear()


def call_of(*, h: int = 8, d: int = 128, k: int = K, dtype: torch.dtype = HALF, gate: str = "none") -> Call:
    """A shard with a carry; nothing but shapes, dtypes, strides and addresses counts."""
    pairs, table = torch.zeros(B, T, G, d, dtype=dtype), torch.zeros(B, G, SUPPORT + T, dtype=torch.int32)
    carried, scores = torch.zeros(B, G, K, d, dtype=dtype), torch.zeros(B, G, S)
    return new_call(
        torch.zeros(B, S, h, d, dtype=dtype), pairs, pairs.clone(), torch.zeros(B, T, G),
        (carried, carried.clone(), torch.zeros(B, G, SUPPORT)),
        (scores, table, table, torch.zeros(B, G, 1, k, dtype=torch.int32)),
        torch.zeros(B, S, dtype=torch.int64), 4, gate, d**-0.5,
    )  # fmt: skip


def padded(x: Tensor, extra: int) -> Tensor:
    """Equal numbers, heads `extra` numbers further apart."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], extra)], dim=-1)[..., : x.shape[-1]]


def shifted(x: Tensor) -> Tensor:
    """Equal numbers and strides, beginning one number behind a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("h", "d"), [(2, 64), (6, 128), (128, 64), (256, 128)])
@pytest.mark.parametrize("gate", ["none", "straight_through", "value"])
def test_ordinary_calls_get_it(gate: str, h: int, d: int, dtype: torch.dtype) -> None:
    assert hopper_forward_applies(call_of(h=h, d=d, dtype=dtype, gate=gate))


@pytest.mark.parametrize("view", [heads_first, lambda x: padded(x, 16), lambda x: x[:, :1].expand(x.shape)])
def test_views_with_aligned_rows_get_it(view: Callable[[Tensor], Tensor]) -> None:
    call = call_of()
    assert hopper_forward_applies(replace(call, query=view(call.query), key=view(call.key), value=view(call.value)))


REFUSED = {
    "gate key_value scales the logits": call_of(gate="key_value"),
    "not all float16, or all bfloat16": call_of(dtype=torch.float32),
    "not all .* bfloat16": call_of(dtype=torch.float64),
    "heads are 32 wide": call_of(d=32),
    "heads are 80 wide": call_of(d=80),
    "heads are 256 wide.* for 64 and 128": call_of(d=256),
    "65 query heads": call_of(h=130, d=64),
    "num_selected is 32768": call_of(k=1 << 15),
    "all float16, or": replace(call_of(), value=call_of(dtype=torch.float16).value),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_compute_goes_to_the_kernel_for_all_gpus(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """And is told, once per reason."""
    hopper._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert not hopper_forward_applies(REFUSED[reason])
        assert not hopper_forward_applies(REFUSED[reason])
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.search(rf"the forward for all GPUs, .*\(.*{reason}", said)


@pytest.mark.parametrize("view", [shifted, lambda x: padded(x, 8), lambda x: padded(x, 1)], ids=["start", "8", "1"])
@pytest.mark.parametrize("field", ["query", "key", "value", "carry_key", "carry_value"])
def test_rows_that_do_not_begin_at_16_bytes(field: str, view: Callable[[Tensor], Tensor]) -> None:
    call = call_of()
    assert not hopper_forward_applies(replace(call, **{field: view(getattr(call, field))}))


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not hopper_forward_applies(call_of())
    for capability, applies in (((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert hopper.is_hopper(torch.device("cuda:1")) == applies


@pytest.mark.usefixtures("fresh_cache")
def test_without_gluon_the_kernel_for_all_gpus_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sparsek_kernels.gpu.forward_hopper", None)
    assert not hopper_forward_applies(call_of())
    assert "lacks what it is written in" in hopper.why_not_hopper(call_of())


@pytest.mark.parametrize("gate", ["none", "straight_through", "value"])
def test_arguments_stand_in_the_order_of_the_kernel(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of `forward_kernel`, whose arguments Call lists; and every constant has its name."""
    kernel, log = kernel_for_hopper(), []
    monkeypatch.setattr(hopper, "kernel_for_hopper", lambda: Recorder(kernel, log))
    call = replace(call_of(gate=gate), fractional_from=torch.ones(B, G, SUPPORT + T, dtype=torch.int32))
    out, lse = torch.empty_like(call.query), torch.empty(B, 8, S)
    forward_on_hopper(call, out, lse)
    ((_, arguments, constants),) = log
    names = kernel.arg_names[: len(arguments)]
    assert names == forward_kernel.arg_names[: len(arguments)]
    assert names[-1] == "g"
    assert set(constants) - {"num_warps"} == set(kernel.arg_names[len(arguments) :])
    found = dict(zip(names, arguments, strict=True))
    assert found["q"] is call.query
    assert found["carry_v"] is call.carry_value
    assert found["alive"] is call.alive
    assert found["tau"] is call.tau
    assert found["fractional_from"] is (call.fractional_from if gate == "value" else call.visible_until)
    assert found["scores"] is (call.scores if gate == "value" else call.tau)
    assert constants["GATE"] == ("value" if gate == "value" else "none")
    assert found["out"] is out
    assert found["lse"] is lse
    assert (found["s"], found["t"], found["S"], found["window"], found["g"]) == (S, T, SUPPORT, 4, G)


@pytest.mark.parametrize("field", ["key", "value"])
def test_far_rows_are_addressed_in_64_bits(field: str) -> None:
    """Rows over which 2^31 numbers lie, with no memory behind them; those of queries always are."""
    call, shape = call_of(), (B, T, G, 128)
    assert str(hopper.hopper_constants(call)["OFFSET"]) == "int32"
    apart = (1 << 31) // (SUPPORT + T) + 1
    far = torch.empty_strided(shape, (T * apart, apart, 128, 1), dtype=HALF, device="meta")
    assert str(hopper.hopper_constants(replace(call, **{field: far}))["OFFSET"]) == "int64"
