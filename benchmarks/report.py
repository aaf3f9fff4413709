"""Tables and plots as all benchmarks draw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table


def number(x: float | None, form: str = ".3g") -> str:
    return "-" if x is None else format(x, form)


def print_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = (), width: int = 150
) -> None:
    """Figures to the right, but for the columns named in `left`."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def tokens(n: int) -> str:
    """128k for 131,072."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


def logarithmic(axis: Any, lengths: Iterable[int], *, across: str, up: str) -> None:
    """Both axes, with a tick at every length."""
    at = sorted(set(lengths))
    axis.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
    axis.set_xticks(at, [tokens(n) for n in at])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
