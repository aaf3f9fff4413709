"""Compiles a Triton kernel for a GPU that is not here, and says what it would occupy there.

    print(compile_kernel(kernel, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 128}, arch=90, num_warps=4))

Everything needed (ptxas, cuobjdump) lies in the triton wheel. Where kernels run in the interpreter, as they do in these
tests without a GPU, compiling happens in a process of its own that has the real compiler.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one block can have, in bytes."""


DTYPES = {name: getattr(triton.language, name) for name in ("float16", "bfloat16", "float32", "float64")}


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of local memory (spills and stack). Per block: bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: bool = True,
    maxnreg: int | None = None,
) -> Resources:
    """Compiles `fn` for one architecture.

    Args:
        fn: a kernel under @triton.jit, at the top level of a module.
        signature: type of each argument that is no constexpr, like "*fp32" or "i32".
        constexprs: values of the others; a dtype by its name ("bfloat16").
        arch: 80 or 90.
        num_warps, num_stages, maxnreg: as the kernel is launched.
        aligned: whether pointers are multiples of 16 bytes, as torch's are, and the compiler may rely on it.
    """
    launch = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    options = {"arch": arch, "launch": launch, "aligned": aligned}
    if hasattr(fn, "cache_key"):
        return _compile(fn, dict(signature), dict(constexprs), **options)
    request = {"module": fn.fn.__module__, "name": fn.fn.__name__, "signature": dict(signature)}
    return _in_another_process(json.dumps({**request, "constexprs": dict(constexprs), "options": options}))


def _compile(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    arch: int,
    launch: dict[str, int | None],
    aligned: bool,
) -> Resources:
    constexprs = {name: DTYPES.get(value, value) for name, value in constexprs.items()}
    types = {name: "constexpr" if name in constexprs else signature[name] for name in fn.arg_names}
    divisible = [["tt.divisibility", 16]]
    attrs = {(i,): divisible for i, kind in enumerate(types.values()) if aligned and kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(fn=fn, signature=types, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options=launch,
    )
    registers, local = _usage(compiled.asm["cubin"])
    return Resources(registers=registers, spills=local, shared=compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and local bytes of one thread, as the assembler laid them down."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


@functools.cache
def _in_another_process(request: str) -> Resources:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Resources(**json.loads(done.stdout.splitlines()[-1]))


def _serve(request: dict[str, Any]) -> Resources:
    kernel: Callable[..., None] = getattr(importlib.import_module(request["module"]), request["name"])
    return _compile(kernel, request["signature"], request["constexprs"], **request["options"])


if __name__ == "__main__":
    print(json.dumps(asdict(_serve(json.load(sys.stdin)))))
