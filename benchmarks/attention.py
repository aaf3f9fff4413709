"""Times SPARSEK attention in Triton against dense attention on one GPU: forward, forward + backward, memory.

    python benchmarks/attention.py --out results                  # below 150 s on an H200
    python benchmarks/attention.py --out results --quick          # 8k, 32k and 131k of the main shape, about 30 s
    python benchmarks/attention.py --out results --device cpu     # tiny sizes through torch: shows that the script runs

First holds outputs and gradients against float64, and 20 runs against each other. Times are medians of CUDA events;
selection is part of every SPARSEK time. Dense is torch's SDPA over [b, s, h, d] tensors. Extra memory is the peak of
forward + backward beyond the inputs, the output and the gradients of both. The JSON is saved after every group.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_kernels import sparsek_attention

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SLOPES = {"random": 0.0, "drift": 1e-3, "slope": 1.0}
"""Rise of the scores per token, beyond a standard normal; at 1 practically every token evicts one."""
GATES = ("straight_through", "value", "key_value", "none")
MAIN_LENGTH, LONGEST = 131072, 1048576
LENGTHS = (8192, 32768, 131072, 1048576, 16384, 4096, 65536, 2048, 524288, 262144)
"""Those of the figures first, in case time runs out."""
TOO_LONG = 2500.0
"""Estimated milliseconds of one forward + backward above which a dense cell is skipped."""


@dataclass(frozen=True)
class Shape:
    """Heads and budget: k = w = budget, S = 4 k."""

    h: int
    g: int
    d: int
    budget: int

    def __str__(self) -> str:
        return f"h{self.h}_g{self.g}_d{self.d}"

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
    rows: list[Row] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def backend(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    def inputs(self, shape: Shape, n: int, scores: str = "random") -> list[Tensor]:
        """Query, key, value [1, n, heads, d] and scores [1, n, g], all wanting gradients."""
        leaves = [
            torch.randn(1, n, x, shape.d, device=self.device, dtype=self.dtype) for x in (shape.h, *[shape.g] * 2)
        ]
        ramp = SLOPES[scores] * torch.arange(n, device=self.device, dtype=torch.float32)
        leaves.append(torch.randn(1, n, shape.g, device=self.device) + ramp[:, None])
        return [x.requires_grad_() for x in leaves]

    def milliseconds(self, work: Callable[[], object], budget: float = 300.0) -> float:
        """Median over 3 to 20 runs, about `budget` milliseconds together, after one to warm up."""
        work()
        if self.device != "cuda":
            stamps = [time.perf_counter()]
            for _ in range(3):
                work()
                stamps.append(time.perf_counter())
            return 1e3 * statistics.median(later - earlier for earlier, later in itertools.pairwise(stamps))

        def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            return begin, end

        pairs = [timed()]
        torch.cuda.synchronize()
        pairs += [timed() for _ in range(max(2, min(19, int(budget / pairs[0][0].elapsed_time(pairs[0][1])))))]
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        result = {"machine": self.machine(), "checks": self.checks, "figures": self.figures}
        result["rows"] = [asdict(row) for row in self.rows]
        (self.out / "attention_gpu.json").write_text(json.dumps(result, indent=1) + "\n")

    def machine(self) -> str:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU (dry run, figures mean nothing)"
        return f"{name}, torch {torch.__version__}, {self.dtype}"

    def say(self, line: str) -> None:
        self.checks.append(line)
        print(line, flush=True)

    def cell(self, measure: Callable[..., Row], shape: Shape, method: str, length: int, scores: str = "random") -> None:
        """Appends a row, whatever happens."""
        length //= self.shrink
        row = Row(str(shape), method, shape.budget, scores, length)
        if time.perf_counter() > self.deadline:
            self.rows.append(replace(row, note="not run: out of time"))
            return
        begin = time.perf_counter()
        try:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.rows.append(measure(self, shape, row))
        except Exception as error:  # noqa: BLE001  other cells must still be measured, so the error becomes a note
            traceback.print_exc()
            self.rows.append(replace(row, note=f"failed: {str(error).splitlines()[0][:80] if str(error) else error!r}"))
        print(f"{shape} {method} k={shape.budget} {scores} {length}: {time.perf_counter() - begin:.1f} s", flush=True)


def sparsek(inputs: list[Tensor], budget: int, backend: str, gate: str = "straight_through") -> Tensor:
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


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measure_sparsek(bench: Bench, shape: Shape, row: Row) -> Row:
    inputs = bench.inputs(shape, row.length, row.scores)
    grad = torch.randn_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(sparsek(inputs, shape.budget, bench.backend), inputs, grad)

    @torch.no_grad()
    def forward() -> None:
        sparsek(inputs, shape.budget, bench.backend)

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
    ms = bench.milliseconds(forward), bench.milliseconds(step), bench.milliseconds(selection(bench, inputs[3], shape))
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
            forward = bench.milliseconds(lambda: dense(inputs, **how))
        step = bench.milliseconds(lambda: torch.autograd.grad(dense(inputs, **how), inputs, grad))
    return replace(row, forward=forward, step=step, note=note)


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


def check(bench: Bench, seconds: float = 45.0) -> None:
    """Every gate against the O(n^3) reference in float64 on the same device; dense attention is the yardstick."""
    end = time.perf_counter() + seconds
    n, k, window, support = (1500, 100, 130, 333) if bench.device == "cuda" else (150, 10, 13, 33)
    cases = [(group, d, gate) for gate in GATES for group, d in ((4, 128), (1, 64), (1, 128), (4, 64))]
    bench.say(f"relative errors against float64, n = {n}, k = {k}, w = {window}, S = {support}, {bench.dtype}")
    for group, d, gate in sorted(cases, key=lambda case: case[:2] not in ((4, 128), (1, 64))):
        if time.perf_counter() > end:
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
        if gate == GATES[0]:
            plain = [with_gradients(lambda x: dense(x, enable_gqa=True).transpose(1, 2), x[:3])
                     for x in (inputs, exact)]  # fmt: skip
            bench.say(f"  G={group} d={d:3d} {'dense SDPA':16s} {errors(*plain)}")


def check_determinism(bench: Bench, shape: Shape, runs: int = 20) -> None:
    n = 8192 // bench.shrink
    inputs = bench.inputs(shape, n)
    grad = torch.randn_like(inputs[0])

    def once() -> list[Tensor]:
        out = sparsek(inputs, shape.budget, bench.backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    first, differ = once(), 0
    for _ in range(runs - 1):
        again = once()
        differ += not all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    bench.say(f"determinism: {differ} of {runs - 1} repetitions at n = {n} differ from the first in some bit")


def number(x: float | None, form: str = ".3g") -> str:
    return "-" if x is None else format(x, form)


def report(bench: Bench, shapes: list[Shape]) -> None:
    table = Table(title=f"milliseconds, effective TFLOP/s in brackets; {bench.machine()}")
    for heading in (
        "shape",
        "method",
        "k = w",
        "scores",
        "length",
        "forward",
        "fwd + bwd",
        "selection",
        "extra memory",
    ):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for row in sorted(bench.rows, key=lambda row: (row.shape, row.budget, row.scores, row.method, row.length)):
        shape = next(x for x in shapes if str(x) == row.shape and x.budget == row.budget)
        flops = shape.flops(row.method != "sparsek", row.length)
        times = [f"{t:.3f} ({x * flops / t / 1e9:.0f})" if t else "-" for t, x in ((row.forward, 1), (row.step, 3.5))]
        budget, scores = (str(row.budget), row.scores) if row.method == "sparsek" else ("", "")
        cells = (f"{row.length:,}", *times, number(row.select, ".3f"), number(row.extra, ".1%"))
        table.add_row(row.shape, row.method, budget, scores, *cells, row.note)
    Console(width=150).print(table)


def crossover(sparse: dict[int, Row], plain: dict[int, Row]) -> tuple[float | None, str]:
    """Length from which sparse forward + backward stays faster, on straight lines between logarithms."""
    both = sorted(n for n in sparse if n in plain)
    gains = [math.log(plain[n].step / sparse[n].step) for n in both]
    if not gains or gains[-1] <= 0:
        return None, "not reached"
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=-1)
    if last < 0:
        return both[0], "ahead from the shortest length measured"
    part = gains[last] / (gains[last] - gains[last + 1])
    return both[last] * (both[last + 1] / both[last]) ** part, ""


def figures(bench: Bench, shape: Shape) -> list[tuple[str, float | None, str, float, float, str]]:
    """Name, reached, format, at least, aim, remark; of the main shape, against cuDNN, for random scores."""
    measured = [row for row in bench.rows if row.shape == str(shape) and row.step is not None]
    ours = [row for row in measured if row.method == "sparsek" and row.budget == shape.budget]
    sparse = {row.length: row for row in ours if row.scores == "random"}
    plain = {row.length: row for row in measured if row.method == "cudnn"}
    n, longest = MAIN_LENGTH // bench.shrink, LONGEST // bench.shrink
    one, far, rival = sparse.get(n), sparse.get(longest), plain.get(n)
    from_, remark = crossover(sparse, plain)
    return [
        (
            f"forward at {n} against cuDNN",
            rival and one and rival.forward / one.forward,
            ".1f",
            18,
            25,
            "times as fast",
        ),
        (f"fwd + bwd at {n} against cuDNN", rival and one and rival.step / one.step, ".1f", 15, 22, "times as fast"),
        ("fwd + bwd beats cuDNN from", from_, ",.0f", 12288 // bench.shrink, 7168 // bench.shrink, remark),
        (f"selection share of fwd + bwd at {n}", one and one.select / one.step, ".1%", 0.12, 0.06, ""),
        (f"fwd + bwd at {longest} / 8 x at {n}", one and far and far.step / one.step / 8, ".3f", 1.03, 1.0, ""),
        (f"extra memory at {longest}", far and far.extra, ".1%", 0.15, 0.08, "of q, k, v, o and gradients"),
    ]


def report_figures(bench: Bench, shape: Shape) -> None:
    table = Table(title=f"{shape}, k = w = {shape.budget}, S = {4 * shape.budget}, random scores")
    for heading in ("figure", "reached", "at least", "aim", "verdict", "remark"):
        table.add_column(heading)
    for name, reached, form, least, aim, remark in figures(bench, shape):
        sign = 1 if aim > least else -1
        verdict = "" if reached is None else "missed" if sign * reached < sign * least else "at least"
        verdict = "aim" if reached is not None and sign * reached >= sign * aim else verdict
        table.add_row(name, number(reached, form), format(least, form), format(aim, form), verdict, remark)
        bench.figures[name] = reached
    Console(width=130).print(table)


def plot(bench: Bench, shape: Shape) -> None:
    """Time against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    for method, colour in (("sparsek", "C0"), ("cudnn", "C1"), ("flash", "C2")):
        mine = [row for row in bench.rows if (row.shape, row.method, row.scores) == (str(shape), method, "random")]
        mine = sorted((x for x in mine if x.budget == shape.budget and x.step), key=lambda row: row.length)
        for pass_, style in (("forward", "o--"), ("step", "o-")):
            name = {"sparsek": "SPARSEK", "cudnn": "dense, cuDNN", "flash": "dense, flash"}[method]
            label = f"{name}, {'forward' if pass_ == 'forward' else 'forward + backward'}"
            axis.plot([x.length for x in mine], [getattr(x, pass_) for x in mine], style, color=colour, label=label)
    if at := figures(bench, shape)[2][1]:
        axis.axvline(at, color="grey", linestyle=":", label=f"forward + backward beats cuDNN from {at:,.0f}")
    axis.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel="milliseconds")
    lengths = sorted({row.length for row in bench.rows if row.shape == str(shape)})
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_title(f"{shape}, k = w = {shape.budget}, S = {4 * shape.budget}\n{bench.machine()}", fontsize="medium")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(bench.out / "attention_gpu.png", dpi=130)
    pyplot.close(figure)


