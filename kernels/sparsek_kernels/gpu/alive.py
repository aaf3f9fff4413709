"""What each chunk's first query selects, as a list, best first.

The ranks of these k entries mostly lie close together: where every tenth entry of the row is a candidate, they are some
of 10 k consecutive ranks. So a program reads the entries of such ranks and keeps those that are candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsek_kernels.gpu.queries import candidate_range, quantile

PART, SPARSE = 256, 16
"""Entries that one program lists, and the ranks per entry from which on it looks for each in the tree."""


@triton.jit
def _slots_of(entry, exists, carry_order, carried):
    """Places in (carry, stream) of entries of the table, where carried entries stand by position."""
    is_carried = exists & (entry < carried)
    slot = tl.load(carry_order + entry, mask=is_carried, other=0).to(tl.int32)
    return tl.where(is_carried, slot, entry)


@triton.jit
def _list_by_rank(order, carry_order, carried, low, high, first, last, out, BLOCK: tl.constexpr):
    """Lists those of the ranks [first, last] that are candidates."""
    for block in range(first, last + 1, BLOCK):
        rank = block + tl.arange(0, BLOCK)
        entry = tl.load(order + rank, mask=rank <= last, other=-1)
        exists = (entry >= low) & (entry < high)
        found = exists.to(tl.int32)
        tl.store(out + tl.cumsum(found, 0) - 1, _slots_of(entry, exists, carry_order, carried), mask=exists)
        out += tl.sum(found, 0)


@triton.jit
def _list_by_tree(
    tree, order, carry_order, carried, low, high, begin, end, out, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Lists the candidates [begin, end)."""
    for block in range(begin, end, BLOCK):
        nth = block + tl.arange(0, BLOCK)
        exists = nth < end
        rank, _ = quantile(tree, low + nth * 0, high + nth * 0, tl.minimum(nth, end - 1), TILE, False)
        entry = tl.load(order + rank, mask=exists, other=0)
        tl.store(out + nth, _slots_of(entry, exists, carry_order, carried), mask=exists)


@triton.jit
def alive_kernel(
    ends, sums, ranked, length, levels, span, order,
    document_start, carry_positions, carry_order, alive,
    first_row, heads, s, carried, carry_steps, halo, num_selected, window, chunk_size,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """The k best candidates of each chunk's first query, best first, as places in (carry, stream): PART of them.

    Only the first and the last of them are looked for in the tree. The others are those of the ranks in between that
    are candidates, unless these are so few, one in SPARSE or less, that looking for each of them takes less time.
    """
    row = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(num_selected, PART)
    chunk, begin = tl.program_id(0) // parts, tl.program_id(0) % parts * PART
    query = chunk * chunk_size
    start = tl.load(document_start + (first_row + row) // heads * s + query)
    low, high = candidate_range(query, start, carry_positions + row * carried, carried, carry_steps, halo, window)
    part_end = tl.minimum(begin + PART, num_selected)
    end = tl.maximum(tl.minimum(part_end, high - low), begin)
    tree = (ends + row * levels * length, sums, ranked, length, levels, span)
    order, carry_order = order + row * length, carry_order + row * carried
    alive += (row * tl.num_programs(0) // parts + chunk) * num_selected
    if end > begin:
        two = tl.arange(0, 2)
        borders, _ = quantile(tree, low + two * 0, high + two * 0, tl.where(two == 0, begin, end - 1), TILE, False)
        first, last = tl.min(borders, 0), tl.max(borders, 0)
        if last - first < (end - begin) * SPARSE:
            _list_by_rank(order, carry_order, carried, low, high, first, last, alive + begin, BLOCK)
        else:
            _list_by_tree(tree, order, carry_order, carried, low, high, begin, end, alive, TILE, BLOCK)
    for block in range(end, part_end, BLOCK):
        nth = block + tl.arange(0, BLOCK)
        tl.store(alive + nth, -1, mask=nth < part_end)
