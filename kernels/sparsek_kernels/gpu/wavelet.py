"""A wavelet tree over the ranks of all scores: how the candidates of any one query are ranked, without listing them.

The table of a row (one batch entry, one KV head) lists entries by position, so the candidates of a query are one range
of it. Its entries carry their rank: 0 for the best of the whole row. Level l of the tree lists the same entries sorted
by the first l bits of their rank and, where those are equal, by position. So the nodes of level l are blocks of
span / 2^l consecutive ranks, and the place of every node is known beforehand: the ranks are a permutation. For each
level we store two running totals, which is all that a query's way down needs (queries.py):

- `zeros`: how many entries so far go on to the better half of their node,
- `sums`: the sum of the scores so far.

Both start anew at every multiple of max(node, TILE), a *segment*: a tile of a small node needs to know nothing of other
tiles, and the sums stay short. They are inclusive. (Wavelet trees: Grossi, Gupta and Vitter, SODA 2003.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Entries that one program moves from a level to the next; a power of two."""
TILES_AT_ONCE = tl.constexpr(128)


@dataclass(frozen=True)
class Wavelet:
    """Of `rows` tables with `length` entries each."""

    ranked: Tensor
    """[rows, length]: scores, best first."""
    order: Tensor
    """[rows, length] int32: place in the table of the entry of each rank."""
    ranks: Tensor
    """[rows, length] int32: rank of each entry of the table."""
    centre: Tensor
    """[rows] float64: what is taken off every score before it is summed, to keep sums short."""
    zeros: Tensor
    """[rows, levels, length] int32, of levels 0 to levels - 1."""
    sums: Tensor
    """[rows, levels, length] float64, of levels 1 to levels."""
    tile: int

    @property
    def levels(self) -> int:
        """Bits of a rank; 2^levels exceeds the length."""
        return self.zeros.shape[1]


def bytes_per_entry(length: int) -> int:
    """Memory of a wavelet and of its making, per entry of the table."""
    return 12 * length.bit_length() + 48


def build_wavelet(table: Tensor, num_finite: int) -> Wavelet:
    """Ranks a table and builds its tree. Of two equal scores the later entry of the table ranks higher.

    Args:
        table: [rows, length], -inf for empty entries; no -0.0, which would rank below 0.0 on some devices.
        num_finite: at least so many entries of every row are finite.
    """
    rows, length = table.shape
    ranked, latest_first = table.flip(-1).sort(dim=-1, descending=True, stable=True)
    order = (length - 1 - latest_first).to(torch.int32)
    ranks = torch.empty_like(order)
    along = torch.arange(length, dtype=torch.int32, device=table.device).expand(rows, -1)
    ranks.scatter_(-1, order.long(), along)
    centre = ranked[:, num_finite // 2].double()

    levels, tiles = length.bit_length(), triton.cdiv(length, TILE)
    zeros = ranks.new_empty(rows, levels, length)
    sums = centre.new_empty(rows, levels, length)
    tile_zeros, tile_sums = ranks.new_empty(rows, tiles), centre.new_empty(rows, tiles)
    source, target, spare = ranks, torch.empty_like(ranks), torch.empty_like(ranks)
    for level in range(levels + 1):
        size = 1 << (levels - level)
        if size > TILE:
            _total_tiles[(tiles, rows)](source, ranked, centre, tile_zeros, tile_sums, length, size, TILE=TILE)
        _descend_level[(tiles, rows)](
            source, target, ranked, centre, tile_zeros, tile_sums, zeros, sums, length, level, levels, size, TILE=TILE
        )
        source, target, spare = target, spare, target
    return Wavelet(ranked, order, ranks, centre, zeros, sums, TILE)


@triton.jit
def _centred(ranked, centre, rank, inside):
    """Scores less the centre; 0 for empty entries, which are in nobody's sum."""
    score = tl.load(ranked + rank, mask=inside, other=float("-inf")).to(tl.float64)
    return tl.where(score > float("-inf"), score - centre, 0.0)


@triton.jit(do_not_specialize=["size"])
def _total_tiles(ids, ranked, centre, tile_zeros, tile_sums, length, size, TILE: tl.constexpr):
    """Of each tile of a level whose nodes are larger than tiles: entries that go to the better half, and its sum."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < length
    rank = tl.load(ids + row * length + at, mask=inside, other=0)
    better = inside & ((rank & (size // 2)) == 0)
    score = _centred(ranked + row * length, tl.load(centre + row), rank, inside)
    slot = row * tl.num_programs(0) + tile
    tl.store(tile_zeros + slot, tl.sum(better.to(tl.int32), 0))
    tl.store(tile_sums + slot, tl.sum(score, 0))


@triton.jit(do_not_specialize=["level", "size"])
def _descend_level(
    ids, next_ids, ranked, centre, tile_zeros, tile_sums, zeros, sums, length, level, levels, size, TILE: tl.constexpr
):
    """Writes the running totals of one level, and the entries in the order of the next."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < length
    rank = tl.load(ids + row * length + at, mask=inside, other=0)
    half = size // 2
    better = inside & ((rank & half) == 0)
    score = _centred(ranked + row * length, tl.load(centre + row), rank, inside)

    # A segment holds this tile alone, or one node: then the tiles of it that come before count too.
    segment = (tile * TILE) & -tl.maximum(size, TILE)
    zeros_before = tl.zeros([TILES_AT_ONCE], tl.int32)
    sums_before = tl.zeros([TILES_AT_ONCE], tl.float64)
    for first in range(segment // TILE, tile, TILES_AT_ONCE):
        others = first + tl.arange(0, TILES_AT_ONCE)
        slot = row * tl.num_programs(0) + others
        zeros_before += tl.load(tile_zeros + slot, mask=others < tile, other=0)
        sums_before += tl.load(tile_sums + slot, mask=others < tile, other=0.0)
    num_better = tl.sum(zeros_before, 0) + tl.cumsum(better.to(tl.int32), 0)
    running = tl.sum(sums_before, 0) + tl.cumsum(score, 0)

    out = (row * levels + level) * length + at
    descends = inside & (level < levels)
    tl.store(zeros + out, num_better, mask=descends)
    # Nobody needs the sums of level 0: those of level l are kept in place l - 1.
    tl.store(sums + out - length, running, mask=inside & (level > 0))
    node = at & -size
    in_better = node + num_better - (node - segment) // 2
    target = tl.where(better, in_better - 1, half + at + node - in_better)
    tl.store(next_ids + row * length + target, rank, mask=descends)
