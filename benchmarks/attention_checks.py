"""What attention.py holds against float64, and against itself, beside the times."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from attention_cells import Bench, Shape, dense, sparsek
from sparsek_kernels import sparsek_attention

GATES = ("value", "straight_through", "key_value", "none")
MEASURED, OTHERS = ((4, 128), (1, 64)), ((1, 128), (4, 64))
"""Query heads per KV head, width: those of the measured shapes, whose kernels are compiled anyway; and others."""


def cases(timed: str) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    """(group, d, gate) to check before the times, of the gate that is timed; and after them."""
    gates = sorted(GATES, key=lambda gate: gate != timed)
    later = [(group, d, gate) for gate in gates[1:] for group, d in MEASURED]
    return [(group, d, timed) for group, d in MEASURED], later + [(*x, gate) for gate in gates for x in OTHERS]


def errors(found: list[Tensor | None], exact: list[Tensor | None]) -> str:
    """Relative errors in the Frobenius norm; `-` where there is no gradient."""
    pairs = zip(("out", "dq", "dk", "dv", "du"), found, exact, strict=False)
    return "  ".join(f"{name} {float((x.double() - y).norm() / y.norm()):.1e}" if y is not None and x is not None
                     else f"{name} -" for name, x, y in pairs)  # fmt: skip


def with_gradients(attend: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Output [1, n, h, d], then the gradients, for a weight of each output that is the same in every precision."""
    out = attend(inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights, allow_unused=True)]


def check(bench: Bench, chosen: list[tuple[int, int, str]]) -> None:
    """Each case against the O(n^3) reference in float64 on the same device; dense attention is the yardstick."""
    n, k, window, support = (1500, 100, 130, 333) if bench.device == "cuda" else (150, 10, 13, 33)
    bench.say(f"relative errors against float64, n = {n}, k = {k}, w = {window}, S = {support}, {bench.dtype}")
    for group, d, gate in chosen:
        if bench.late:
            bench.say(f"  G={group} d={d:3d} {gate}: not run, out of time")
            continue
        inputs = bench.inputs(Shape(2 * group, 2, d, k), n)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        how = {"num_selected": k, "window": window, "support": support, "gate": gate}
        expected = with_gradients(lambda x, how=how: sparsek_attention(*x, **how, backend="reference"), exact)
        try:
            found = with_gradients(lambda x, how=how: sparsek_attention(*x, **how, backend=bench.backend), inputs)
        except Exception as error:  # noqa: BLE001  said here, and the other cells still run
            traceback.print_exc()
            bench.say(f"  G={group} d={d:3d} {gate}: failed: {error!r}"[:150])
            continue
        bench.say(f"  G={group} d={d:3d} {gate:16s} {errors(found, expected)}")
        if gate == bench.gate:
            plain = [with_gradients(lambda x: dense(x, enable_gqa=True).transpose(1, 2), x[:3])
                     for x in (inputs, exact)]  # fmt: skip
            bench.say(f"  G={group} d={d:3d} {'dense SDPA':16s} {errors(*plain)}")


def check_determinism(bench: Bench, shape: Shape, runs: int = 100) -> None:
    n = 8192 // bench.shrink
    inputs = bench.inputs(shape, n)
    grad = torch.randn_like(inputs[0])

    def once() -> list[Tensor]:
        out = sparsek(inputs, shape.budget, bench.backend, bench.gate)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    first, differ = once(), 0
    for _ in range(runs - 1):
        again = once()
        differ += not all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    bench.say(f"determinism: {differ} of {runs - 1} repetitions at n = {n} differ from the first in some bit")
