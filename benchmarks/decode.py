"""Times one decoding step of one attention layer: SPARSEK over its constant state against dense SDPA over a full cache.

    python benchmarks/decode.py --out results               # on a GPU: below 90 s
    python benchmarks/decode.py --out results --quick       # a few cells

On a CPU it times the PyTorch step, in float32, over states that were filled by as many tokens as it says.

On a GPU first checks outputs against float64. A measurement is one CUDA graph of many steps, each on a state (or cache)
of its own, as the layers of a model have: together larger than the L2 cache, so every step reads from memory. SPARSEK's
states are full and every step admits a pair and writes it, the dearest case. GB/s counts the keys and values read, and
is set against a measured device copy. Dense is the faster of cuDNN and flash, without the append to its cache.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_kernels import sparsek_attention
from sparsek_kernels.decode import decode_step, empty_state, prefill
from sparsek_kernels.decode_state import DecodeState

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BACKEND = ("cuda", torch.bfloat16, "triton") if GPU else ("cpu", torch.float32, "torch")
FOOTPRINT = 400e6 if GPU else 0
"""Bytes that the states of one measurement hold together, a multiple of the L2 cache."""
FEWEST_STEPS, MOST_STEPS = 8 if GPU else 4, 64
COLOURS = ["C0", "C1", "C2", "C3", "C4", "C5"]
DENSE_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, width."""

    h: int
    g: int
    d: int

    def __str__(self) -> str:
        return f"h{self.h} g{self.g} d{self.d}"

    def cache_bytes(self, batch: int, rows: int) -> int:
        """Keys and values of `rows` tokens."""
        return 2 * batch * self.g * rows * self.d * DTYPE.itemsize


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
    heads: Heads, batch: int, budget: int, context: int, gate: str = "straight_through", prefilled: bool = False
) -> Row:
    """Prefilled: after real tokens of random scores, and a token that is admitted as seldom as they are."""
    size = heads.cache_bytes(batch, 2 * budget)
    first = (prefilled_state if prefilled else full_state)(heads, batch, budget, context)
    states = [first, *(copy.deepcopy(first) for _ in range(number_of_steps(size) - 1))]
    token = random_token(heads, batch)
    if prefilled:
        token["scores"].normal_()
    time_ = time_steps(
        [lambda state=state: decode_step(**token, state=state, gate=gate, backend=BACKEND) for state in states]
    )
    note = "prefilled" if prefilled else ""
    return Row(str(heads), batch, f"sparsek k=w={budget} {gate}", context, 1e6 * time_, size / time_ / 1e9, note)


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
        decode_step(**token, state=state, gate="straight_through")
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / 100
    return [*rows, Row(str(heads), 1, "tried: no graph", context, 1e6 * each, note="bound by the host")]


