"""Times SPARSEK attention in Triton against dense attention on one GPU: forward, forward + backward, memory.

    python benchmarks/attention.py --out results                  # about five minutes on an H200
    python benchmarks/attention.py --out results --quick          # 8k, 32k and 131k of the first shape only
    python benchmarks/attention.py --out results --shapes wide narrow
    python benchmarks/attention.py --out results --gate straight_through
    python benchmarks/attention.py --out results --device cpu     # tiny sizes through torch: shows that the script runs

First holds outputs and gradients against float64, and 100 runs against each other. Times are medians of CUDA events;
selection is part of every SPARSEK time. Dense is torch's SDPA over [b, s, h, d] tensors. Extra memory is the peak of
forward + backward beyond the inputs, the output and the gradients of both. The JSON is saved after every group.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from attention_cells import SLOPES, Bench, Shape, measure_dense, measure_sparsek
from attention_checks import GATES, cases, check, check_determinism
from attention_report import MAIN_LENGTH, first_budgets, plot, report, report_figures, report_scores
from machine import add_options, describe

SHAPES = {
    "wide": Shape(32, 8, 128, 1024),
    "narrow": Shape(16, 16, 64, 512),
    "wide_512": Shape(32, 8, 128, 512),
    "narrow_1024": Shape(16, 16, 64, 1024),
}
"""Those of the goals first, in case time runs out."""
TINY = {
    "wide": Shape(4, 1, 16, 4),
    "narrow": Shape(2, 2, 8, 2),
    "wide_512": Shape(4, 1, 16, 2),
    "narrow_1024": Shape(2, 2, 8, 4),
}
FIGURES, REST = (8192, 32768, 131072, 1048576, 16384), (4096, 65536, 2048, 524288, 262144)
"""Lengths that the figures are made of, and those that only the plot shows."""


def measure(bench: Bench, shapes: list[Shape]) -> None:
    """The cells in the order of their worth, saved after every group."""
    first, *others = shapes
    for n in FIGURES:
        both(bench, first, n)
    for shape in [x for x in others if x.name != first.name][:1]:
        for n in FIGURES[:3]:
            both(bench, shape, n)
    for scores in [kind for kind in SLOPES if kind != "random"]:
        bench.cell(measure_sparsek, first, "sparsek", MAIN_LENGTH, scores)
    bench.save()
    for n in REST:
        both(bench, first, n)
    for n in (32768, MAIN_LENGTH):
        bench.cell(measure_dense, first, "flash", n)
    for shape in others:
        for n in FIGURES:
            both(bench, shape, n)
        for scores in [kind for kind in SLOPES if kind != "random"]:
            bench.cell(measure_sparsek, shape, "sparsek", MAIN_LENGTH, scores)
        bench.save()


def complete(bench: Bench, others: list[Shape]) -> None:
    """The lengths that only a full table needs, of the other shapes."""
    for shape in others:
        for n in REST:
            both(bench, shape, n)


def both(bench: Bench, shape: Shape, n: int) -> None:
    """SPARSEK and cuDNN at one length, unless they were measured before."""
    measured = {(row.shape, row.method, row.length, row.scores) for row in bench.rows}
    budgets = {(row.shape, row.budget, row.length) for row in bench.rows if row.method == "sparsek"}
    at = n // bench.shrink
    if (shape.name, shape.budget, at) not in budgets:
        bench.cell(measure_sparsek, shape, "sparsek", n)
    if n <= MAIN_LENGTH and (shape.name, "cudnn", at, "random") not in measured:
        bench.cell(measure_dense, shape, "cudnn", n)
    bench.save()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=400)
    parser.add_argument("--quick", action="store_true", help="only 8k, 32k and 131k of the first shape")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:3], help="the first is main")
    parser.add_argument("--gate", choices=GATES, default="value")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def main() -> None:
    chosen, begin = options(), time.perf_counter()
    torch.manual_seed(0)
    gpu = chosen.device == "cuda"
    machine = describe(chosen.device, chosen.commit)
    bench = Bench(chosen.device, chosen.out, begin + chosen.seconds, 1 if gpu else 256, machine, chosen.gate)
    shapes = [(SHAPES if gpu else TINY)[name] for name in chosen.shapes]
    before, after = cases(bench.gate)
    check(bench, before)
    check_determinism(bench, shapes[0])
    bench.save()
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    if chosen.quick:
        for n in FIGURES[:3]:
            both(bench, shapes[0], n)
    else:
        measure(bench, shapes)
        # Other gates are other kernels: half a minute each to compile, so the times come first.
        check(bench, after)
        complete(bench, shapes[1:])
    report(bench, shapes)
    report_scores(bench, shapes)
    for shape in first_budgets(shapes):
        report_figures(bench, shape, judged=chosen.shapes[0] == "wide" and shape is shapes[0])
    bench.save()
    plot(bench, shapes)
    print(f"all done after {time.perf_counter() - begin:.0f} s")
    failed = [text for text in (*bench.checks, *(row.note for row in bench.rows)) if "failed" in text]
    sys.exit(f"{len(failed)} cells or checks failed" if failed else 0)


if __name__ == "__main__":
    main()
