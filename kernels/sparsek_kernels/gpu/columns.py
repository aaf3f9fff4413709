"""The columns of one tile of queries, as device functions that the forward and the query-major backward share.

A tile is BQ neighbouring queries of one KV head with their G query heads: BQ * G rows of one matrix product. It belongs
to a chunk of queries, for which `alive` lists the selected pairs, best first. What it can see, in this order:

    plain:    the window's keys that every query of the tile sees, then the head of `alive`
    general:  the tail of `alive`, then keys that leave the window during the chunk, then the tile's own last keys

"Plain" columns need neither mask nor gate: they are nearly all. The worst of the list are evicted first and lose their
full gate first, so the plain part of `alive` is a beginning of it. An entry is an index into (carried scores, stream).
"""

# Arguments of device functions are pointers and numbers: Triton gives them no Python type.
import triton
import triton.language as tl

from sparsek_kernels.gpu.tiles import ANYWHERE

BEFORE_ALL = tl.constexpr(ANYWHERE)


@triton.jit
def tile_rows(tile, s, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Queries [BQ * GP] of the rows of a tile, the head of each within its group, and which rows exist.

    GP is G rounded up to a power of two.
    """
    rows = tl.arange(0, BQ * GP)
    queries = tile * BQ + rows // GP
    return queries, rows % GP, (queries < s) & (rows % GP < G)


@triton.jit
def tile_columns(
    tile, alive, num_alive, plain_until, document_start, s, halo, window, first_row, K: tl.constexpr, KP: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The numbers that say which columns a tile has: see `column_entries`. All pointers are those of this (b, g)."""
    chunk = tile * BQ // CHUNK
    low, high = tile * BQ, tl.minimum(tile * BQ + BQ, s)
    oldest = tl.maximum(tl.maximum(chunk * CHUNK - window + 1, -halo), tl.load(document_start + low))
    # Seen by the whole tile: not yet out of the last query's window, in its document, not after the first query.
    middle = tl.maximum(tl.maximum(oldest, high - window), tl.load(document_start + high - 1))
    middle = tl.minimum(middle, low + 1)
    count = tl.load(num_alive + chunk)
    num_plain = 0
    if K > 0:
        ranks = tl.arange(0, KP)
        listed = tl.load(alive + chunk.to(tl.int64) * K + ranks, mask=ranks < count, other=0)
        until = tl.load(plain_until + listed, mask=ranks < count, other=0)
        num_plain = tl.sum((until >= high).to(tl.int32), 0)
    oldest = tl.minimum(oldest, middle)
    # (list of this chunk), first plain window key, its count, alive, plain alive, first leaving key, its count
    return (
        alive + chunk.to(tl.int64) * K, middle, low + 1 - middle, count, num_plain, oldest, middle - oldest,
        high - low - 1, low + 1,
    )  # fmt: skip


@triton.jit
def column_entries(
    column, alive, middle, num_middle, num_alive, oldest, num_leaving, newest, first_row
):
    """Entry and position of some columns; BEFORE_ALL is the position of every listed pair.

    Args:
        column: [BN], 0 <= column < num_middle + num_alive + num_leaving + (keys from `newest` on).
        first_row: entry of the key at position 0.
    """
    rank = column - num_middle
    is_listed = (rank >= 0) & (rank < num_alive)
    after = rank - num_alive
    recent = tl.where(after < num_leaving, oldest + after, newest + after - num_leaving)
    position = tl.where(rank < 0, middle + column, recent)
    listed = tl.load(alive + rank, mask=is_listed, other=0)
    return tl.where(is_listed, listed, position + first_row), tl.where(is_listed, BEFORE_ALL, position)


@triton.jit
def row_pointers(entry, table, carried, table_stride, carried_stride, S, HAS_CARRY: tl.constexpr):
    """Where the key (or value) of each entry begins: in the stream, or, for the first S entries, in the carried pairs."""
    pointers = table + (entry - S).to(tl.int64) * table_stride
    if HAS_CARRY:
        pointers = tl.where(entry < S, carried + entry.to(tl.int64) * carried_stride, pointers)
    return pointers


@triton.jit
def load_rows(pointers, exists, D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr):
    """[BN, BD] rows, zeros beyond d; without MASK all rows exist."""
    width = tl.arange(0, BD)
    where = pointers[:, None] + width[None, :]
    if MASK:
        if D == BD:
            return tl.load(where, mask=exists[:, None], other=0.0)
        return tl.load(where, mask=exists[:, None] & (width < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(where)
    return tl.load(where, mask=(width < D)[None, :], other=0.0)


@triton.jit
def gates_of(score, tau, position, query, window):
    """[rows, BN] gates: clip(u - tau, 0, 1), and 1 inside the window."""
    gate = tl.minimum(tl.maximum(score - tau, 0.0), 1.0)
    return tl.where(query - position < window, 1.0, gate)
