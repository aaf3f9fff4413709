"""What the attention kernels are launched with at real sizes, and what they would occupy on a GPU that is not here.

    python -m tests.kernels.launches "128 4 bfloat16 90 value"    # d, G, dtype, arch, gate: one JSON object a kernel
    python -m tests.kernels.launches "128 4 bfloat16 90 value carry" "64 1 bfloat16 90 value hopper forward"

Tensors without memory (torch's meta device) go through the real host code. Instead of a launch, each kernel is compiled
with the types, constants and divisibility that the launch would have had.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from sparsek_kernels.gpu import attention, layout, score_gradient
from sparsek_kernels.gpu import call as gpu_call
from sparsek_kernels.gpu import hopper as hopper_kernels
from sparsek_kernels.gpu.call import new_call
from sparsek_kernels.gpu.tiles import tiles_for
from tests.kernels.compile_only import _usage

TYPES = {
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any, log: list[tuple[Any, tuple, dict]]) -> None:
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid), grid
        return lambda *args, **constants: self.log.append((self.kernel, args, constants))


def record(
    d: int,
    group: int,
    dtype: torch.dtype,
    *,
    gate: str,
    carry: bool,
    arch: int = 80,
    hopper: bool = False,
    n: int = 4096,
    g: int = 8,
    k: int = 1024,
) -> list[tuple[Any, tuple, dict]]:
    """Launches of one forward and backward with the tiles of an architecture; k = w, S = 4 k."""

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    log: list[tuple[Any, tuple, dict]] = []
    t, s_carry, k_carry = (n + k - 1, 4 * k, k) if carry else (n, 0, 0)
    precise = torch.promote_types(dtype, torch.float32)
    entries = empty(1, g, s_carry + t, like=torch.int32)
    chunks = -(-n // tiles_for(d, group, dtype.itemsize).chunk)
    query, key, pairs = empty(1, n, g * group, d), empty(1, t, g, d), empty(1, g, k_carry, d)
    with ExitStack() as patches:
        for module in (attention, layout, score_gradient):
            kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
            recorders = {name: Recorder(kernel, log) for name, kernel in kernels.items()}
            patches.enter_context(mock.patch.multiple(module, **recorders))
        patches.enter_context(mock.patch.object(gpu_call, "is_hopper", lambda device: arch == 90))
        if hopper:
            special = Recorder(hopper_kernels.kernel_for_hopper(), log)
            patches.enter_context(mock.patch.object(attention, "hopper_forward_applies", lambda call: True))
            patches.enter_context(mock.patch.object(hopper_kernels, "kernel_for_hopper", lambda: special))
        call = new_call(
            query, key, key, empty(1, t, g, like=precise), (pairs, pairs, empty(1, g, s_carry, like=precise)),
            (empty(1, g, n, like=precise), entries, entries, empty(1, g, chunks, k, like=torch.int32)),
            empty(1, n, like=torch.int64), k, gate, d**-0.5,
        )  # fmt: skip
        out, lse = attention.forward(call)
        attention.backward(call, out, lse, query, entries, empty(1, g, n, like=torch.int32))
    return log


def occupied(kernel: Any, args: tuple, constants: dict, arch: int) -> dict[str, Any]:
    """Registers and local bytes of a thread, shared bytes of a block, and how many asynchronous copies the code has."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    values = dict(zip(kernel.arg_names, args, strict=False))
    fixed = {name: value for name, value in constants.items() if name not in OPTIONS}
    fixed |= {name: 1 for name, value in values.items() if isinstance(value, int) and value == 1}
    types, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values.get(name)
        if name in fixed:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if name not in fixed and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            divisible[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        (GluonASTSource if kernel.is_gluon() else ASTSource)(
            fn=kernel, signature=types, constexprs=fixed, attrs=divisible
        ),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    registers, local = _usage(compiled.asm["cubin"])
    copies = compiled.asm["ptx"].count("cp.async.c")
    return {"registers": registers, "spills": local, "shared": compiled.metadata.shared, "copies": copies}


def report(setting: str) -> None:
    """Prints what each kernel, with `forward` only the first one, occupies."""
    d, group, dtype, arch, gate, *more = setting.split()
    seen = set()
    options = {"gate": gate, "carry": "carry" in more, "arch": int(arch), "hopper": "hopper" in more}
    launches = record(int(d), int(group), getattr(torch, dtype), **options)
    for kernel, args, constants in launches[: 1 if "forward" in more else None]:
        if kernel.__name__ not in seen:
            seen.add(kernel.__name__)
            resources = occupied(kernel, args, constants, int(arch))
            print(json.dumps({"setting": setting, "kernel": kernel.__name__, **resources}), flush=True)


if __name__ == "__main__":
    for setting in sys.argv[1:]:
        report(setting)
