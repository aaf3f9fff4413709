"""The columns of one tile of queries, as device functions that the forward and the query-major backward share.

A tile is BQ neighbouring queries of one KV head with their G query heads: BQ * G rows of one matrix product. It belongs
to a chunk of queries, for which `alive` lists the selected pairs, best first. Its columns, in this order:

    plain:    the window's keys that every query of the tile sees, then the head of `alive`: neither mask nor gate
    gated:    those of `alive` that every query still sees, but with a gate below 1
    general:  the tail of `alive`, keys that leave the window during the chunk, the tile's own last keys: all checks

The worst of the list are evicted first and lose their full gate first, so plain and gated are two beginnings of it, and
nearly all columns are one or the other. An entry is an index into (carried scores, stream).
"""

# Device functions take pointers and numbers, to which Triton gives no Python type.
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
    tile, alive, num_alive, plain_until, visible_until, document_start, s, halo, window, first_row,
    K: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """What `column_entries` needs to know, and the ends of the plain, of the gated and of all columns.

    Pointers are those of this (b, g); first_row is the entry of the key at position 0.
    """
    chunk = tile * BQ // CHUNK
    low, high = tile * BQ, tl.minimum(tile * BQ + BQ, s)
    alive += chunk.to(tl.int64) * K
    oldest = tl.maximum(tl.maximum(chunk * CHUNK - window + 1, -halo), tl.load(document_start + low))
    # Seen by the whole tile: not yet out of the last query's window, in its document, not after the first query.
    middle = tl.maximum(tl.maximum(oldest, high - window), tl.load(document_start + high - 1))
    middle = tl.minimum(middle, low + 1)
    oldest = tl.minimum(oldest, middle)
    count = tl.load(num_alive + chunk)
    num_plain, num_seen = 0, 0
    if K > 0:
        ranks = tl.arange(0, KP)
        listed = tl.load(alive + ranks, mask=ranks < count, other=0)
        num_plain = tl.sum((tl.load(plain_until + listed, mask=ranks < count, other=0) >= high).to(tl.int32), 0)
        num_seen = tl.sum((tl.load(visible_until + listed, mask=ranks < count, other=0) >= high).to(tl.int32), 0)
    num_middle = low + 1 - middle
    columns = (alive, middle, num_middle, count, oldest, middle - oldest, low + 1, first_row)
    end = num_middle + count + middle - oldest + high - low - 1
    return columns, num_middle + num_plain, num_middle + num_seen, end


@triton.jit
def column_entries(column, columns):
    """Entry and position of some columns [BN]; BEFORE_ALL is the position of every listed pair."""
    alive, middle, num_middle, num_alive, oldest, num_leaving, newest, first_row = columns
    rank = column - num_middle
    is_listed = (rank >= 0) & (rank < num_alive)
    after = rank - num_alive
    recent = tl.where(after < num_leaving, oldest + after, newest + after - num_leaving)
    position = tl.where(rank < 0, middle + column, recent)
    listed = tl.load(alive + rank, mask=is_listed, other=0)
    return tl.where(is_listed, listed, position + first_row), tl.where(is_listed, BEFORE_ALL, position)


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
def load_pairs(entry, real, pairs, D: tl.constexpr, BD: tl.constexpr, HAS_CARRY: tl.constexpr, MASK: tl.constexpr):
    """Keys and values [BN, BD] of some entries: of the stream, or, for the first S entries, of the carried pairs.

    Args:
        pairs: key and value of this (b, g), strides of their tokens, carried key and value, their stride, S.
    """
    key, value, key_stride, value_stride, carried_key, carried_value, carried_stride, S = pairs
    row = (entry - S).to(tl.int64)
    key_at, value_at = key + row * key_stride, value + row * value_stride
    if HAS_CARRY:
        carried = entry.to(tl.int64) * carried_stride
        key_at = tl.where(entry < S, carried_key + carried, key_at)
        value_at = tl.where(entry < S, carried_value + carried, value_at)
    return load_rows(key_at, real, D, BD, MASK), load_rows(value_at, real, D, BD, MASK)


@triton.jit
def pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S):
    """The `pairs` of `load_pairs`."""
    k, v = k + batch * kb + head * kg, v + batch * vb + head * vg
    return k, v, ks, vs, carry_k + batch * cb + head * cg, carry_v + batch * cb + head * cg, cs, S


@triton.jit
def program_of(number, g):
    """(b, g) as one number, and apart; int64, as offsets of whole heads need."""
    bg = number.to(tl.int64)
    return bg, bg // g, bg % g
