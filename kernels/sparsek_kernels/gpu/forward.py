"""Forward: one online softmax over a tile's plain, gated and general columns."""

import triton
import triton.language as tl

from sparsek_kernels.gpu.columns import (
    column_entries,
    load_pairs,
    load_rows,
    pairs_of,
    program_of,
    tile_columns,
    tile_rows,
)

LOWEST = tl.constexpr(-1e30)
"""Where running maxima begin: finite, because inf - inf is NaN."""


@triton.jit
def _accumulate(logits, values, gate, state, GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax in base 2: (largest logit, sum of weights, weighted values), each per row."""
    largest, total, out = state
    new = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(weights, 1)
    if GATED:
        weights = weights * gate
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], out_dtype=ACC, input_precision=PRECISION)
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
    tile = tl.program_id(0)
    bg, batch, head = program_of(tl.program_id(1), g)
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    q_tile = load_rows(q + batch * qb + queries.to(tl.int64) * qs + (head * G + member) * qh, exists, D, BD, True)
    pairs = pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S)
    visible_until, scores = visible_until + bg * (S + t), scores + bg * (S + t)
    columns, plain, gated, end = tile_columns(
        tile, alive + bg * num_chunks * K, num_alive + bg * num_chunks, plain_until + bg * (S + t), visible_until,
        document_start + batch * s, s, t - s, window, S + t - s, K, KP, CHUNK, BQ,
    )  # fmt: skip
    state = (tl.full([BQ * GP], LOWEST, ACC), tl.zeros([BQ * GP], ACC), tl.zeros([BQ * GP, BD], ACC))
    plain = plain // BN * BN
    for low in tl.range(0, plain, BN):
        entry = column_entries(low + tl.arange(0, BN), columns)[0]
        keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
        logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
        state = _accumulate(logits, values, 1.0, state, False, ACC, PRECISION)
    gated = tl.maximum(gated // BN * BN, plain)
    tau_row = tl.load(tau + bg * s + queries, mask=exists, other=0.0)
    if GATE != "none":
        for low in tl.range(plain, gated, BN):
            entry, position = column_entries(low + tl.arange(0, BN), columns)
            score = tl.where(position < -window, tl.load(scores + entry), float("inf"))
            keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
            logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
            gate = tl.clamp(score[None, :] - tau_row[:, None], 0.0, 1.0)
            if GATE == "key_value":
                logits *= gate
            state = _accumulate(logits, values, gate, state, True, ACC, PRECISION)
    for low in tl.range(gated, end, BN):
        column = low + tl.arange(0, BN)
        entry, position = column_entries(column, columns)
        entry = tl.where(column < end, entry, S)
        until = tl.load(visible_until + entry, mask=column < end, other=0)
        keys, values = load_pairs(entry, column < end, pairs, D, BD, HAS_CARRY, True)
        logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
        gate = 1.0
        if GATE != "none":
            score = tl.load(scores + entry, mask=column < end, other=0.0)
            gate = tl.clamp(score[None, :] - tau_row[:, None], 0.0, 1.0)
            gate = tl.where(queries[:, None] - position[None, :] < window, 1.0, gate)
        if GATE == "key_value":
            logits *= gate
        visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
        logits = tl.where(visible, logits, float("-inf"))
        state = _accumulate(logits, values, gate, state, GATE != "none", ACC, PRECISION)

    largest, total, acc = state
    total = tl.where(exists, total, 1.0)
    width = tl.arange(0, BD)
    place = ((batch * s + queries) * g * G + head * G + member) * D
    store = exists[:, None] & (width < D)[None, :]
    tl.store(out + place[:, None] + width[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=store)
    tl.store(lse + (batch * g * G + head * G + member) * s + queries, largest + tl.log2(total), mask=exists)
