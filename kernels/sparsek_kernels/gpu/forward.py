"""Forward: one online softmax over a tile's plain and general columns."""

# No `from __future__ import annotations`: Triton reads the annotations of constexpr arguments.
import triton
import triton.language as tl

from sparsek_kernels.gpu.columns import column_entries, gates_of, load_rows, row_pointers, tile_columns, tile_rows

LOWEST = tl.constexpr(-1e30)
"""Where running maxima begin: finite, because inf - inf is NaN."""


@triton.jit
def _accumulate(logits, v, gate, state, GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax in base 2: (largest logit, sum of weights, weighted values), each per row."""
    largest, total, out = state
    new = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(weights, 1)
    if GATED:
        weights = weights * gate
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], out_dtype=ACC, input_precision=PRECISION)
    return new, total, out


@triton.jit
def forward_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, plain_until, alive, num_alive, document_start, out, lse,
    qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks, g,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HAS_CARRY: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head. `scale` includes log2 e; GATE is `none`, `value` or `key_value`."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // g, tl.program_id(1) % g
    bg = tl.program_id(1).to(tl.int64)
    halo = t - s
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    width = tl.arange(0, BD)
    rows = queries.to(tl.int64) * qs + (head * G + member) * qh
    q_tile = load_rows(q + batch.to(tl.int64) * qb + rows, exists, D, BD, True)
    alive, middle, num_middle, count, num_plain, oldest, num_leaving, num_newest, newest = tile_columns(
        tile, alive + bg * num_chunks * K, num_alive + bg * num_chunks, plain_until + bg * (S + t),
        document_start + batch.to(tl.int64) * s, s, halo, window, S + halo, K, KP, CHUNK, BQ,
    )  # fmt: skip
    k, v = k + batch.to(tl.int64) * kb + head * kg, v + batch.to(tl.int64) * vb + head * vg
    carry_k, carry_v = carry_k + batch.to(tl.int64) * cb + head * cg, carry_v + batch.to(tl.int64) * cb + head * cg
    visible_until, scores, tau = visible_until + bg * (S + t), scores + bg * (S + t), tau + bg * s

    largest = tl.full([BQ * GP], LOWEST, ACC)
    total = tl.zeros([BQ * GP], ACC)
    acc = tl.zeros([BQ * GP, BD], ACC)
    full = (num_middle + num_plain) // BN * BN
    for low in tl.range(0, full, BN):
        column = low + tl.arange(0, BN)
        entry, _ = column_entries(column, alive, middle, num_middle, count, oldest, num_leaving, newest, S + halo)
        keys = load_rows(row_pointers(entry, k, carry_k, ks, cs, S, HAS_CARRY), entry, D, BD, False)
        logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
        values = load_rows(row_pointers(entry, v, carry_v, vs, cs, S, HAS_CARRY), entry, D, BD, False)
        largest, total, acc = _accumulate(logits, values, 1.0, (largest, total, acc), False, ACC, PRECISION)

    end = num_middle + count + num_leaving + num_newest
    if GATE != "none":
        tau_row = tl.load(tau + queries, mask=exists, other=0.0)
    for low in tl.range(full, end, BN):
        column = low + tl.arange(0, BN)
        real = column < end
        entry, position = column_entries(
            column, alive, middle, num_middle, count, oldest, num_leaving, newest, S + halo
        )
        entry = tl.where(real, entry, S)
        until = tl.load(visible_until + entry, mask=real, other=0)
        keys = load_rows(row_pointers(entry, k, carry_k, ks, cs, S, HAS_CARRY), real, D, BD, True)
        logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
        gate = 1.0
        if GATE != "none":
            score = tl.load(scores + entry, mask=real, other=0.0)
            gate = gates_of(score[None, :], tau_row[:, None], position[None, :], queries[:, None], window)
        if GATE == "key_value":
            logits *= gate
        visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
        logits = tl.where(visible, logits, float("-inf"))
        values = load_rows(row_pointers(entry, v, carry_v, vs, cs, S, HAS_CARRY), real, D, BD, True)
        largest, total, acc = _accumulate(logits, values, gate, (largest, total, acc), GATE != "none", ACC, PRECISION)

    total = tl.where(exists, total, 1.0)
    heads = g * G
    row = (batch.to(tl.int64) * s + queries) * heads + head * G + member
    store = exists[:, None] if D == BD else exists[:, None] & (width < D)[None, :]
    tl.store(out + row[:, None] * D + width[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=store)
    # lse stands as [b, h, s].
    tl.store(lse + (batch.to(tl.int64) * heads + head * G + member) * s + queries, largest + tl.log2(total), mask=exists)
