"""Forward for Hopper, in Gluon: the two matrix products of neighbouring tiles run while the softmax does.

The columns are those of hopper_columns.py. While tile j is weighed, its predecessor's values are summed:

    wait for keys j, values j - 1  ->  start Q K_j, P_{j-1} V_{j-1}  ->  fetch keys j + 1, values j
    ->  wait for Q K_j  ->  softmax: P_j  ->  wait for P_{j-1} V_{j-1}  ->  rescale the output

Keys and values have two slots each, which tiles take in turn: what is fetched replaces what was read last. A third was
no faster. Gates scale the weights behind the softmax, whose sum is without them; most tiles have none.
"""

# Device functions take pointers and numbers, to which Triton gives no Python type.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from sparsek_kernels.gpu.hopper_columns import (
    column_list,
    entry_of,
    fetch_listed,
    gate_weights,
    mask_logits,
    start_rows,
)

LOWEST = gl.constexpr(-1e30)
"""Where running maxima begin: finite, because inf - inf is NaN."""


@gluon.jit
def _softmax(logits, scale, largest, total):
    """Online softmax in base 2 of scale * logits: weights, largest, sum of weights, what earlier sums shrink by."""
    new = gl.maximum(largest, gl.max(logits, 1) * scale)
    weights = gl.exp2(logits * scale - new[:, None])
    shrink = gl.exp2(largest - new)
    return weights, new, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _fetch(
    j, slots, fetched, tables, buffers, num_tiles,
    BN: gl.constexpr, HAS_CARRY: gl.constexpr, OFFSET: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Starts the copies of keys j and, unless j is the FIRST, values j - 1; loads what is listed in tile j + 1.

    Args:
        slots: where the keys and values go.
        fetched: listed entries of tile j, all entries of tile j - 1; returned for the next tile.
    """
    listed, before = fetched
    columns, keys, values, origin = tables
    D: gl.constexpr = buffers[0].shape[2]
    rank = gl.arange(0, BN, listed.type.layout) + (j * BN - columns[2])
    entry = entry_of(rank, listed, columns, origin)
    start_rows(buffers[0].index(slots[0]), keys, entry, j < num_tiles, D, HAS_CARRY, OFFSET)
    if not FIRST:
        start_rows(buffers[1].index(slots[1]), values, before, j - 1 < num_tiles, D, HAS_CARRY, OFFSET)
    async_copy.commit_group()
    return fetch_listed(rank + BN, columns), entry


@gluon.jit
def _load_checks(entry, lookups, masked, gated, GATE: gl.constexpr):
    """Until when queries see these entries [BN], for a mask; and with GATE, for gates, their scores."""
    visible_until, scores = lookups
    until = gl.load(visible_until + entry, mask=masked, other=0)
    return (until, gl.load(scores + entry, mask=gated, other=0.0)) if GATE != "none" else (until,)


@gluon.jit
def _step(
    j, slots, state, fetched, checks, query_tile, rows, scale, window, tables, buffers, lookups, kinds,
    BN: gl.constexpr, MASKED: gl.constexpr, GATED: gl.constexpr, GATE: gl.constexpr, HAS_CARRY: gl.constexpr,
    OFFSET: gl.constexpr,
):  # fmt: skip
    """Weighs tile j while the values of tile j - 1 are summed.

    Args:
        slots: of tile j - 1 and tile j.
        checks: of tile j, by `_load_checks`; returned for the next tile.
        rows: their queries and, with gates, tau.
        kinds: how many tiles need neither mask nor gate, how many no mask, and how many there are.
    """
    largest, total, weights, out = state
    last, own = slots
    async_copy.wait_group(0)
    # What copies wrote, matrix products read by another path: 2.5 % of the time.
    fence_async_shared()
    none = gl.full([out.shape[0], BN], 0.0, gl.float32, rows[0].type.layout.parent)
    logits = warpgroup_mma(query_tile, buffers[0].index(own).permute((1, 0)), none, use_acc=False, is_async=True)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 2)
    out = warpgroup_mma(
        gl.convert_layout(weights.to(buffers[1].dtype), LEFT), buffers[1].index(last), out, is_async=True
    )
    fetched = _fetch(j + 1, (last, own), fetched, tables, buffers, kinds[2], BN, HAS_CARRY, OFFSET, False)
    following = _load_checks(fetched[1], lookups, j + 1 >= kinds[1], j + 1 >= kinds[0], GATE)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    if MASKED:
        logits = mask_logits(logits, j, checks[0], rows[0], tables[0], BN)
    weights, largest, total, shrink = _softmax(logits, scale, largest, total)
    if GATED:
        weights = gate_weights(weights, j, checks[1], rows[1], rows[0], tables[0], window, BN, not MASKED)
    out = warpgroup_mma_wait(0, deps=(out,))
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return (own, last), (largest, total, weights, out), fetched, following


@gluon.jit
def _first_step(
    query_tile, keys, checks, rows, scale, window, columns, BN: gl.constexpr, GATE: gl.constexpr, LOGITS: gl.constexpr
):  # fmt: skip
    """Weighs tile 0, masked and gated in any case; weights, largest and total as in `_step`."""
    none = gl.full([query_tile.shape[0], BN], 0.0, gl.float32, LOGITS)
    logits = warpgroup_mma(query_tile, keys.permute((1, 0)), none, use_acc=False, is_async=True)
    logits = mask_logits(warpgroup_mma_wait(0, deps=(logits,)), 0, checks[0], rows[0], columns, BN)
    largest = gl.full([query_tile.shape[0]], LOWEST, gl.float32, gl.SliceLayout(1, LOGITS))
    weights, largest, total, _ = _softmax(logits, scale, largest, gl.zeros_like(largest))
    if GATE != "none":
        weights = gate_weights(weights, 0, checks[1], rows[1], rows[0], columns, window, BN, False)
    return weights, largest, total


@gluon.jit
def _tile_rows(tile, s, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, LAYOUT: gl.constexpr):
    """Of the rows [BQ * GP] of a tile, laid out as those of LAYOUT: query, head within its group, and which exist."""
    rows = gl.arange(0, BQ * GP, gl.SliceLayout(1, LAYOUT))
    query, member = tile * BQ + rows // GP, rows % GP
    return query, member, (query < s) & (member < G)


@gluon.jit
def _fetch_queries(
    buffer, q, qs, qh, tile, s, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, LOAD: gl.constexpr
):  # fmt: skip
    """Starts to copy the rows of a tile; `q` points to the group's first head."""
    query, member, exists = _tile_rows(tile, s, G, GP, BQ, LOAD)
    width = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, LOAD))
    where = q + query.to(gl.int64) * qs + member.to(gl.int64) * qh
    async_copy.async_copy_global_to_shared(buffer, where[:, None] + width[None, :], mask=exists[:, None])


