"""A wavelet tree over the ranks of all scores: how the candidates of any one query are ranked, without listing them.

The table of a row (one batch entry, one KV head) lists entries by position, so the candidates of a query are one range
of it. Its entries carry their rank: 0 for the best of the whole row. Level l of the tree lists the same entries sorted
by the first l bits of their rank and, where those are equal, by position. So the nodes of level l are blocks of
span / 2^l consecutive ranks, and the place of every node is known beforehand: the ranks are a permutation. For each
level we store two running totals, which is all that a query's way down needs (queries.py):

- `ends`: the node's start plus how many of its entries so far go on to its better half: where these end one level down,
- `sums`: the sum of the scores so far.

The sums start anew at every multiple of max(node, TILE), a *segment*: a tile of a small node needs to know nothing of
other tiles, and the sums stay short. Both are inclusive. (Wavelet trees: Grossi, Gupta and Vitter, SODA 2003.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Entries that one program moves from a level to the next; a power of two."""
MOST_BITS = 2
"""Levels that one pass over the entries goes down at most, where nodes are larger than tiles. More take fewer launches,
but each doubles the numbers that a program holds at a time: 3 took 0.34 ms at 131k tokens on an H100, 2 take 0.23."""
BLOCK = 512
"""Entries that one program of `rank_entries_kernel` works on."""
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
    ends: Tensor
    """[rows, levels, length] int32, of levels 0 to levels - 1."""
    sums: Tensor
    """[rows, levels, length] float64, of levels 1 to levels."""
    tile: int

    @property
    def levels(self) -> int:
        """Bits of a rank; 2^levels exceeds the length."""
        return self.ends.shape[1]


def bytes_per_entry(length: int) -> int:
    """Memory of a wavelet and of its making, per entry of the table."""
    return 12 * length.bit_length() + 48


def build_wavelet(latest_first: Tensor, num_finite: int) -> Wavelet:
    """Ranks a table and builds its tree. Of two equal scores the later entry of the table ranks higher.

    Args:
        latest_first: [rows, length], the table from its end to its beginning; -inf for empty entries; no -0.0, which
            would rank below 0.0 on some devices.
        num_finite: at least so many entries of every row are finite.
    """
    rows, length = latest_first.shape
    ranked, index = latest_first.sort(dim=-1, descending=True, stable=True)
    order = torch.empty(rows, length, dtype=torch.int32, device=ranked.device)
    ranks = torch.empty_like(order)
    levels, tiles = length.bit_length(), triton.cdiv(length, TILE)
    centre = torch.empty(rows, dtype=torch.float64, device=ranked.device)
    rank_entries_kernel[(triton.cdiv(length, BLOCK), rows)](
        ranked, index, order, ranks, centre, length, num_finite // 2, BLOCK=BLOCK
    )

    ends = ranks.new_empty(rows, levels, length)
    sums = centre.new_empty(rows, levels, length)
    counts, totals = ranks.new_empty(rows, tiles, 1 << MOST_BITS), centre.new_empty(rows, tiles, 1 << MOST_BITS)
    # From this level on a node fits into a tile.
    within = max(0, levels - TILE.bit_length() + 1)
    ids, target, spare, level = ranks, torch.empty_like(ranks), torch.empty_like(ranks), 0
    while level < within:
        bits, size = min(MOST_BITS, within - level), 1 << (levels - level)
        total_tiles_kernel[(tiles, rows)](ids, ranked, centre, counts, totals, length, size, TILE=TILE, BITS=bits)
        descend_kernel[(tiles, rows)](
            ids, target, ranked, centre, counts, totals, ends, sums, length, level, levels, size,
            TILE=TILE, BITS=bits, num_warps=8,
        )  # fmt: skip
        ids, target, spare, level = target, spare, target, level + bits
    descend_within_tiles_kernel[(tiles, rows)](
        ids, target, ranked, centre, ends, sums, length, level, levels, TILE=TILE
    )
    return Wavelet(ranked, order, ranks, centre, ends, sums, TILE)


