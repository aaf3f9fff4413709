"""The constants of scaling.py, read from what attention.py and two_gpus.py wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import Heads, in_words


@dataclass
class Measured:
    sparse_us_per_token: float | None = None
    dense_ps_per_pair: float | None = None
    near: tuple[float, float] | None = None
    """Latency in seconds, bytes per second."""
    shared: list[tuple[str, int, int, float]] = field(default_factory=list)
    """Kind, tokens per rank, ranks, milliseconds."""
    where: str = ""


def read(files: Sequence[Path], heads: Heads, budget: int) -> Measured:
    """Of layers of these heads and this budget; what an earlier file holds is not taken from a later one."""
    found = Measured()
    for file in files:
        result = json.loads(file.read_text())
        if "gpus" not in result:
            _one_rank(found, *_attention(result, heads, budget))
            continue
        rows = [x for x in result.get("layer", []) if (x["heads"], x["budget"]) == (heads.name, budget)]
        alone = [(x["kind"], x["tokens"], x["milliseconds"]) for x in rows if x["gpus"] == 1]
        _one_rank(found, *([(n, t) for kind, n, t in alone if kind == name] for name in ("sparsek", "full")))
        found.shared = [(x["kind"], x["tokens"], x["gpus"], x["milliseconds"]) for x in rows if x["gpus"] > 1]
        found.near = _link(result.get("links", []))
        found.where = f"{result['gpus']} ranks on {in_words(result['machine'])}"
    return found


def _attention(result: dict[str, Any], heads: Heads, budget: int) -> tuple[list, list]:
    """(length, milliseconds) of SPARSEK and of cuDNN."""
    # Older results have underscores for spaces.
    mine = [x for x in result["rows"] if x["shape"].replace("_", " ") == heads.name and x["step"]]
    rows = [x for x in mine if x["scores"] == "random"]
    sparse = [x for x in rows if x["method"] == "sparsek" and x["budget"] == budget]
    return tuple([(x["length"], x["step"]) for x in y] for y in (sparse, [x for x in rows if x["method"] == "cudnn"]))


def _one_rank(found: Measured, sparse: list[tuple[int, float]], dense: list[tuple[int, float]]) -> None:
    """At the longest length, where launches no longer count."""
    if sparse and found.sparse_us_per_token is None:
        n, milliseconds = max(sparse)
        found.sparse_us_per_token = 1e3 * milliseconds / n
    if dense and found.dense_ps_per_pair is None:
        n, milliseconds = max(dense)
        found.dense_ps_per_pair = 1e9 * milliseconds / (n * n / 2)


def _link(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Between neighbours: the smallest message is all latency, the largest all bandwidth."""
    if len(rows) < 2:
        return None
    small, large = (pick(rows, key=lambda x: x["num_bytes"]) for pick in (min, max))
    return small["exchange"], large["num_bytes"] / max(large["exchange"] - small["exchange"], 1e-9)
