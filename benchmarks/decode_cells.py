"""The measured cells of decode.py: one step of one layer, over SPARSEK's constant state or over a full cache."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from machine import Heads
from sparsek_kernels.decode import decode_step, empty_state, prefill
from sparsek_kernels.decode_state import DecodeState

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BACKEND = ("cuda", torch.bfloat16, "triton") if GPU else ("cpu", torch.float32, "torch")
FOOTPRINT = 400e6 if GPU else 0
"""Bytes that the states of one measurement hold together, a multiple of the L2 cache."""
FEWEST_STEPS, MOST_STEPS = 8 if GPU else 4, 64
DENSE_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def cache_bytes(heads: Heads, batch: int, rows: int) -> int:
    """Keys and values of `rows` tokens."""
    return 2 * batch * heads.g * rows * heads.d * DTYPE.itemsize


@dataclass(frozen=True)
class Row:
    """One measured cell, or why there is none."""

    heads: str
    batch: int
    method: str
    context: int
    microseconds: float | None = None
    gigabytes_per_second: float | None = None
    note: str = ""


def random_token(heads: Heads, batch: int, length: int = 1) -> dict[str, Tensor]:
    """Inputs of one step; a score of 10 is above all of `full_state`'s, and of equal scores the later wins."""
    shapes = {"query": heads.h, "key": heads.g, "value": heads.g}
    token = {name: torch.randn(batch, length, n, heads.d, device=DEVICE, dtype=DTYPE) for name, n in shapes.items()}
    return token | {"scores": torch.full((batch, length, heads.g), 10.0, device=DEVICE)}


def full_state(heads: Heads, batch: int, budget: int, context: int) -> DecodeState:
    """As after `context` tokens: all slots taken. k = w = budget, S = 4 k."""
    sizes = {"num_selected": budget, "window": budget, "support": 4 * budget}
    state = empty_state(batch, heads.g, heads.d, **sizes, dtype=DTYPE, device=DEVICE)
    state.key.normal_()
    state.value.normal_()
    state.support_scores.normal_()
    state.support_scores.copy_(state.support_scores.sort(dim=-1, descending=True).values)
    state.scores[..., budget:] = state.support_scores[..., :budget]
    state.scores[..., :budget] = 10.0
    state.support_positions.copy_(torch.arange(4 * budget, device=DEVICE).expand_as(state.support_positions))
    state.selected_positions.copy_(state.support_positions[..., :budget])
    state.length.fill_(context)
    return state


def prefilled_state(heads: Heads, batch: int, budget: int, context: int) -> DecodeState:
    """After `context` tokens of random scores."""
    tokens = random_token(heads, batch, context)
    tokens["scores"].normal_()
    del tokens["query"]
    return prefill(**tokens, num_selected=budget, window=budget, support=4 * budget)


def time_steps(steps: list[Callable[[], Tensor]], seconds: float = 0.03) -> float:
    """Median time of one step in seconds, over all steps one after the other."""
    steps = steps * -(-FEWEST_STEPS // len(steps))
    steps[0]()
    if not GPU:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for step in steps:
                step()
            times.append((time.perf_counter() - start) / len(steps))
        return statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(steps)


def number_of_steps(size: int) -> int:
    return max(1, min(MOST_STEPS, -(-int(FOOTPRINT) // size)))


def sparsek_row(
    heads: Heads, batch: int, budget: int, context: int, gate: str = "value", prefilled: bool = False
) -> Row:
    """Prefilled: after real tokens of random scores, and a token that is admitted as seldom as they are."""
    size = cache_bytes(heads, batch, 2 * budget)
    first = (prefilled_state if prefilled else full_state)(heads, batch, budget, context)
    states = [first, *(copy.deepcopy(first) for _ in range(number_of_steps(size) - 1))]
    token = random_token(heads, batch)
    if prefilled:
        token["scores"].normal_()
    time_ = time_steps(
        [lambda state=state: decode_step(**token, state=state, gate=gate, backend=BACKEND) for state in states]
    )
    note = "prefilled" if prefilled else ""
    return Row(heads.name, batch, f"sparsek k=w={budget} {gate}", context, 1e6 * time_, size / time_ / 1e9, note)


def tried(heads: Heads, budget: int, batches: list[int], context: int) -> list[Row]:
    """Other splits of the heads over programs than the one that is used, and a step without a graph."""
    from sparsek_kernels.gpu import decode as kernel

    rows, used = [], kernel.PROGRAMS_PER_PROCESSOR
    for programs in (1, 2, 4, 8):
        kernel.PROGRAMS_PER_PROCESSOR = programs
        for batch in batches:
            row = sparsek_row(heads, batch, budget, context)
            rows.append(replace(row, method="tried: other split", note=f"{programs} per processor"))
    kernel.PROGRAMS_PER_PROCESSOR = used
    state, token = full_state(heads, 1, budget, context), random_token(heads, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        decode_step(**token, state=state, gate="value")
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / 100
    return [*rows, Row(heads.name, 1, "tried: no graph", context, 1e6 * each, note="bound by the host")]


def dense_row(heads: Heads, batch: int, context: int, pool: Tensor) -> Row:
    """The fastest backend over a cache of `context` tokens, cut out of the pool of random numbers."""
    size = cache_bytes(heads, batch, context)
    caches = pool[: pool.numel() // (size // DTYPE.itemsize) * (size // DTYPE.itemsize)]
    caches = caches.view(-1, 2, batch, heads.g, context, heads.d)[: number_of_steps(size)]
    if len(caches) == 0:
        return Row(heads.name, batch, "dense", context, note=f"skipped: its cache is {size / 1e9:.0f} GB")
    query = torch.randn(batch, heads.h, 1, heads.d, device=DEVICE, dtype=DTYPE)
    times, refusals = {}, []
    for name, backend in DENSE_BACKENDS.items() if GPU else {"cpu": SDPBackend.FLASH_ATTENTION}.items():
        try:
            with sdpa_kernel(backend):
                times[name] = time_steps(
                    [lambda c=c: F.scaled_dot_product_attention(query, c[0], c[1], enable_gqa=True) for c in caches]
                )
        except RuntimeError as error:
            refusals.append(f"{name}: {str(error).splitlines()[0][:60]}")
    if not times:
        return Row(heads.name, batch, "dense", context, note="; ".join(refusals))
    name = min(times, key=times.__getitem__)
    note = "; ".join([f"{n} {1e6 * t:.0f} us" for n, t in times.items()] + refusals)
    return Row(heads.name, batch, f"dense {name}", context, 1e6 * times[name], size / times[name] / 1e9, note)


def copy_bandwidth() -> float:
    """GB/s of a device copy, read and written bytes; the best of several sizes."""
    rates = []
    for exponent in (28, 30, 32) if GPU else (24,):
        source = torch.ones((1 << exponent) // DTYPE.itemsize, dtype=DTYPE, device=DEVICE)
        target = torch.empty_like(source)
        rates.append(2 * (1 << exponent) / time_steps([lambda: target.copy_(source)] * 4) / 1e9)  # noqa: B023
    return max(rates)
