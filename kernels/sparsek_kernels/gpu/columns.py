"""The columns of one tile of queries, as device functions that the forward and the query-major backward share.

A tile is BQ neighbouring queries of one KV head with GP of its query heads: BQ * GP rows of one matrix product. Where
GP, a power of two, is below G, the next tiles are the same queries with the next heads: `tile_rows` is told the tile,
what concerns queries alone the tile of queries. A tile belongs to a chunk of queries, for which `alive` lists the
selected pairs, best first. It sees four kinds of columns:

    middle:   keys in the window of every query of the tile, one after the other in memory
    plain:    a beginning of `alive` that every query of the tile sees with gate 1
    gated:    the next of `alive`, that every query still sees, but with a gate below 1
    general:  the end of `alive`, the window's first and last keys: every check is made

The worst of the list are evicted first and lose their full gate first, so plain and gated are beginnings of it. Middle
and plain columns, nearly all, need neither mask nor gate. An entry is an index into (carried scores, stream).
"""

# Device functions take pointers and numbers, to which Triton gives no Python type.
import triton
import triton.language as tl

from sparsek_kernels.gpu.tiles import ANYWHERE

BEFORE_ALL = tl.constexpr(ANYWHERE)


@triton.jit
def tile_rows(tile, s, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Queries [BQ * GP] of the rows of a tile, the head of each within its group, and which rows exist."""
    PARTS: tl.constexpr = tl.cdiv(G, GP)
    rows = tl.arange(0, BQ * GP)
    queries = tile // PARTS * BQ + rows // GP
    member = tile % PARTS * GP + rows % GP
    return queries, member, (queries < s) & (member < G)


@triton.jit
def _start(document_start, query):
    """Where a query's document begins, in 32 bits."""
    return tl.maximum(tl.load(document_start + query), BEFORE_ALL).to(tl.int32)


@triton.jit
def tile_columns(
    tile, alive, fractional_from, visible_until, document_start, s, halo, window,
    K: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Where the kinds of columns begin and end; pointers are those of this (b, g).

    Args:
        fractional_from: with `visible_until` in its place, no gate counts.

    Returns:
        `alive` of the chunk, how many it lists, how many of them are plain (a multiple of BN), and plain or gated (so
        many multiples of BG more); the first position of the middle, and how many there are (a multiple of BN); the
        oldest position of the window.
    """
    middle, num_middle, oldest = window_columns(tile, document_start, s, halo, window, CHUNK, BQ, BN)
    high = tl.minimum(tile * BQ + BQ, s)
    alive += (tile * BQ // CHUNK).to(tl.int64) * K
    count, plain, seen = 0, 0, 0
    if K > 0:
        ranks = tl.arange(0, KP)
        listed = tl.load(alive + ranks, mask=ranks < K, other=-1)
        exists = listed >= 0
        count = tl.sum(exists.to(tl.int32), 0)
        is_seen = tl.load(visible_until + listed, mask=exists, other=0) >= high
        is_plain = is_seen & (tl.load(fractional_from + listed, mask=exists, other=0) >= high)
        seen, plain = tl.sum(is_seen.to(tl.int32), 0), tl.sum(is_plain.to(tl.int32), 0) // BN * BN
    gated = plain + tl.maximum(seen - plain, 0) // BG * BG
    return alive, count, plain, gated, middle, num_middle, oldest


@triton.jit
def window_columns(
    tile, document_start, s, halo, window, CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """The last three of `tile_columns`."""
    chunk = tile * BQ // CHUNK
    low, high = tile * BQ, tl.minimum(tile * BQ + BQ, s)
    oldest = tl.maximum(tl.maximum(chunk * CHUNK - window + 1, -halo), _start(document_start, low))
    oldest = tl.minimum(oldest, low + 1)
    # Seen by the whole tile: not yet out of the last query's window, in its document, not after the first query.
    middle = tl.maximum(tl.maximum(oldest, high - window), _start(document_start, high - 1))
    num_middle = tl.maximum(low + 1 - middle, 0) // BN * BN
    return low + 1 - num_middle, num_middle, oldest


@triton.jit
def general_entries(column, end, alive, num_listed, oldest, middle, num_middle, origin, S, visible_until):
    """Of some general columns [BN]: which exist, their entries (S where they do not), positions (BEFORE_ALL for listed
    pairs), and until when they are seen.

    Args:
        end: how many there are.
        alive: the first listed one, and num_listed: how many they are.
        origin: entry of the key at position 0.
    """
    real, is_listed = column < end, column < num_listed
    recent = oldest - num_listed + column
    position = tl.where(recent < middle, recent, recent + num_middle)
    listed = tl.load(alive + column, mask=is_listed, other=0)
    entry = tl.where(real, tl.where(is_listed, listed, position + origin), S)
    until = tl.load(visible_until + entry, mask=real, other=0)
    return real, entry, tl.where(is_listed, BEFORE_ALL, position), until


@triton.jit
def num_general(num_listed, oldest, num_middle, tile, s, BQ: tl.constexpr):
    """How many general columns there are, from the first listed one to the tile's last key."""
    return num_listed + tl.minimum(tile * BQ + BQ, s) - oldest - num_middle


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
def load_neighbours(first, pairs, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Keys and values [BN, BD] of neighbouring rows of the stream."""
    key, value, key_stride, value_stride = pairs[0], pairs[1], pairs[2], pairs[3]
    rows = tl.arange(0, BN)
    key_at = key + first.to(tl.int64) * key_stride + rows * key_stride
    value_at = value + first.to(tl.int64) * value_stride + rows * value_stride
    return load_rows(key_at, rows, D, BD, False), load_rows(value_at, rows, D, BD, False)


@triton.jit
def row_products(rows, columns, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Products [M, N] of a tile's rows [M, BD] and columns [N, BD].

    Exact products are sums that a thread adds up alone, of numbers from shared memory, those of the first factor first.
    The rows lie there since before the loop. As the first factor they would be loaded before all threads wait for the
    columns to lie there, too, and be held in registers meanwhile; as the second, both are loaded as they are needed.
    All of float32 goes that way, on tensor cores, too.
    """
    if rows.dtype.primitive_bitwidth > 16:
        products = tl.trans(tl.dot(columns, tl.trans(rows), out_dtype=ACC, input_precision=PRECISION))
    else:
        products = tl.dot(rows, tl.trans(columns), out_dtype=ACC, input_precision=PRECISION)
    return products


@triton.jit
def pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S):
    """The `pairs` of `load_pairs`."""
    k, v = k + batch * kb + head * kg, v + batch * vb + head * vg
    return k, v, ks, vs, carry_k + batch * cb + head * cg, carry_v + batch * cb + head * cg, cs, S


@triton.jit
def anew(number, size):
    """The same number; but the compiler, which cannot know that no size is negative, computes what depends on it where
    that is used, instead of holding it in registers, or spilling it, through the loops before. Each place needs a size
    of its own: what two places compute from one is computed once.

    Args:
        number: not negative. A maximum, unlike a sum, cannot be put together differently; times 16, it stays known to
            be a multiple of 16 where `number` is.
    """
    return tl.maximum(number, tl.minimum(size, 0) * 16)


@triton.jit
def program_of(number, g):
    """(b, g) as one number, and apart; int64, as offsets of whole heads need."""
    return number.to(tl.int64), (number // g).to(tl.int64), (number % g).to(tl.int64)
