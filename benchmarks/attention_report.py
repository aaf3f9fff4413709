"""What attention.py makes of its cells: the table, the figures beside their goals, the plot."""

from __future__ import annotations

import math

from matplotlib import pyplot

from attention_cells import SLOPES, Bench, Row, Shape
from machine import in_words
from report import logarithmic, number, print_table, save_figure

MAIN_LENGTH, LONGEST = 131072, 1048576
HEADINGS = ("shape", "method", "k = w", "scores", "length", "forward", "fwd + bwd", "selection", "extra memory", "note")
NAMES = {"sparsek": ("SPARSEK", "C0"), "cudnn": ("dense, cuDNN", "C1"), "flash": ("dense, flash", "C2")}


def report(bench: Bench, shapes: list[Shape]) -> None:
    rows = []
    for row in sorted(bench.rows, key=lambda row: (row.shape, row.budget, row.scores, row.method, row.length)):
        shape = next(x for x in shapes if x.name == row.shape and x.budget == row.budget)
        flops = shape.flops(row.method != "sparsek", row.length)
        times = [f"{t:.3f} ({x * flops / t / 1e9:.0f})" if t else "-" for t, x in ((row.forward, 1), (row.step, 3.5))]
        budget, scores = (str(row.budget), row.scores) if row.method == "sparsek" else ("", "")
        cells = (f"{row.length:,}", *times, number(row.select, ".3f"), number(row.extra, ".1%"))
        rows.append((row.shape, row.method, budget, scores, *cells, row.note))
    title = f"milliseconds, effective TFLOP/s in brackets; {in_words(bench.machine)}, {bench.dtype}"
    print_table(title, HEADINGS, rows, left=("note",))


def report_scores(bench: Bench, shapes: list[Shape]) -> None:
    """The three kinds of scores beside each other, where all of a shape were measured."""
    rows, n = [], MAIN_LENGTH // bench.shrink
    for shape in shapes:
        by_kind = {x.scores: x for x in _measured(bench, shape, "sparsek") if x.length == n}
        if len(by_kind) < len(SLOPES):
            continue
        times = [f"{by_kind[kind].forward:.2f} / {by_kind[kind].step:.2f}" for kind in SLOPES]
        worst = max(by_kind[kind].step for kind in SLOPES) / by_kind["random"].step
        rows.append((shape.name, str(shape.budget), *times, f"{worst:.3f}"))
    if rows:
        print_table(
            f"forward / forward + backward by kind of scores at {n:,}, milliseconds",
            ("shape", "k = w", *(f"{kind}, {rise:g} a token" for kind, rise in SLOPES.items()), "worst / random"),
            rows,
        )


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
    """Name, reached, format, at least, aim, remark; against cuDNN, for random scores."""
    sparse = {row.length: row for row in _measured(bench, shape, "sparsek") if row.scores == "random"}
    plain = {row.length: row for row in _measured(bench, shape, "cudnn")}
    n, longest = MAIN_LENGTH // bench.shrink, LONGEST // bench.shrink
    one, far, rival = sparse.get(n), sparse.get(longest), plain.get(n)
    forward, step = (rival and one and getattr(rival, x) / getattr(one, x) for x in ("forward", "step"))
    from_, remark = crossover(sparse, plain)
    return [
        (f"forward at {n} against cuDNN", forward, ".1f", 18, 25, "times as fast"),
        (f"fwd + bwd at {n} against cuDNN", step, ".1f", 15, 22, "times as fast"),
        ("fwd + bwd beats cuDNN from", from_, ",.0f", 12288 // bench.shrink, 7168 // bench.shrink, remark),
        (f"selection share of fwd + bwd at {n}", one and one.select / one.step, ".1%", 0.12, 0.06, ""),
        (f"fwd + bwd at {longest} / 8 x at {n}", one and far and far.step / one.step / 8, ".3f", 1.03, 1.0, ""),
        (f"extra memory at {longest}", far and far.extra, ".1%", 0.15, 0.08, "of q, k, v, o and gradients"),
    ]


def report_figures(bench: Bench, shape: Shape, *, judged: bool) -> None:
    """The goals are those of the main shape."""
    rows = []
    bench.figures[shape.name] = {}
    for name, reached, form, least, aim, remark in figures(bench, shape):
        sign = 1 if aim > least else -1
        verdict = "" if reached is None else "missed" if sign * reached < sign * least else "at least"
        verdict = "aim" if reached is not None and sign * reached >= sign * aim else verdict
        goals = (format(least, form), format(aim, form), verdict) if judged else ("", "", "")
        rows.append((name, number(reached, form), *goals, remark))
        bench.figures[shape.name][name] = reached
    title = f"{shape.name}, k = w = {shape.budget}, S = {4 * shape.budget}, random scores"
    headings = ("figure", "reached", "at least", "aim", "verdict", "remark")
    print_table(title, headings, rows, left=headings, width=130)


def plot(bench: Bench, shapes: list[Shape]) -> None:
    """Time against length, both axes logarithmic; one panel per number of heads, at its first budget."""
    shown = [shape for shape in first_budgets(shapes) if _measured(bench, shape, "sparsek")]
    if not shown:
        return
    figure, axes = pyplot.subplots(1, len(shown), figsize=(7 * len(shown), 5), squeeze=False)
    for axis, shape in zip(axes[0], shown, strict=True):
        for method, (name, colour) in NAMES.items():
            mine = [row for row in _measured(bench, shape, method) if row.scores == "random"]
            for pass_, style, label in (("forward", "o--", "forward"), ("step", "o-", "forward + backward")):
                at, times = [x.length for x in mine], [getattr(x, pass_) for x in mine]
                if mine:
                    axis.plot(at, times, style, color=colour, label=f"{name}, {label}")
        if at := figures(bench, shape)[2][1]:
            axis.axvline(at, color="grey", linestyle=":", label=f"forward + backward beats cuDNN from {at:,.0f}")
        lengths = {row.length for row in bench.rows if row.shape == shape.name}
        logarithmic(axis, lengths, across="length, tokens", up="milliseconds")
        title = f"{shape.name}, k = w = {shape.budget}, S = {4 * shape.budget}\n{in_words(bench.machine)}"
        axis.set_title(title, fontsize="medium")
        axis.legend(fontsize="small")
    save_figure(figure, bench.out / "attention.png")


def first_budgets(shapes: list[Shape]) -> list[Shape]:
    """One of each number of heads."""
    return [shape for i, shape in enumerate(shapes) if shape.name not in [x.name for x in shapes[:i]]]


def _measured(bench: Bench, shape: Shape, method: str) -> list[Row]:
    """Rows with times, the shortest first. Dense attention has no budget."""
    rows = [row for row in bench.rows if (row.shape, row.method) == (shape.name, method) and row.step is not None]
    rows = [row for row in rows if method != "sparsek" or row.budget == shape.budget]
    return sorted(rows, key=lambda row: row.length)
