"""Sizes of the kernels' tiles: a short static table, so that nothing is tuned behind the user's back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

ANYWHERE = -(1 << 30)
"""Position that lies before every key and every document."""
CHUNK, SPAN = 128, 1024
"""Of all tables: the lists that selection makes are laid out by the first, whatever computes attention later."""


@dataclass(frozen=True)
class Tile:
    """One kernel's program: rows (queries x query heads) by columns (keys), warps, and depth of the load pipeline."""

    rows: int
    """A power of two. Where more query heads share a KV head, several tiles take them."""
    columns: int
    warps: int
    stages: int
    gated_columns: int = 0
    """Of the query-major kernels: columns at a time where gates or masks need room, a divisor of `columns`; 0: all."""
    precision: str = "ieee"
    """Of matrix products: `ieee` multiplies numbers as they are, float32 without tensor cores; `tf32x3` sums three
    products of their halves, on tensor cores, and errs like float32."""
    registers: int | None = None
    """Most of a thread. None: as the assembler likes, sometimes fewer than needed, for more programs to run at once."""

    @property
    def at_once(self) -> int:
        return self.gated_columns or self.columns


@dataclass(frozen=True)
class Tiles:
    """All sizes of one call."""

    chunk: int
    """B: queries that share one list of selected pairs."""
    span: int
    """Queries over which the key-major backward sums a selected pair's gradient before writing it; a multiple of B."""
    forward: Tile
    grad_query: Tile
    grad_selected: Tile
    grad_window: Tile


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.x, whose own matrix products take 64 rows at a time."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def tiles_for(head_dim: int, group_size: int, element_size: int, *, hopper: bool = False, gate: str = "value") -> Tiles:
    """By head width, query heads per KV head, and bytes per element: the largest found that spill no registers.

    So it is for all heads of tests/kernels/real_heads.py; with others, a kernel may spill one: kernels/README.md.

    On Hopper, most of those for 64, 128 and 256 with 1, 2 or 4 heads were timed; all others are only known to fit.

    Args:
        hopper: whether the GPU is one.
        gate: `straight_through` gives `grad_query` two accumulators, `key_value` takes registers everywhere.
    """
    if element_size > 2:
        return _of_float32(head_dim, group_size, element_size, gate)
    forward, grad_query = _query_major(head_dim, group_size, hopper, gate)
    grad_selected, grad_window = _key_major(head_dim, group_size, hopper, gate)
    return Tiles(CHUNK, SPAN, forward, grad_query, grad_selected, grad_window)


def _of_float32(head_dim: int, group_size: int, element_size: int, gate: str) -> Tiles:
    """Tiles of float32; and of float64, in the interpreter."""
    exact = Tile(16, 16, 4 if head_dim <= 64 else 8, 1, registers=128)
    two_sums = gate == "straight_through"
    if element_size > 4 or head_dim > 128:
        # Three products would take more registers than there are.
        more = replace(exact, registers=255)
        return Tiles(CHUNK, SPAN, exact, more if two_sums else exact, more if group_size == 1 else exact, exact)
    tile = Tile(32, 16, 4 if head_dim <= 64 else 8, 1, precision="tf32x3", registers=255)
    # Two accumulators leave no registers for three products; nor do masks everywhere, for wide heads.
    odd = _is_odd(group_size)
    full = (two_sums and (head_dim > 64 or odd)) or (gate == "none" and head_dim > 64 and odd)
    few = head_dim <= 32 or (head_dim > 64 and odd and group_size < 8)
    return Tiles(CHUNK, SPAN, tile, exact if full else replace(tile, rows=16) if few else tile, tile, tile)


def _is_odd(group_size: int) -> bool:
    """Whether some rows of a tile are no head's, which is a mask to hold in registers."""
    return group_size & (group_size - 1) != 0


def _query_major(head_dim: int, group_size: int, hopper: bool, gate: str) -> tuple[Tile, Tile]:
    """Tiles of `forward` and `grad_query`."""
    odd, two_sums = _is_odd(group_size), gate == "straight_through"
    if head_dim <= 64:
        gated = 32 if hopper else 16
        return Tile(64, 64, 4, 2, 64 if hopper and not odd else 32), Tile(64, 64, 4, 2, gated)
    if head_dim <= 128:
        if hopper:
            few = two_sums and (odd or head_dim < 128 or group_size > 4)
            return Tile(128, 64, 8, 3), Tile(128, 64, 8, 2, 16 if few else 32)
        forward = Tile(128, 64, 8, 3, 16 if odd or gate == "key_value" else 32)
        if two_sums:
            return forward, Tile(64 if odd or group_size > 8 else 128, 64, 8, 2, 16)
        return forward, Tile(64, 64, 4, 2, 16)
    low = Tile(64, 32, 8, 2, 16)
    if not hopper:
        return Tile(64, 32, 8, 2), Tile(32, 32, 4, 2, 16) if two_sums else low
    # Rows enough for Hopper's products; GPUs before it lack the shared memory.
    short = two_sums or (gate == "key_value" and (odd or group_size == 1))
    return Tile(128, 64, 8, 2, 16 if gate == "key_value" else 32), low if short else Tile(128, 32, 8, 2, 16)


def _key_major(head_dim: int, group_size: int, hopper: bool, gate: str) -> tuple[Tile, Tile]:
    """Tiles of `grad_selected` and `grad_window`."""
    odd = _is_odd(group_size)
    if group_size > 32:
        selected = Tile(32, 32, 4, 2) if head_dim <= 32 else Tile(64, 32, 8, 2)
        return selected, Tile(64, 32, 4 if head_dim <= 64 else 8, 2)
    if head_dim <= 64:
        tile = Tile(16 if odd and group_size <= 16 and not hopper else 32, 64, 4, 3)
        return tile if hopper else replace(tile, registers=255), tile
    if head_dim <= 128:
        if group_size > 16:
            many = Tile(32, 128 if hopper else 32, 8 if hopper else 4, 2)
            return many, many
        short, tall = Tile(16, 64, 4, 3), Tile(32, 64, 4, 2)
        if hopper:
            return short if odd or head_dim < 128 else tall, tall if odd else Tile(32, 64, 4, 3)
        window = short if odd else tall if group_size > 8 else Tile(32, 64, 4, 3)
        return short if odd or head_dim < 128 or group_size == 2 else tall, window
    if group_size > 16 or not hopper:
        return Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)
    # Keys enough for Hopper's products.
    short, tall = Tile(16, 64, 8, 3), Tile(32, 64, 8, 2)
    selected = Tile(32, 64, 8, 3) if group_size == 1 else tall
    return short if odd or head_dim < 256 or gate == "key_value" else selected, short if odd else tall
