"""The columns of one tile of queries as one list, for kernels in Gluon: what they are, and how their rows are fetched.

The kinds of columns.py follow each other: the middle, the listed pairs (plain ones first), the rest of the window. A
column's rank is its place in that list, counted from the first listed pair; those of the middle are negative. Tiles of
the list up to the last plain pair need neither mask nor gate, those up to the last pair that all queries see no mask.
Rows are fetched by asynchronous copies, so that gathered and neighbouring ones cost the same.
"""

# Device functions take pointers and numbers, to which Triton gives no Python type.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sparsek_kernels.gpu.tiles import ANYWHERE

BEFORE_ALL = gl.constexpr(ANYWHERE)
AFTER_ALL = gl.constexpr(-ANYWHERE)


@gluon.jit
def _start(document_start, query):
    """Where a query's document begins, in 32 bits."""
    return gl.maximum(gl.load(document_start + query), BEFORE_ALL).to(gl.int32)


@gluon.jit
def column_list(
    tile, alive, fractional_from, visible_until, document_start, s, halo, window, K: gl.constexpr, KP: gl.constexpr,
    CHUNK: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """The list of columns: (its listed pairs, how many, how many columns in the middle, the first position of the
    window, the tile's first query, the last rank); how many of its tiles need neither mask nor gate, and how many no
    mask. As `tile_columns`."""
    chunk = tile * BQ // CHUNK
    low, high = tile * BQ, gl.minimum(tile * BQ + BQ, s)
    alive += chunk.to(gl.int64) * K
    oldest = gl.maximum(gl.maximum(chunk * CHUNK - window + 1, -halo), _start(document_start, low))
    oldest = gl.minimum(oldest, low + 1)
    middle = gl.maximum(gl.maximum(oldest, high - window), _start(document_start, high - 1))
    num_middle = gl.maximum(low + 1 - middle, 0) // BN * BN
    count, plain, seen = 0, 0, 0
    if K > 0:
        ranks = gl.arange(0, KP, gl.BlockedLayout([1], [32], [WARPS], [0]))
        listed = gl.load(alive + ranks, mask=ranks < K, other=-1)
        exists = listed >= 0
        is_seen = exists & (gl.load(visible_until + listed, mask=exists, other=0) >= high)
        # Both numbers at once: at most 2^15 columns fit a chunk's list.
        both = gl.sum(exists.to(gl.int32) + (is_seen.to(gl.int32) << 16), 0)
        count, seen = both & 0xFFFF, both >> 16
        plain = seen
        if GATE != "none":
            is_plain = is_seen & (gl.load(fractional_from + listed, mask=exists, other=0) >= high)
            plain = gl.sum(is_plain.to(gl.int32), 0)
    last = count + high - oldest - num_middle - 1
    before = num_middle // BN
    return (alive, count, num_middle, oldest, low, last), before + plain // BN, before + seen // BN


@gluon.jit
def fetch_listed(rank, columns):
    """Entries [BN] of the columns that are listed pairs."""
    alive, count, _, _, _, last = columns
    rank = gl.minimum(rank, last)
    return gl.load(alive + rank, mask=(rank >= 0) & (rank < count), other=0)


@gluon.jit
def _position(rank, columns):
    """Position [BN] of the columns that are no listed pairs."""
    _, count, num_middle, oldest, low, _ = columns
    recent = oldest - count + rank
    recent = gl.where(recent > low - num_middle, recent + num_middle, recent)
    return gl.where(rank < 0, low + 1 + rank, recent)


@gluon.jit
def entry_of(rank, listed, columns, origin):
    """Entry [BN] of every column; behind the last one, the last one's. `origin`: entry of the key at position 0."""
    rank = gl.minimum(rank, columns[5])
    return gl.where((rank >= 0) & (rank < columns[1]), listed, _position(rank, columns) + origin)


@gluon.jit
def start_rows(buffer, rows, entry, exists, D: gl.constexpr, HAS_CARRY: gl.constexpr, OFFSET: gl.constexpr):
    """Starts to copy the rows [BN, D] of some entries into shared memory; nothing is read unless they exist."""
    stream, stride, carried, carried_stride, S = rows
    width = gl.arange(0, D, gl.SliceLayout(0, entry.type.layout.parent))
    where = (stream + width)[None, :] + ((entry - S).to(OFFSET) * stride)[:, None]
    if HAS_CARRY:
        before = (carried + width)[None, :] + (entry.to(OFFSET) * carried_stride)[:, None]
        where = gl.where((entry < S)[:, None], before, where)
    async_copy.async_copy_global_to_shared(buffer, where, mask=exists)


@gluon.jit
def _since(j, columns, BN: gl.constexpr, OVER: gl.constexpr):
    """Position [BN] of every column of tile j: listed pairs lie before all, what is behind the last column after."""
    rank = gl.arange(0, BN, OVER) + (j * BN - columns[2])
    since = gl.where((rank >= 0) & (rank < columns[1]), BEFORE_ALL, _position(rank, columns))
    return gl.where(rank > columns[5], AFTER_ALL, since)


@gluon.jit
def mask_logits(logits, j, until, queries, columns, BN: gl.constexpr):
    """Logits of the pairs that are visible, -inf elsewhere."""
    over: gl.constexpr = gl.SliceLayout(0, logits.type.layout)
    since = _since(j, columns, BN, over)
    until = gl.convert_layout(until, over)
    visible = (since[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
    return gl.where(visible, logits, float("-inf"))


@gluon.jit
def gate_weights(weights, j, scores, tau, queries, columns, window, BN: gl.constexpr, LISTED: gl.constexpr):
    """Weights times gates. What lies in a query's window has none; a tile of LISTED pairs alone has nothing there."""
    over: gl.constexpr = gl.SliceLayout(0, weights.type.layout)
    scores = gl.convert_layout(scores, over)
    gate = gl.minimum(gl.maximum(scores[None, :] - tau[:, None], 0.0), 1.0)
    if not LISTED:
        since = _since(j, columns, BN, over)
        gate = gl.where(queries[:, None] - since[None, :] < window, 1.0, gate)
    return weights * gate
