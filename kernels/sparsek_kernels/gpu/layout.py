"""Where the key-major backward writes: one row per selected pair and span of queries, counted out beforehand.

A pair is selected during [became, until): one row for each span that this interval touches. Rows are numbered entry by
entry, so a running sum over all entries says where each begins; another one lists the entries that are selected at all.
Two launches: totals of tiles, then within each tile what came before it. The same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Entries that one program counts; a power of two."""
TILES_AT_ONCE = tl.constexpr(128)


@dataclass(frozen=True)
class Layout:
    """All tensors int32. Entries: carried scores (S), then the stream (t)."""

    first_row: Tensor
    """[b, g, S + t + 1]: row of each entry's first span; the next entry's is its end."""
    chosen: Tensor
    """[b, g, t]: entries of the stream that are selected at least once, oldest first; the rest is unused."""
    num_before: Tensor
    """[b, g, t + 1]: how many of `chosen` are older than each entry of the stream; the last: how many there are."""
    num_spans: int
    num_rows: int
    """Never more rows than this per KV head."""


def rows_of_selected(
    visible_until: Tensor, *, num_selected: int, support: int, window: int, span: int, num_queries: int
) -> Layout:
    """Counts the rows of all pairs.

    Args:
        visible_until: [b, g, S + t], contiguous int32.
        support: S, the carried entries.
    """
    b, g, entries = visible_until.shape
    t, tiles = entries - support, triton.cdiv(entries, TILE)
    num_spans = triton.cdiv(num_queries, span)

    def integers(*shape: int) -> Tensor:
        return torch.empty(b, g, *shape, dtype=torch.int32, device=visible_until.device)

    totals = integers(tiles, 2)
    layout = Layout(integers(entries + 1), integers(t), integers(t + 1), num_spans, num_spans * num_selected + t)
    numbers = (entries, support, t - num_queries, window, span)
    total_rows_kernel[(tiles, b * g)](visible_until, totals, *numbers, TILE=TILE)
    place_rows_kernel[(tiles, b * g)](
        visible_until, totals, layout.first_row, layout.chosen, layout.num_before, *numbers, TILE=TILE
    )
    return layout


@triton.jit
def _rows_of_tile(visible_until, entries, S, halo, window, span, TILE: tl.constexpr):
    """The entries [TILE] of this program, how many rows each has, and whether it is one of `chosen`."""
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    until = tl.load(visible_until + tl.program_id(1).to(tl.int64) * entries + entry, mask=entry < entries, other=0)
    became = tl.where(entry < S, 0, tl.maximum(entry - S - halo + window, 0))
    selected = until > became
    return entry, tl.where(selected, (until - 1) // span - became // span + 1, 0), selected & (entry >= S)


@triton.jit
def total_rows_kernel(visible_until, totals, entries, S, halo, window, span, TILE: tl.constexpr):
    """Of each tile of entries [b * g, tiles, 2]: rows, and chosen entries."""
    _, rows, chosen = _rows_of_tile(visible_until, entries, S, halo, window, span, TILE)
    slot = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(totals + slot, tl.sum(rows, 0))
    tl.store(totals + slot + 1, tl.sum(chosen.to(tl.int32), 0))


@triton.jit
def place_rows_kernel(
    visible_until, totals, first_row, chosen, num_before, entries, S, halo, window, span, TILE: tl.constexpr
):
    """Fills a Layout."""
    tile, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry, rows, is_chosen = _rows_of_tile(visible_until, entries, S, halo, window, span, TILE)
    rows_before = tl.zeros([TILES_AT_ONCE], tl.int32)
    chosen_before = tl.zeros([TILES_AT_ONCE], tl.int32)
    for first in range(0, tile, TILES_AT_ONCE):
        others = first + tl.arange(0, TILES_AT_ONCE)
        slot = (bg * tl.num_programs(0) + others) * 2
        rows_before += tl.load(totals + slot, mask=others < tile, other=0)
        chosen_before += tl.load(totals + slot + 1, mask=others < tile, other=0)
    last_row = tl.sum(rows_before, 0) + tl.cumsum(rows, 0)
    number = tl.sum(chosen_before, 0) + tl.cumsum(is_chosen.to(tl.int32), 0)

    inside, t = entry < entries, entries - S
    first_row, num_before = first_row + bg * (entries + 1), num_before + bg * (t + 1)
    tl.store(first_row + entry + 1, last_row, mask=inside)
    tl.store(num_before + entry - S + 1, number, mask=inside & (entry >= S))
    tl.store(chosen + bg * t + number - 1, entry, mask=is_chosen)
    if tile == 0:
        tl.store(first_row, 0)
        tl.store(num_before, 0)
