"""Finished cells, grouped by what only the seed tells apart, and what a few seeds say about a number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.scales import SCALES

Row = dict[str, Any]
Read = Callable[[Row], float]
"""How to read a number off a finished cell; NaN where it has none."""


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Cells that differ in their seed only, in the order in which they were run."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error, NaN for one seed. Values that are NaN are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return statistics.mean(known), error


def paired(rows: Sequence[Row], reference: Sequence[Row], read: Read) -> list[float]:
    """`rows` less `reference`, for each seed that both have: same data, same test, other attention."""
    base = {row["seed"]: read(row) for row in reference}
    return [read(row) - base[row["seed"]] for row in rows if row["seed"] in base]


def with_dense(rows: Sequence[Row]) -> list[Row]:
    """Converted cells with the row of the dense model that they were as `dense`: that of their task and seed.

    Rows of several sessions bring their own: each session trained its dense models anew, and GPUs do not repeat them.
    """
    dense = {(row["task"], row["seed"]): row for row in rows if row["kind"] == "full"}
    return [_with_dense(row, dense.get((row["task"].removeprefix("convert-"), row["seed"]))) for row in rows]


def _with_dense(row: Row, dense: Row | None) -> Row:
    converted = row["task"].startswith("convert-")
    return {"dense": dense, **row} if converted and dense is not None else row


def less_dense(read: Read) -> Read:
    """A number of a converted model, less that of the dense one that it was; NaN where that is not known."""
    return lambda row: read(row) - read(row["dense"]) if "dense" in row else math.nan


def tuned(row: Row) -> float:
    """Tuning of a converted cell, as a share of all tokens that its dense model was trained on."""
    return SCALES[row["scale"]].tuned(row["task"].removeprefix("convert-"), row["share"])


def layers(row: Row, name: str) -> list[float]:
    """NAME_0, NAME_1, .. of a cell; none for dense attention."""
    found = []
    while (key := f"{name}_{len(found)}") in row:
        found.append(row[key])
    return found


def keys_found(row: Row, length: int) -> float:
    """Share of the pass keys that are found in texts of one length, over its depths; NaN if there are none."""
    shares = [cell["accuracy"] for cell in row["passkey"] if cell["length"] == length]
    return statistics.mean(shares) if shares else math.nan


def passkey_lengths(row: Row) -> list[int]:
    return sorted({cell["length"] for cell in row["passkey"]})