def dense_row(heads: Heads, batch: int, context: int, pool: Tensor) -> Row:
    """The fastest backend over a cache of `context` tokens, cut out of the pool of random numbers."""
    size = heads.cache_bytes(batch, context)
    caches = pool[: pool.numel() // (size // DTYPE.itemsize) * (size // DTYPE.itemsize)]
    caches = caches.view(-1, 2, batch, heads.g, context, heads.d)[: number_of_steps(size)]
    if len(caches) == 0:
        return Row(str(heads), batch, "dense", context, note=f"skipped: its cache is {size / 1e9:.0f} GB")
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
        return Row(str(heads), batch, "dense", context, note="; ".join(refusals))
    name = min(times, key=times.__getitem__)
    note = "; ".join([f"{n} {1e6 * t:.0f} us" for n, t in times.items()] + refusals)
    return Row(str(heads), batch, f"dense {name}", context, 1e6 * times[name], size / times[name] / 1e9, note)


def copy_bandwidth() -> float:
    """GB/s of a device copy, read and written bytes."""
    source = torch.empty(1 << (29 if GPU else 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_steps([lambda: target.copy_(source)] * 4) / 1e9


def check() -> bool:
    """Compares steps in bfloat16 with float64 attention over the whole past; prints what it finds."""
    torch.manual_seed(1)
    worst = {}
    for heads, gate in [(Heads(32, 8, 128), "straight_through"), (Heads(16, 16, 64), "key_value"),
                        (Heads(12, 4, 128), "value"), (Heads(7, 1, 96), "none")]:  # fmt: skip
        sizes = {"num_selected": 48, "window": 33, "support": 150}
        tokens = random_token(heads, 2, 260)
        tokens["scores"] = torch.randn(2, 260, heads.g, device=DEVICE)
        exact = {name: x.double() for name, x in tokens.items()}
        expected = sparsek_attention(**exact, gate=gate, **sizes, backend="torch")
        for past in (20, 220):
            head = {name: x[:, :past] for name, x in tokens.items() if name != "query"}
            states = {backend: prefill(**head, **sizes) for backend in (BACKEND, "torch")}
            for step in range(past, past + 40):
                token = {name: x[:, step : step + 1] for name, x in tokens.items()}
                for backend, state in states.items():
                    out = decode_step(**token, state=state, gate=gate, backend=backend)
                    error = float((out.double() - expected[:, step : step + 1]).abs().max())
                    key = (str(heads), gate, backend)
                    worst[key] = max(worst.get(key, 0.0), error if error == error else float("inf"))
            for name in ("selected_positions", "support_positions"):
                kept = [getattr(state, name).sort(dim=-1).values for state in states.values()]
                if not torch.equal(kept[0], kept[-1]):
                    worst[(str(heads), gate, BACKEND)] = float("inf")
    good = True
    for (heads, gate, backend), error in worst.items():
        fine = error < 3e-2
        good &= fine
        print(f"check {heads} {gate} {backend}: largest error against float64 {error:.1e} {'ok' if fine else 'WRONG'}")
    return good


@dataclass(frozen=True)
class Grid:
    shapes: list[Heads]
    budgets: list[int]
    batches: list[int]
    contexts: list[int]


def grid(quick: bool) -> Grid:
    if not GPU:
        return Grid([Heads(8, 2, 64)], [256], [1], [1000, 10_000] if quick else [1000, 10_000, 100_000])
    if quick:
        return Grid([Heads(32, 8, 128)], [512], [1, 64], [4096, 65536])
    return Grid([Heads(32, 8, 128), Heads(16, 16, 64)], [512, 1024], [1, 4, 16, 64], [4096, 32768, 262144, 1048576])


def sparsek_rows(cells: Grid) -> Iterator[Row]:
    """On a GPU the context is that of the dearest case, and prefilled states show that it does not matter."""
    heads, budget, last = cells.shapes[0], cells.budgets[0], cells.contexts[-1]
    for context in cells.contexts:
        yield sparsek_row(heads, 1, budget, context, prefilled=True)
    if not GPU:
        yield sparsek_row(heads, 1, budget, last, "key_value", prefilled=True)
        return
    for heads in cells.shapes:
        for budget in cells.budgets:
            for batch in cells.batches:
                yield sparsek_row(heads, batch, budget, last)
            for batch in sorted({cells.batches[0], cells.batches[-1]}):
                yield sparsek_row(heads, batch, budget, last, "key_value")
    yield from tried(cells.shapes[0], cells.budgets[0], cells.batches, last)


def dense_rows(cells: Grid, deadline: float) -> Iterator[Row]:
    """Once the time is up, cells are left out and say so."""
    size = int(min(torch.cuda.mem_get_info()[0] * 0.45, 18e9)) if GPU else 200_000_000
    pool = torch.empty(size // DTYPE.itemsize, device=DEVICE, dtype=DTYPE).normal_()
    for context in cells.contexts:
        for heads in cells.shapes:
            for batch in cells.batches:
                if time.perf_counter() > deadline:
                    yield Row(str(heads), batch, "dense", context, note="not run: out of time")
                else:
                    yield dense_row(heads, batch, context, pool)


def report(rows: list[Row], bandwidth: float) -> None:
    table = Table(title=f"one step of one layer; copy {bandwidth:.0f} GB/s; {describe()}")
    for heading in ("heads", "batch", "method", "context", "us", "GB/s", "of copy", "note"):
        table.add_column(heading, justify="left" if heading in ("heads", "method", "note") else "right")
    for row in rows:
        rate = row.gigabytes_per_second
        cells = ["" if row.microseconds is None else f"{row.microseconds:.1f}"]
        cells += ["", ""] if rate is None else [f"{rate:.0f}", f"{rate / bandwidth:.0%}"]
        table.add_row(row.heads, str(row.batch), row.method, f"{row.context:,}", *cells, row.note)
    Console(width=160).print(table)


def describe() -> str:
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {DTYPE}"


def plot(rows: list[Row], path: Path) -> None:
    """Time against context: dense rises, SPARSEK is a level line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row.heads for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6.4 * len(shapes), 4.6), squeeze=False)
    for axis, heads in zip(axes[0], shapes, strict=True):
        mine = [row for row in rows if row.heads == heads and row.microseconds is not None]
        contexts = sorted({row.context for row in mine})
        batches = sorted({row.batch for row in mine})
        sparse = next(row.method for row in mine if row.method.startswith("sparsek"))
        for batch, colour in zip(batches, COLOURS, strict=False):
            dense = [row for row in mine if row.batch == batch and row.method.startswith("dense")]
            times = [row.microseconds for row in dense]
            axis.plot([row.context for row in dense], times, "o-", color=colour, label=f"dense, batch {batch}")
            level = [row for row in mine if row.batch == batch and row.method == sparse and (row.note == "" or not GPU)]
            times = [row.microseconds for row in level]
            at = [row.context for row in level]
            if len(times) == 1:
                at, times = [contexts[0], contexts[-1]], times * 2
            axis.plot(at, times, "--", color=colour, label=f"SPARSEK, batch {batch}")
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="microseconds per step")
        axis.set_title(f"{heads}; {sparse}", fontsize="medium")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save(rows: list[Row], bandwidth: float, good: bool, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = [asdict(row) for row in rows]
    with (folder / "decode.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    result = {"machine": describe(), "copy_gigabytes_per_second": bandwidth, "correct": good, "rows": table}
    (folder / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, folder / "decode.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.csv, decode.json and decode.png")
    parser.add_argument("--quick", action="store_true", help="a few cells")
    parser.add_argument("--seconds", type=float, default=75, help="after which no further dense cell is begun")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    good = check()
    bandwidth, cells = copy_bandwidth(), grid(options.quick)
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    sparse = list(sparsek_rows(cells))
    report(sparse, bandwidth)
    print(f"SPARSEK done after {time.perf_counter() - begin:.0f} s", flush=True)
    # Saved before the dense part, which runs other people's kernels at the limit of the memory.
    save(sparse, bandwidth, good, options.out)
    dense = list(dense_rows(cells, begin + options.seconds))
    report(dense, bandwidth)
    save(sparse + dense, bandwidth, good, options.out)
    print(f"all done after {time.perf_counter() - begin:.0f} s")
    sys.exit(0 if good else "the check against float64 failed")


if __name__ == "__main__":
    main()
