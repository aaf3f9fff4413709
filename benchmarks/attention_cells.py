"""The measured cells of attention.py: one layer of SPARSEK or dense attention at one length."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from machine import Heads, milliseconds, save, size
from sparsek_kernels import sparsek_attention

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SLOPES = {"random": 0.0, "drift": 1e-3, "slope": 1.0}
"""Rise of the scores per token, beyond a standard normal; at 1 practically every token evicts one."""
TOO_LONG = 2500.0
"""Estimated milliseconds of one forward + backward above which a dense cell is skipped."""


@dataclass(frozen=True)
class Shape(Heads):
    """Heads and budget: k = w = budget, S = 4 k."""

    budget: int

    def flops(self, dense: bool, n: int) -> float:
        """Of a forward pass; forward + backward counts as 3.5 of them."""
        return 4 * self.d * self.h * n * (n / 2 if dense else 2 * self.budget)


@dataclass(frozen=True)
class Row:
    """One measured cell, or why there is none. Times in milliseconds, extra memory as a share of q, k, v, o, grads."""

    shape: str
    method: str
    budget: int
    scores: str
    length: int
    forward: float | None = None
    step: float | None = None
    select: float | None = None
    extra: float | None = None
    note: str = ""


@dataclass
class Bench:
    device: str
    out: Path
    deadline: float
    shrink: int
    """Divides every length and budget: 1 on a GPU."""
    machine: dict[str, Any]
    gate: str
    """Of all that is timed."""
    rows: list[Row] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By heads."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def backend(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def inputs(self, shape: Shape, n: int, scores: str = "random") -> list[Tensor]:
        """Query, key, value [1, n, heads, d] and scores [1, n, g], all wanting gradients."""
        leaves = [
            torch.randn(1, n, x, shape.d, device=self.device, dtype=self.dtype) for x in (shape.h, *[shape.g] * 2)
        ]
        ramp = SLOPES[scores] * torch.arange(n, device=self.device, dtype=torch.float32)
        leaves.append(torch.randn(1, n, shape.g, device=self.device) + ramp[:, None])
        return [x.requires_grad_() for x in leaves]

    def save(self) -> None:
        result = {"machine": self.machine, "gate": self.gate, "checks": self.checks, "figures": self.figures}
        save(self.out / "attention.json", result | {"rows": [asdict(row) for row in self.rows]})

    def say(self, line: str) -> None:
        self.checks.append(line)
        print(line, flush=True)

    def cell(self, measure: Callable[..., Row], shape: Shape, method: str, length: int, scores: str = "random") -> None:
        """Appends a row, whatever happens."""
        length //= self.shrink
        row = Row(shape.name, method, shape.budget, scores, length)
        if self.late:
            self.rows.append(replace(row, note="not run: out of time"))
            return
        begin = time.perf_counter()
        try:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.rows.append(measure(self, shape, row))
        except Exception as error:  # noqa: BLE001  other cells must still be measured, so the error becomes a note
            traceback.print_exc()
            self.rows.append(replace(row, note=f"failed: {error!r}"[:100]))
        took = time.perf_counter() - begin
        print(f"{shape.name} {method} k={shape.budget} {scores} {length}: {took:.1f} s", flush=True)


def sparsek(inputs: list[Tensor], budget: int, backend: str, gate: str) -> Tensor:
    return sparsek_attention(*inputs, num_selected=budget, window=budget, gate=gate, backend=backend)


def dense(inputs: list[Tensor], **how: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)


def selection(bench: Bench, scores: Tensor, shape: Shape) -> Callable[[], object]:
    """What an attention call does before its kernels."""
    k, n = min(shape.budget, scores.shape[1]), scores.shape[1]
    support = min(4 * shape.budget, n)
    scores = scores.detach()
    if bench.device != "cuda":
        from sparsek_kernels.selection import select

        return lambda: select(scores.transpose(1, 2), num_selected=k, window=shape.budget, support=support)
    from sparsek_kernels.gpu.ops import select_op
    from sparsek_kernels.gpu.tiles import tiles_for

    chunk = tiles_for(shape.d, shape.h // shape.g, bench.dtype.itemsize).chunk
    start = torch.zeros(1, n, dtype=torch.int64, device=bench.device)
    nothing = scores.new_empty(1, shape.g, 0)
    return lambda: select_op(scores, start, nothing, nothing.long(), k, shape.budget, support, chunk)


def measure_sparsek(bench: Bench, shape: Shape, row: Row) -> Row:
    inputs = bench.inputs(shape, row.length, row.scores)
    grad = torch.randn_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(sparsek(inputs, shape.budget, bench.backend, bench.gate), inputs, grad)

    @torch.no_grad()
    def forward() -> None:
        sparsek(inputs, shape.budget, bench.backend, bench.gate)

    extra = None
    step()
    if bench.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - size([*inputs, grad])
        step()
        torch.cuda.synchronize()
        tensors = 2 * size([*inputs[:3], grad])
        extra = (torch.cuda.max_memory_allocated() - others - tensors - 2 * size(inputs[3:])) / tensors
    works = (forward, step, selection(bench, inputs[3], shape))
    ms = [milliseconds(work, bench.device) for work in works]
    return replace(row, forward=ms[0], step=ms[1], select=ms[2], extra=extra)


def measure_dense(bench: Bench, shape: Shape, row: Row) -> Row:
    """Where a backend cannot group heads itself, keys and values are repeated beforehand, outside the times."""
    shorter = [x for x in bench.rows if (x.shape, x.method) == (row.shape, row.method) and x.step is not None]
    estimates = [x.step * (row.length / x.length) ** 2 for x in shorter if x.length * bench.shrink >= 8192]
    if estimates and min(estimates) > TOO_LONG:
        return replace(row, note=f"skipped: about {min(estimates) / 1e3:.1f} s")
    inputs, how, note = bench.inputs(shape, row.length)[:3], {"enable_gqa": True}, ""
    with sdpa_kernel(SDPA[row.method] if bench.device == "cuda" else SDPBackend.MATH):
        try:
            few = bench.inputs(shape, 256)[:3]
            out = dense(few, **how)
            torch.autograd.grad(out, few, torch.randn_like(out))
        except RuntimeError:
            how, note = {}, "heads repeated beforehand"
            repeated = [x.detach().repeat_interleave(shape.h // shape.g, dim=2).requires_grad_() for x in inputs[1:]]
            inputs = [inputs[0], *repeated]
        with torch.no_grad():
            grad = torch.randn_like(dense(inputs, **how))
            forward = milliseconds(lambda: dense(inputs, **how), bench.device)
        step = milliseconds(lambda: torch.autograd.grad(dense(inputs, **how), inputs, grad), bench.device)
    return replace(row, forward=forward, step=step, note=note)
