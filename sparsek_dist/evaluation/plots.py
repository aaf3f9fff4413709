"""Pictures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsek_dist.evaluation.context import ContextUse, Estimate
from sparsek_dist.evaluation.retrieval import CHANCE, Cell


def plot_context_use(use: ContextUse, title: str) -> Figure:
    """Bits per byte by position, and by context length where it was measured, with one standard error each way."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    by_length, by_position = figure.subplots(1, 2)
    if use.by_length:
        lengths = [row.length for row in use.by_length]
        _curve(by_length, lengths, [row.estimate for row in use.by_length])
        by_length.set_xticks(lengths, [str(length) for length in lengths])
    else:
        words = "no document fills\na whole context"
        by_length.text(0.5, 0.5, words, ha="center", va="center", transform=by_length.transAxes)
    by_length.set(xlabel="tokens of context at most (the same targets)", ylabel="bits per byte")
    middles = [math.sqrt(row.first * row.last) for row in use.by_position]
    _curve(by_position, middles, [row.estimate for row in use.by_position])
    by_position.set_xticks(*_ticks(use.by_position[-1].last))
    by_position.set(xlabel="tokens of the document before the target", ylabel="bits per byte")
    return figure


def plot_retrieval(cells: Sequence[Cell], title: str) -> Figure:
    """Two heat maps, length by depth: share found, and log likelihood of the answer."""
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    figure = Figure(figsize=(4 + 1.4 * len(lengths), 2.2 + 0.45 * len(depths)), layout="constrained")
    figure.suptitle(title)
    shape = (len(lengths), len(depths))
    panels = [
        ("share of answers found", np.array([cell.accuracy for cell in cells]), 0.0, 1.0, "{:.2f}"),
        ("log likelihood, nats", np.array([cell.log_likelihood for cell in cells]), CHANCE, 0.0, "{:.1f}"),
    ]
    for axes, (name, values, low, high, form) in zip(figure.subplots(1, 2), panels, strict=True):
        grid = values.reshape(shape).T
        axes.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(title=name, xlabel="tokens", ylabel="depth of the needle")
        for (row, column), value in np.ndenumerate(grid):
            color = "black" if value > low + 0.6 * (high - low) else "white"
            axes.text(column, row, form.format(value), ha="center", va="center", color=color, fontsize=8)
    return figure


def _curve(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate]) -> None:
    errors = np.nan_to_num([estimate.bits_per_byte_error for estimate in estimates])
    axes.set_xscale("log", base=2)
    axes.errorbar(places, [estimate.bits_per_byte for estimate in estimates], errors, marker="o", capsize=3)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _ticks(last: int) -> tuple[list[int], list[str]]:
    places = [2**i for i in range(0, last.bit_length(), 2)]
    return places, [str(place) for place in places]
