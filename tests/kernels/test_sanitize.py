"""The script that compute-sanitizer runs on a GPU launches every kernel, here in the interpreter."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from sparsek_kernels import gpu
from sparsek_kernels.gpu import attention, wavelet

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitize.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the script runs under compute-sanitizer")
@pytest.mark.usefixtures("poisoned_memory")
def test_every_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    launched: set[str] = set()
    run = InterpretedFunction.run

    def record(kernel, *args, **settings):
        launched.add(kernel.fn.__name__)
        return run(kernel, *args, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    # Put back afterwards: the script changes them.
    monkeypatch.setattr(wavelet, "TILE", wavelet.TILE)
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", attention.ROWS_AT_ONCE)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    sanitize.main()
    modules = [
        importlib.import_module(f"{gpu.__name__}.{module.name}") for module in pkgutil.iter_modules(gpu.__path__)
    ]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    # Those of the operator and of decoding, which have modules of their own.
    launched |= {"forward_hopper_kernel"}  # Gluon has no interpreter; on a Hopper GPU the script runs it.
    assert launched == kernels | {"_forward", "_backward", "_step"}
