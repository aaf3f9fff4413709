"""What `sparsek eval` prints and writes: tables, JSON, a picture, and curves where the target is a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsek_dist import __version__
from sparsek_dist.commands.evaluation_target import Target
from sparsek_dist.errors import ConfigError
from sparsek_dist.evaluation.context import ContextUse, Estimate
from sparsek_dist.evaluation.retrieval import CHANCE, Cell
from sparsek_dist.training.metrics import MetricsLog


def write_results(
    target: Target, task: str, result: dict[str, Any], numbers: dict[str, float], plot: Callable[[str], Any]
) -> None:
    """JSON and picture, each whole or not there; for a run, TensorBoard too."""
    name = "eval" if task == "perplexity" else f"eval-{task}"
    at = f" at step {target.step}" if target.step else ""
    described = {
        "task": task,
        "model": target.name,
        "step": target.step or None,
        "attention": getattr(target.spec, "sparsek", None) or {"kind": "full"},
        "tokenizer": target.tokenizer_name,
        "data": target.data.path if task == "perplexity" or target.given_data else None,
        "processes": target.ranks.world_size,
        "version": __version__,
    }
    figure = plot(f"{target.name}{at}: {task}")
    try:
        target.out.mkdir(parents=True, exist_ok=True)
        with _replacing(target.out / f"{name}.json") as path:
            path.write_text(json.dumps(described | result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with _replacing(target.out / f"{name}.png") as path:
            figure.savefig(path, dpi=120, format="png")
        if target.run is not None:
            log = MetricsLog.evaluation(target.run, name)
            for tag, value in numbers.items():
                log.scalar(f"{name}/{tag}", value, target.step)
            log.figure(name, figure, target.step)
            log.close()
    except OSError as error:
        raise ConfigError(f"{target.out} cannot be written ({error}): choose another --out") from error
    Console(highlight=False, soft_wrap=True).print(f"written: {target.out / name}.json and {name}.png")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`, which it becomes when all went well."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def print_context_use(use: ContextUse, trigram: float | None, text: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    overall = use.overall
    console.print(f"{overall.targets:,} targets of {text}")
    console.print(f"loss           {_with_error(overall.loss, overall.loss_error)} nats")
    console.print(f"perplexity     {overall.perplexity:.4f}")
    console.print(f"bits per byte  {_with_error(overall.bits_per_byte, overall.bits_per_byte_error)}")
    if trigram is not None:
        console.print(f"trigram model  {trigram:.4f} bits per byte, on the same text")
    if use.by_length:
        table = _table("by context length: the same targets", "tokens at most", "more than with all")
        for row in use.by_length:
            _add(
                table,
                str(row.length),
                row.estimate,
                "" if row is use.by_length[-1] else _with_error(row.change, row.change_error),
            )
        console.print(table)
    else:
        console.print("no document fills a whole context, so nothing can be compared by context length")
    table = _table("by position in the context", "tokens before")
    for place in use.by_position:
        _add(table, "-".join(dict.fromkeys((str(place.first), str(place.last)))), place.estimate)
    console.print(table)


def _table(title: str, first: str, *last: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in (first, "targets", "bits per byte", "perplexity", *last):
        table.add_column(name, justify="right")
    return table


def _add(table: Table, first: str, estimate: Estimate, *last: str) -> None:
    bits = _with_error(estimate.bits_per_byte, estimate.bits_per_byte_error)
    table.add_row(first, f"{estimate.targets:,}", bits, f"{estimate.perplexity:.3f}", *last)


def retrieval_table(task: str, cells: Sequence[Cell], samples: int) -> Table:
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    title = f"{task}: share found | log likelihood in nats; {samples} samples each, {CHANCE:.1f} by chance"
    table = Table(title=title, title_justify="left")
    for name in ("tokens", *(f"depth {depth:g}" for depth in depths)):
        table.add_column(name, justify="right")
    for begin in range(0, len(cells), len(depths)):
        row = cells[begin : begin + len(depths)]
        table.add_row(str(row[0].length), *(f"{cell.accuracy:.2f} | {cell.log_likelihood:.1f}" for cell in row))
    return table


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} \N{PLUS-MINUS SIGN} {error:.4f}"