def measure(bench: Bench, shapes: list[Shape], quick: bool) -> None:
    """The cells in the order of their worth, saved after every group."""
    main_shape, lengths = shapes[0], LENGTHS[: 3 if quick else None]
    for n in lengths:
        bench.cell(measure_sparsek, main_shape, "sparsek", n)
        if n <= MAIN_LENGTH:
            bench.cell(measure_dense, main_shape, "cudnn", n)
        bench.save()
    if quick:
        return
    for scores in ("drift", "slope"):
        bench.cell(measure_sparsek, main_shape, "sparsek", MAIN_LENGTH, scores)
    for n in (32768, MAIN_LENGTH):
        bench.cell(measure_dense, main_shape, "flash", n)
    bench.save()
    for shape in shapes[1:]:
        for n in LENGTHS[:3]:
            bench.cell(measure_sparsek, shape, "sparsek", n)
            if str(shape) != str(main_shape):
                bench.cell(measure_dense, shape, "cudnn", n)
        bench.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attention_gpu.json and attention_gpu.png")
    parser.add_argument("--quick", action="store_true", help="only 8k, 32k and 131k of the main shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=140, help="after which no further cell is begun")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    gpu = options.device == "cuda"
    bench = Bench(options.device, options.out, begin + options.seconds, 1 if gpu else 256)
    shapes = [Shape(32, 8, 128, 1024), Shape(32, 8, 128, 512), Shape(16, 16, 64, 512)]
    if not gpu:
        shapes = [Shape(4, 1, 16, 4), Shape(4, 1, 16, 2), Shape(2, 2, 8, 2)]
    check(bench, 15 if options.quick else 45)
    check_determinism(bench, shapes[0])
    bench.save()
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    measure(bench, shapes, options.quick)
    report(bench, shapes)
    report_figures(bench, shapes[0])
    bench.save()
    plot(bench, shapes[0])
    print(f"all done after {time.perf_counter() - begin:.0f} s")
    failed = [text for text in (*bench.checks, *(row.note for row in bench.rows)) if "failed" in text]
    sys.exit(f"{len(failed)} cells or checks failed" if failed else 0)


if __name__ == "__main__":
    main()
