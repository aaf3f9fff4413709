"""What decode.py makes of its cells: the table, the files, the plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from decode_cells import GPU, Row
from machine import in_words, save
from report import logarithmic, print_table, save_figure

COLOURS = ["C0", "C1", "C2", "C3", "C4", "C5"]


def report(rows: list[Row], bandwidth: float, machine: dict[str, Any]) -> None:
    cells = []
    for row in rows:
        rate = row.gigabytes_per_second
        figures = ["" if row.microseconds is None else f"{row.microseconds:.1f}"]
        figures += ["", ""] if rate is None else [f"{rate:.0f}", f"{rate / bandwidth:.0%}"]
        cells.append((row.heads, str(row.batch), row.method, f"{row.context:,}", *figures, row.note))
    headings = ("heads", "batch", "method", "context", "us", "GB/s", "of copy", "note")
    title = f"one step of one layer; copy {bandwidth:.0f} GB/s; {in_words(machine)}"
    print_table(title, headings, cells, left=("heads", "method", "note"), width=160)


def save_all(rows: list[Row], bandwidth: float, good: bool, machine: dict[str, Any], folder: Path) -> None:
    result = {"machine": machine, "copy_gigabytes_per_second": bandwidth, "correct": good}
    save(folder / "decode.json", result | {"rows": [asdict(row) for row in rows]})
    plot(rows, folder / "decode.png")


def plot(rows: list[Row], path: Path) -> None:
    """Time against context: dense rises, SPARSEK is a level line."""
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
            times, at = [row.microseconds for row in level], [row.context for row in level]
            if len(times) == 1:
                at, times = [contexts[0], contexts[-1]], times * 2
            axis.plot(at, times, "--", color=colour, label=f"SPARSEK, batch {batch}")
        logarithmic(axis, contexts, across="context, tokens", up="microseconds per step")
        axis.set_title(f"{heads}; {sparse}", fontsize="medium")
        axis.legend(fontsize="small")
    save_figure(figure, path)
