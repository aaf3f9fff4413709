"""One picture per task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.summary import Read, Row, by_variant, keys_found, less_dense, mean_error, passkey_lengths, tuned

DEFAULT = "sparsek, value, std 1, slope 4"
FIRST_POSITION = 32
"""Before it stand so few targets that their noise would set the range of the plot."""
BASE = "sink_window"
"""What a plot of text is less."""
KINDS = ("full", "window", "sink_window", "random", DEFAULT)
"""In every plot, and always in the same colours."""
OTHERS = 4
"""Further variants in a plot of text: more curves than colours could not be told apart."""


def plot_recall(rows: Sequence[Row]) -> Figure:
    """Accuracy by distance, and of every variant and seed."""
    variants = by_variant(rows)
    figure = Figure(figsize=(12, max(4.0, 0.3 * len(variants) + 1.2)), layout="constrained")
    by_distance, overall = figure.subplots(1, 2)
    # The best of those with the most seeds: the best of single models would be a lucky one.
    ours = [variant for variant in variants if variant.startswith("sparsek")]
    best = max(ours, key=lambda v: (len(variants[v]), _mean(variants[v], _accuracy)), default="")
    for variant in _unique([*KINDS, best], variants):
        curve = [row["accuracy_by_distance"] for row in variants[variant]]
        _curve(by_distance, [2**i for i in range(len(curve[0]))], curve, variant, colour=_colour(variant, [best]))
    by_distance.axhline(1 / 8, color="grey", linestyle=":", label="chance")
    by_distance.set(xlabel="tokens from fact to question, in windows", ylabel="share of questions answered")
    by_distance.set_ylim(0, 1.02)
    _legend(by_distance)
    _dots(overall, variants, _accuracy)
    overall.set(xlabel="share of questions answered (a dot per seed)")
    return figure


def plot_text(rows: Sequence[Row]) -> Figure:
    """Bits per byte by position, less those of sink_window, and pass keys by length.

    Of the variants that are no default: those with the most seeds, and of these the ones that predict best.
    """
    variants = by_variant(rows)
    others = sorted(set(variants) - set(KINDS), key=lambda v: (-len(variants[v]), _mean(variants[v], _bits)))
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_position, keys = figure.subplots(1, 2)
    base = {row["seed"]: _positions(row) for row in variants.get(BASE, [])}
    for variant in _unique([*KINDS, *others[:OTHERS]], variants):
        # One legend serves both axes, though the left ones have a curve less.
        colour = _colour(variant, others)
        mine = [row for row in variants[variant] if row["seed"] in base]
        if mine and variant != BASE:
            less = [[x - base[row["seed"]][place] for place, x in _positions(row).items()] for row in mine]
            _curve(by_position, list(_positions(mine[0])), less, variant, colour=colour)
        lengths = passkey_lengths(variants[variant][0])
        curves = [[keys_found(row, length) for length in lengths] for row in variants[variant]]
        _curve(keys, lengths, curves, variant, colour=colour)
    by_position.axhline(0, color="grey", linestyle=":")
    by_position.set(xlabel="tokens before the target, at most", ylabel=f"bits per byte, less those of {BASE}")
    keys.set(xlabel="tokens of the text", ylabel="share of pass keys found")
    keys.set_ylim(-0.02, 1.02)
    _legend(keys)
    return figure


def plot_convert(rows: Sequence[Row], label: str, read: Read, less: bool) -> Figure:
    """A number of the converted models by the share of tuning, and that of the dense ones that they were.

    With `less`, less that of its own dense model: where those differ from model to model by more than conversion
    changes, the errors of the numbers themselves would hide it.
    """
    figure = Figure(figsize=(9.5, 6.5), layout="constrained")
    axes = figure.subplots()
    if not less:
        # A line at 0 would only flatten what is to be seen.
        dense = {row["seed"]: row["dense"] for row in rows if "dense" in row}
        axes.axhline(_mean(list(dense.values()), read), color="grey", linestyle=":", label="dense, not converted")
    shown = less_dense(read) if less else read
    variants = by_variant(rows)
    others = [variant for variant in variants if variant not in KINDS]
    for variant, mine in variants.items():
        shares = sorted({tuned(row) for row in mine})
        found = {(row["seed"], tuned(row)): shown(row) for row in mine}
        seeds = sorted({row["seed"] for row in mine})
        curves = [[found.get((seed, share), math.nan) for share in shares] for seed in seeds]
        places = [100 * share for share in shares]
        _curve(axes, places, curves, variant, logarithmic=False, colour=_colour(variant, others))
    axes.set(xlabel="tuning, in % of all that the dense model was trained on", ylabel=label)
    _legend(axes)
    return figure


PLOTS = {"recall": plot_recall, "text": plot_text}
"""None for `short`: it is where the models of `text` come from."""


def _accuracy(row: Row) -> float:
    return row["accuracy"]


def _bits(row: Row) -> float:
    return row["bits_per_byte"]


def _positions(row: Row) -> dict[int, float]:
    """Bits per byte by the last position of each bin."""
    return {x["last"]: x["bits_per_byte"] for x in row["by_position"] if x["first"] >= FIRST_POSITION}


def _mean(rows: Sequence[Row], read: Read) -> float:
    return mean_error([read(row) for row in rows])[0]


def _unique(names: Sequence[str], known: dict[str, list[Row]]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name in known]


def _colour(variant: str, others: Sequence[str]) -> str:
    return f"C{[*KINDS, *(name for name in others if name not in KINDS)].index(variant)}"


def _curve(
    axes: Axes,
    places: Sequence[float],
    curves: Sequence[Sequence[float]],
    label: str,
    *,
    logarithmic: bool = True,
    colour: str | None = None,
) -> None:
    """Mean over seeds, with one standard error each way where there are several."""
    means, errors = zip(*(mean_error(column) for column in zip(*curves, strict=True)), strict=True)
    axes.errorbar(places, means, np.nan_to_num(errors), marker="o", markersize=4, capsize=3, label=label, color=colour)
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _legend(axes: Axes) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)


def _dots(axes: Axes, variants: dict[str, list[Row]], read: Read) -> None:
    """A line per variant, best on top, a dot per seed."""
    names = sorted(variants, key=lambda name: _mean(variants[name], read))
    for place, name in enumerate(names):
        values = [read(row) for row in variants[name]]
        axes.plot(values, [place] * len(values), "o", markersize=4, color="C0" if name.startswith("sparsek") else "C1")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.grid(alpha=0.3)
