"""Tables and plots of finished cells: means over seeds with standard errors, and differences of the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.quality.plots import PLOTS, plot_convert
from benchmarks.quality.summary import (
    Read,
    Row,
    by_variant,
    keys_found,
    layers,
    less_dense,
    mean_error,
    paired,
    tuned,
    with_dense,
)

Metric = tuple[str, Read, int]
"""Heading, how to read it off a finished cell, and digits behind the point."""
REFERENCES = ("sink_window", "random")
"""A scorer is worth something if it beats both at the same budget."""


def report(rows: Sequence[Row], out: Path, name: str) -> Path:
    """Writes OUT/NAME.md and a picture per task beside it, and prints the tables."""
    out.mkdir(parents=True, exist_ok=True)
    rows = with_dense(rows)
    parts = [f"# Quality at equal budget: {name}\n", _provenance(rows)]
    for task, metrics in (METRICS | {"time": _step_metrics(rows)}).items():
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        parts += [f"## {task}\n", *_tables(task, mine, metrics)]
        if figure := _figure(task, mine):
            figure.savefig(out / f"{name}_{task}.png", dpi=80)
            parts.append(f"![{task}]({name}_{task}.png)\n")
    text = "\n".join(parts)
    path = out / f"{name}.md"
    path.write_text(text)
    print(text)
    return path


def _figure(task: str, mine: Sequence[Row]) -> Figure | None:
    if task in PLOTS:
        return PLOTS[task](mine)
    return plot_convert(mine, *CONVERTED[task]) if task in CONVERTED else None


def _provenance(rows: Sequence[Row]) -> str:
    """Where and when the cells were run; more than one device means that times cannot be compared."""
    kinds = ("device", "torch", "transformers")
    told = [
        f"{kind} {', '.join(sorted({row[kind] for row in rows}))}" for kind in kinds if all(kind in r for r in rows)
    ]
    dates = sorted(row["date"] for row in rows if "date" in row)
    return "; ".join([f"{len(rows)} cells", *told, *([f"{dates[0]} to {dates[-1]}"] if dates else [])]) + ".\n"


def _tables(task: str, rows: Sequence[Row], metrics: Sequence[Metric]) -> list[str]:
    """One table; of converted models one per share of tuning."""
    if not task.startswith("convert-"):
        return [_table(rows, metrics)]
    shares: dict[float, list[Row]] = {}
    for row in sorted(rows, key=tuned):
        shares.setdefault(row["share"], []).append(row)
    return [f"{_tuning(share, mine[0])}:\n\n{_table(mine, metrics)}" for share, mine in shares.items()]


def _tuning(share: float, row: Row) -> str:
    last = f"Tuned for {100 * share:g} % of the dense model's"
    return f"{last} training" if tuned(row) == share else f"{last} last training, {tuned(row):.1%} of all of it"


def _table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """A row per variant, of the metrics that one has; the first also as paired differences to the references."""
    groups = by_variant(rows)
    metrics = [x for x in metrics if any(not math.isnan(x[1](row)) for row in rows)]
    (first, read, digits), *_ = metrics
    headings = ["attention", "seeds", *(f"{first} - {name}" for name in REFERENCES), *(entry[0] for entry in metrics)]
    lines = [_line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
    for variant, mine in groups.items():
        differences = [
            _number(paired(mine, groups.get(name, []), read), digits, sign=True) if name != variant else ""
            for name in REFERENCES
        ]
        values = [_number([value(row) for row in mine], places) for _, value, places in metrics]
        lines.append(_line([variant, str(len(mine)), *differences, *values]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    mean, error = mean_error(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def _accuracy(row: Row) -> float:
    return row["accuracy"]


def _bits(row: Row) -> float:
    return row["bits_per_byte"]


def _milliseconds(row: Row) -> float:
    return 1000 * row.get("step_seconds", math.nan)


def _step_metrics(rows: Sequence[Row]) -> list[Metric]:
    lengths = {length for row in rows if row["task"] == "time" for length, _ in row["step_seconds_by_length"]}
    return [(f"ms at {length}", _step_at(length), 0) for length in sorted(lengths)]


def _step_at(length: int) -> Read:
    return lambda row: 1000 * dict(map(tuple, row["step_seconds_by_length"])).get(length, math.nan)


def _at_distance(index: int) -> Read:
    return lambda row: row["accuracy_by_distance"][index]


def _where_kept(name: str) -> Read:
    """Of the layer that keeps most facts: one layer that keeps them is enough."""

    def read(row: Row) -> float:
        kept = layers(row, "kept")
        return layers(row, name)[kept.index(max(kept))] if kept else math.nan

    return read


def _tail(row: Row) -> float:
    """Of the targets that have at least half a context before them."""
    return row["by_position"][-1]["bits_per_byte"]


def _far(row: Row) -> float:
    """What the last targets cost more with the shortest of their contexts than with the whole."""
    return row["by_length"][0]["change"]


def _keys(windows: int) -> Read:
    """Of texts so many times as long as those in which all kinds see everything."""

    def read(row: Row) -> float:
        return keys_found(row, windows * min(cell["length"] for cell in row["passkey"]))

    return read


METRICS: dict[str, list[Metric]] = {
    "recall": [
        ("accuracy", _accuracy, 3),
        ("loss, nats", lambda row: row["loss"], 3),
        *((f"at {2**i}x", _at_distance(i), 2) for i in range(5)),
        ("facts kept", _where_kept("kept"), 2),
        ("support / k", _where_kept("support"), 2),
        ("ms a step", _milliseconds, 0),
    ],
    "short": [("bits per byte", _bits, 4), ("keys found", _keys(1), 2), ("ms a step", _milliseconds, 0)],
    "text": [
        ("bits per byte", _bits, 4),
        ("last half", _tail, 4),
        ("with less context", _far, 4),
        *((f"keys at {windows}x", _keys(windows), 2) for windows in (1, 2, 4, 8, 16, 32, 64)),
        ("ms a step", _milliseconds, 0),
    ],
    "convert-recall": [("accuracy", _accuracy, 3), ("facts kept", _where_kept("kept"), 2)],
    "convert-text": [
        ("lost", less_dense(_bits), 4),
        ("bits per byte", _bits, 4),
        ("last half", _tail, 4),
        ("keys at 2x", _keys(2), 2),
        ("keys at 8x", _keys(8), 2),
    ],
}
CONVERTED: dict[str, tuple[str, Read, bool]] = {
    "convert-recall": ("share of questions answered", _accuracy, False),
    "convert-text": ("bits per byte, less those of the dense model", _bits, True),
}
"""What a plot of converted models shows; last, whether less that of the dense model, as `lost` in the tables is."""