@triton.jit
def rank_entries_kernel(ranked, index, order, ranks, centre, length, middle, BLOCK: tl.constexpr):
    """From the sorted table, latest first, to that of each rank's entry and of each entry's rank; and the centre."""
    row = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < length
    entry = length - 1 - tl.load(index + row * length + rank, mask=inside, other=0).to(tl.int32)
    tl.store(order + row * length + rank, entry, mask=inside)
    tl.store(ranks + row * length + entry, rank, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(centre + row, tl.load(ranked + row * length + middle).to(tl.float64))


@triton.jit
def _centred(ranked, centre, rank, inside):
    """Scores less the centre; 0 for empty entries, which are in nobody's sum."""
    score = tl.load(ranked + rank, mask=inside, other=float("-inf")).to(tl.float64)
    return tl.where(score > float("-inf"), score - centre, 0.0)


@triton.jit
def _entries_of_tile(ids, ranked, centre, length, TILE: tl.constexpr):
    """Rank and centred score of the entries [TILE] of this program's tile, and which of them exist."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < length
    rank = tl.load(ids + row * length + at, mask=inside, other=0)
    return rank, _centred(ranked + row * length, tl.load(centre + row), rank, inside), inside


@triton.jit(do_not_specialize=["size"])
def total_tiles_kernel(ids, ranked, centre, counts, totals, length, size, TILE: tl.constexpr, BITS: tl.constexpr):
    """Of each tile of a level whose nodes are larger than tiles: how many entries go to each of the 2^BITS nodes below
    theirs, BITS levels further down; and the sums of the scores, by the 2^(BITS - 1) nodes one level before that.
    """
    rank, score, inside = _entries_of_tile(ids, ranked, centre, length, TILE)
    bucket = (rank // (size >> BITS)) & ((1 << BITS) - 1)
    buckets, halves = tl.arange(0, 1 << BITS), tl.arange(0, 1 << (BITS - 1))
    member = inside[None, :] & (bucket[None, :] == buckets[:, None])
    score = tl.where((bucket // 2)[None, :] == halves[:, None], score[None, :], 0.0)
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + (slot << BITS) + buckets, tl.sum(member.to(tl.int32), 1))
    tl.store(totals + (slot << (BITS - 1)) + halves, tl.sum(score, 1))


@triton.jit
def _tiles_before(counts, totals, first_tile, BITS: tl.constexpr):
    """Sums over the tiles [first_tile, this one) of what `total_tiles_kernel` wrote: [2^BITS] and [2^(BITS - 1)]."""
    tile = tl.program_id(0)
    start = tl.program_id(1).to(tl.int64) * tl.num_programs(0)
    buckets, halves = tl.arange(0, 1 << BITS), tl.arange(0, 1 << (BITS - 1))
    count = tl.zeros([1 << BITS, TILES_AT_ONCE], tl.int32)
    total = tl.zeros([1 << (BITS - 1), TILES_AT_ONCE], tl.float64)
    for first in range(first_tile, tile, TILES_AT_ONCE):
        others = first + tl.arange(0, TILES_AT_ONCE)
        earlier = (others < tile)[None, :]
        slot = (start + others)[None, :]
        count += tl.load(counts + (slot << BITS) + buckets[:, None], mask=earlier, other=0)
        total += tl.load(totals + (slot << (BITS - 1)) + halves[:, None], mask=earlier, other=0.0)
    return tl.sum(count, 1), tl.sum(total, 1)


@triton.jit(do_not_specialize=["level", "size"])
def descend_kernel(
    ids, next_ids, ranked, centre, counts, totals, ends, sums, length, level, levels, size, TILE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Writes the running totals of BITS levels, and the entries in the order of the level after them.

    At each of these levels the nodes are larger than tiles. An entry's node on level l + j, and its place there, follow
    from how many entries of its node on level l came so far, by bucket: the node they go to, BITS levels below.
    """
    rank, score, inside = _entries_of_tile(ids, ranked, centre, length, TILE)
    row = tl.program_id(1).to(tl.int64)
    node = (tl.program_id(0) * TILE) & -size
    bucket = (rank // (size >> BITS)) & ((1 << BITS) - 1)
    buckets, halves = tl.arange(0, 1 << BITS)[:, None], tl.arange(0, 1 << (BITS - 1))[:, None]
    counts_before, totals_before = _tiles_before(counts, totals, node // TILE, BITS)
    member = inside[None, :] & (bucket[None, :] == buckets)
    counted = counts_before[:, None] + tl.cumsum(member.to(tl.int32), 1)
    score = tl.where((bucket // 2)[None, :] == halves, score[None, :], 0.0)
    summed = totals_before[:, None] + tl.cumsum(score, 1)
    for step in tl.static_range(BITS):
        mine = (bucket >> (BITS - step))[None, :]
        to_mine = (buckets >> (BITS - step)) == mine
        place = tl.sum(tl.where(to_mine, counted, 0), 0)
        better = to_mine & (((buckets >> (BITS - step - 1)) & 1) == 0)
        num_better = tl.sum(tl.where(better, counted, 0), 0)
        running = tl.sum(tl.where((halves >> (BITS - step - 1)) == mine, summed, 0.0), 0)
        start = node + (bucket >> (BITS - step)) * (size >> step)
        out = (row * levels + level + step) * length + start + place - 1
        tl.store(ends + out, start + num_better, mask=inside)
        # Nobody needs the sums of level 0: those of level l are kept in place l - 1.
        tl.store(sums + out - length, running, mask=inside & (level + step > 0))
    place = tl.sum(tl.where(buckets == bucket[None, :], counted, 0), 0)
    at = node + bucket * (size >> BITS) + place - 1
    tl.store(next_ids + row * length + at, rank, mask=inside)


@triton.jit(do_not_specialize=["level"])
def descend_within_tiles_kernel(ids, scratch, ranked, centre, ends, sums, length, level, levels, TILE: tl.constexpr):
    """Writes the running totals of the last levels, from the first whose nodes fit into tiles: a tile each on its own.

    Entries change places through `scratch`, between which all threads of the program wait for each other.
    """
    rank, score, inside = _entries_of_tile(ids, ranked, centre, length, TILE)
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE
    at = segment + tl.arange(0, TILE)
    scratch += row * length
    for depth in range(level, levels + 1):
        size = 1 << (levels - depth)
        half = size // 2
        better = inside & ((rank & half) == 0)
        node = at & -size
        # In the tile's earlier nodes, which are full, exactly half of the entries is counted.
        in_better = node + tl.cumsum(better.to(tl.int32), 0) - (node - segment) // 2
        out = (row * levels + depth) * length + at
        descends = inside & (depth < levels)
        tl.store(ends + out, in_better, mask=descends)
        tl.store(sums + out - length, tl.cumsum(score, 0), mask=inside & (depth > 0))
        target = tl.where(better, in_better - 1, half + at + node - in_better)
        tl.store(scratch + target, rank, mask=descends)
        tl.debug_barrier()
        rank = tl.load(scratch + at, mask=descends, other=0)
        score = _centred(ranked + row * length, tl.load(centre + row), rank, descends)
        tl.debug_barrier()
