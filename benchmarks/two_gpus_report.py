"""Of two_gpus.py: tables, the picture, and what of it did not come out as it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from machine import in_words
from overlay import draw, largest_difference
from report import logarithmic, number, print_table, save_figure, tokens

EFFICIENCY = 0.95
"""Goal: tokens per second and GPU on all GPUs over those on one."""
NAMES = {"layer": "one attention layer, forward + backward", "training": "optimizer step of a small model"}


def report(result: dict[str, Any]) -> None:
    print(in_words(result["machine"]), f"{result['gpus']} GPUs")
    _report_errors(result.get("errors", []))
    rows = [
        (x["exchange"], f"{x['n']:,}", *(f"{x['received'][way]:,}" for way in ("forward", "backward")),
         "equal" if x["equal"] else "DIFFERS") for x in result.get("bytes", [])
    ]  # fmt: skip
    if rows:
        print_table("bytes received, most of any rank", ("exchange", "n", "forward", "backward", "formulas"), rows)
    rows = [
        (f"{x['num_bytes']:,}", *(f"{1e6 * x[way]:.0f}" for way in ("all_gather", "exchange")),
         f"{x['num_bytes'] / x['exchange'] / 1e9:.1f}") for x in result.get("links", [])
    ]  # fmt: skip
    if rows:
        print_table("links", ("bytes", "all-gather, us", "neighbours, us", "neighbours, GB/s each way"), rows)
    for part, title in NAMES.items():
        _report_speed(title, result.get(part, []), result["gpus"])
    for name, (difference, step) in differences(result).items():
        print(f"losses in {name}: all GPUs differ from one by at most {difference:.2e} of the loss, at step {step}")
    for note in result["notes"]:
        print(note)


def _report_errors(rows: list[dict[str, Any]]) -> None:
    if rows:
        print_table(
            "relative errors against float64; within: not above twice that of one GPU",
            ("case", "exchange", "tensor", "one GPU", "shared", "shared against one", "within"),
            [
                (x["case"], x["exchange"], x["tensor"], *(f"{x[name]:.1e}" for name in ("one", "shared", "between")),
                 "yes" if x["within"] else "NO") for x in rows
            ],
        )  # fmt: skip


def _report_speed(title: str, rows: list[dict[str, Any]], gpus: int) -> None:
    if not rows:
        return
    cells = []
    for row in sorted(rows, key=lambda x: (x["kind"], x["tokens"], x["gpus"], x["degree"])):
        how = "one GPU" if row["gpus"] == 1 else "shared" if row["degree"] > 1 else "data-parallel"
        cost, gain = exchange_share(row), efficiency(row, rows)
        cells.append(
            (row["kind"], tokens(row["tokens"]), how, f"{row['milliseconds']:.2f}", f"{row['tokens_per_second']:,.0f}",
             number(gain, ".3f"), number(cost, ".1%"), number(row.get("peak_gigabytes"), ".1f"))
        )  # fmt: skip
    headings = ("kind", "tokens per GPU", "run as", "ms", "tokens/s/GPU", "against one", "exchange", "GB")
    print_table(f"{title}; goal: at least {EFFICIENCY} on {gpus} GPUs", headings, cells)


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    one = [x for x in rows if x["gpus"] == 1 and (x["kind"], x["tokens"]) == (row["kind"], row["tokens"])]
    return row["tokens_per_second"] / one[0]["tokens_per_second"] if one and row["gpus"] > 1 else None


def exchange_share(row: dict[str, Any]) -> float | None:
    """Of the time: what is saved when everything that is received is there already."""
    if "without_exchange" not in row:
        return None
    return 1 - row["without_exchange"] / row["milliseconds"]


def differences(result: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """By precision: the largest relative difference of the losses, and its step."""
    found = {}
    for precision in {x["precision"] for x in result.get("curves", [])}:
        pair = {x["gpus"] == 1: _curve(x) for x in result["curves"] if x["precision"] == precision}
        if len(pair) == 2:
            found[precision] = largest_difference(pair[True], pair[False])
    return found


def _curve(row: dict[str, Any]) -> dict[int, float]:
    return dict(enumerate(row["losses"], start=1))


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be: wrong results, other bytes, parts that failed. A missed goal of speed is a result."""
    wrong = [f"{x['case']}, {x['exchange']}, {x['tensor']}" for x in result.get("errors", []) if not x["within"]]
    other = [f"{x['exchange']} at {x['n']}" for x in result.get("bytes", []) if not x["equal"]]
    failed = [note for note in result["notes"] if "failed" in note]
    return [f"errors above twice those of one GPU: {x}" for x in wrong] + [f"other bytes: {x}" for x in other] + failed


def plot(result: dict[str, Any], path: Path) -> None:
    """Efficiency, links and losses, as far as they were measured."""
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 7), height_ratios=[3, 2])
    for axis, part in zip((axes[0, 0], axes[1, 0]), NAMES, strict=True):
        _plot_efficiency(axis, result.get(part, []), NAMES[part])
    rows = result.get("links", [])
    if rows:
        sizes = [x["num_bytes"] for x in rows]
        for way, label in (("all_gather", "all-gather"), ("exchange", "neighbours")):
            axes[0, 1].plot(sizes, [1e6 * x[way] for x in rows], "o-", label=label)
            axes[1, 1].plot(sizes, [x["num_bytes"] / x[way] / 1e9 for x in rows], "o-", label=label)
        logarithmic(axes[0, 1], sizes[::2], across="", up="microseconds")
        logarithmic(axes[1, 1], sizes[::2], across="bytes", up="GB/s")
        axes[0, 1].legend()
    curves = {f"{x['precision']}, {x['gpus']} GPU": _curve(x) for x in result.get("curves", [])}
    if len(curves) > 1:
        draw(dict(sorted(curves.items(), key=lambda item: "float32, 1" not in item[0])), axes[0, 2], axes[1, 2])
    title = f"{result['gpus']} GPUs that share sequences; {in_words(result['machine'])}"
    added = [note for note in result["notes"] if ": added at " in note]
    figure.suptitle("; ".join([title, *added]), fontsize="medium")
    save_figure(figure, path)


def _plot_efficiency(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    lines = (
        ("sparsek", True, "SPARSEK, shared sequence"),
        ("sparsek", False, "SPARSEK, data-parallel"),
        ("full", True, "dense (Ulysses), shared sequence"),
    )
    for index, (kind, shared, label) in enumerate(lines):
        mine = [x for x in rows if x["kind"] == kind and x["gpus"] > 1 and (x["degree"] > 1) == shared]
        points = [(x["tokens"], gain) for x in mine if (gain := efficiency(x, rows)) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}", label=label)
    axis.axhline(EFFICIENCY, color="grey", linestyle=":", label=f"goal {EFFICIENCY}")
    axis.set(xscale="log", xlabel="tokens per GPU", ylabel="tokens/s/GPU against one")
    at = sorted({x["tokens"] for x in rows})
    axis.set_xticks(at, [tokens(n) for n in at])
    axis.minorticks_off()
    axis.set_title(title, fontsize="medium")
    axis.legend(fontsize="small")