@gluon.jit
def _store(
    acc, largest, total, buffer, out, lse, g, tile, s,
    G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile, through shared memory; `out` and `lse` point to the group's first head."""
    sums: gl.constexpr = total.type.layout.parent
    D: gl.constexpr = buffer.shape[1]
    # Rows that do not exist may have met no key; a NaN must stay one.
    total = gl.where(total == 0, 1.0, total)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, acc.type.layout))[:, None]
    buffer.store(acc.to(buffer.dtype))
    query, member, exists = _tile_rows(tile, s, G, GP, BQ, LOAD)
    width = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    place = (query.to(gl.int64) * g * G + member) * D
    gl.store(out + place[:, None] + width[None, :], buffer.load(LOAD), mask=exists[:, None])
    query, member, exists = _tile_rows(tile, s, G, GP, BQ, sums)
    gl.store(lse + member.to(gl.int64) * s + query, largest + gl.log2(total), mask=exists)


@gluon.jit
def forward_hopper_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, fractional_from, alive, document_start, out, lse,
    qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks, g,
    K: gl.constexpr, KP: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, GATE: gl.constexpr, HAS_CARRY: gl.constexpr, OFFSET: gl.constexpr,
):  # fmt: skip
    """As `forward_kernel` with GATE = none or value, for BQ * GP rows, 16 to a warp."""
    ROWS: gl.constexpr = BQ * GP
    WARPS: gl.constexpr = gl.num_warps()
    half: gl.constexpr = q.dtype.element_ty
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile, bg = gl.program_id(0), gl.program_id(1).to(gl.int64)
    batch, head = bg // g, bg % g
    query_tile = gl.allocate_shared_memory(half, [ROWS, D], SHARED)
    key_slots = gl.allocate_shared_memory(half, [2, BN, D], SHARED)
    value_slots = gl.allocate_shared_memory(half, [2, BN, D], SHARED)

    _fetch_queries(query_tile, q + batch * qb + head * G * qh, qs, qh, tile, s, G, GP, BQ, LOAD)
    lookups = (visible_until + bg * (S + t), scores + bg * (S + t))
    columns, num_plain, num_seen = column_list(
        tile, alive + bg * num_chunks * K, fractional_from + bg * (S + t), lookups[0], document_start + batch * s,
        s, t - s, window, K, KP, CHUNK, BQ, BN, WARPS, GATE,
    )  # fmt: skip
    num_tiles = (columns[2] + columns[5] + BN) // BN
    keys = (k + batch * kb + head * kg, ks, carry_k + batch * cb + head * cg, cs, S)
    values = (v + batch * vb + head * vg, vs, carry_v + batch * cb + head * cg, cs, S)
    tables, buffers = (columns, keys, values, S + t - s), (key_slots, value_slots)

    rank = gl.arange(0, BN, gl.SliceLayout(1, LOAD)) - columns[2]
    first = fetch_listed(rank, columns)
    fetched = _fetch(0, (0, 0), (first, first), tables, buffers, num_tiles, BN, HAS_CARRY, OFFSET, True)
    checks = _load_checks(fetched[1], lookups, True, True, GATE)
    fetched = _fetch(1, (1, 0), fetched, tables, buffers, num_tiles, BN, HAS_CARRY, OFFSET, False)
    following = _load_checks(fetched[1], lookups, num_seen <= 1, num_plain <= 1, GATE)
    mine, _, exists = _tile_rows(tile, s, G, GP, BQ, LOGITS)
    rows = (mine, gl.load(tau + bg * s + mine, mask=exists, other=0.0)) if GATE != "none" else (mine,)
    async_copy.wait_group(1)
    fence_async_shared()
    weights, largest, total = _first_step(
        query_tile, key_slots.index(0), checks, rows, scale, window, columns, BN, GATE, LOGITS
    )
    slots, kinds = (0, 1), (num_plain, num_seen, num_tiles)
    state = (largest, total, weights, gl.zeros([ROWS, D], gl.float32, OUT))
    for j in range(1, num_plain):
        slots, state, fetched, following = _step(
            j, slots, state, fetched, following, query_tile, rows, scale, window, tables, buffers, lookups, kinds,
            BN, False, False, GATE, HAS_CARRY, OFFSET,
        )  # fmt: skip
    if GATE != "none":
        for j in range(gl.maximum(num_plain, 1), num_seen):
            slots, state, fetched, following = _step(
                j, slots, state, fetched, following, query_tile, rows, scale, window, tables, buffers, lookups, kinds,
                BN, False, True, GATE, HAS_CARRY, OFFSET,
            )  # fmt: skip
    for j in range(gl.maximum(num_seen, 1), num_tiles):
        slots, state, fetched, following = _step(
            j, slots, state, fetched, following, query_tile, rows, scale, window, tables, buffers, lookups, kinds,
            BN, True, GATE != "none", GATE, HAS_CARRY, OFFSET,
        )  # fmt: skip
    largest, total, weights, acc = state
    async_copy.wait_group(0)
    fence_async_shared()
    weights = gl.convert_layout(weights.to(half), gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, value_slots.index(slots[0]), acc)
    out, lse = out + (batch * s * g + head) * G * D, lse + (batch * g + head) * G * s
    _store(acc, largest, total, query_tile, out, lse, g, tile, s, G, GP, BQ, LOAD)
