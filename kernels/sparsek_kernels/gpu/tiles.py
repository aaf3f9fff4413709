"""Sizes of the kernels' tiles: a short static table, so that nothing is tuned behind the user's back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ANYWHERE = -(1 << 30)
"""Position that lies before every key and every document."""
CHUNK, SPAN = 128, 1024
"""Of all tables: the lists that selection makes are laid out by the first, whatever computes attention later."""


@dataclass(frozen=True)
class Tile:
    """One kernel's program: rows (queries x query heads) by columns (keys), warps, and depth of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """All sizes of one call."""

    chunk: int
    """B: queries that share one list of selected pairs."""
    span: int
    """Queries over which the key-major backward sums a selected pair's gradient before writing it; a multiple of B."""
    forward: Tile
    grad_query: Tile
    gated_columns: int
    """Columns at a time of `grad_query` where their gate is below 1: two accumulators need room."""
    grad_selected: Tile
    grad_window: Tile


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.x, whose own matrix products take 64 rows at a time."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def tiles_for(
    head_dim: int, group_size: int, element_size: int, *, hopper: bool = False, two_sums: bool = False
) -> Tiles:
    """By head width and bytes per element. Those for half precision were tuned on one H200 or H100, no others.

    Args:
        hopper: whether the GPU is one.
        two_sums: whether `grad_query` has two accumulators (`straight_through`), which leave it less room.
    """
    if element_size > 2:
        narrow = Tile(16, 16, 4, 1)
        rows = Tile(max(narrow.rows, group_size), narrow.columns, 4, 1)
        return Tiles(CHUNK, SPAN, rows, rows, 16, rows, rows)
    if head_dim <= 64:
        wide = Tile(64, 64, 4, 2)
        return Tiles(CHUNK, SPAN, wide, wide, 32, Tile(32, 64, 4, 3), Tile(32, 64, 4, 3))
    if head_dim <= 128:
        wide = Tile(128, 64, 8, 3)
        return Tiles(CHUNK, SPAN, wide, Tile(128, 64, 8, 2), 32, Tile(32, 64, 4, 2), Tile(32, 64, 4, 3))
    low = Tile(64, 32, 8, 2)
    if not hopper:
        return Tiles(CHUNK, SPAN, low, low, 16, Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))
    # Rows, or keys in the key-major kernels, enough for Hopper's products; GPUs before it lack the shared memory.
    grad_query = low if two_sums else Tile(128, 32, 8, 2)
    return Tiles(CHUNK, SPAN, Tile(128, 64, 8, 2), grad_query, 16, Tile(32, 64, 8, 2), Tile(64, 64, 8, 2))
