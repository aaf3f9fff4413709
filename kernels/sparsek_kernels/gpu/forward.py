"""Forward: one online softmax over a tile's columns, kind by kind."""

import triton
import triton.language as tl

from sparsek_kernels.gpu.columns import (
    anew,
    general_entries,
    load_neighbours,
    load_pairs,
    load_rows,
    num_general,
    pairs_of,
    program_of,
    row_products,
    tile_columns,
    tile_rows,
)

LOWEST = tl.constexpr(-1e30)
"""Where running maxima begin: finite, because inf - inf is NaN."""


@triton.jit
def _accumulate(logits, scale, values, gate, state, GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax in base 2 of scale * logits: (largest, sum of weights, weighted values), each per row."""
    largest, total, out = state
    new = tl.maximum(largest, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(weights, 1)
    if GATED:
        weights = weights * gate
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], out_dtype=ACC, input_precision=PRECISION)
    return new, total, out


@triton.jit
def forward_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, fractional_from, alive, document_start, out, lse,
    qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks, g,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, GATE: tl.constexpr,
    HAS_CARRY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head. `scale` includes log2 e; GATE is `none`, `value` or `key_value`.

    BG: columns at a time where gates or masks are needed, a divisor of BN.
    """
    tile, query_tile = tl.program_id(0), tl.program_id(0) // tl.cdiv(G, GP)
    bg, batch, head = program_of(tl.program_id(1), g)
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    q_tile = load_rows(q + batch * qb + queries.to(tl.int64) * qs + (head * G + member) * qh, exists, D, BD, True)
    pairs = pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S)
    visible_until, scores = visible_until + bg * (S + t), scores + bg * (S + t)
    alive, count, plain, gated, middle, num_middle, oldest = tile_columns(
        query_tile, alive + bg * num_chunks * K, fractional_from + bg * (S + t), visible_until,
        document_start + batch * s, s, t - s, window, K, KP, CHUNK, BQ, BN, BG,
    )  # fmt: skip
    state = (tl.full([BQ * GP], LOWEST, ACC), tl.zeros([BQ * GP], ACC), tl.zeros([BQ * GP, BD], ACC))
    for low in tl.range(0, num_middle, BN):
        keys, values = load_neighbours(middle + t - s + low, pairs, D, BD, BN)
        logits = row_products(q_tile, keys, ACC, PRECISION)
        state = _accumulate(logits, scale, values, 1.0, state, False, ACC, PRECISION)
    for low in tl.range(0, plain, BN):
        entry = tl.load(alive + low + tl.arange(0, BN))
        keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
        logits = row_products(q_tile, keys, ACC, PRECISION)
        state = _accumulate(logits, scale, values, 1.0, state, False, ACC, PRECISION)
    tau_row = tl.load(tau + bg * s + queries, mask=exists, other=0.0)
    if GATE == "none":
        gated = plain
    else:
        for step in tl.range(0, (gated - plain) // BG):
            entry = tl.load(alive + plain + step * BG + tl.arange(0, BG))
            keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
            logits = row_products(q_tile, keys, ACC, PRECISION)
            gate = tl.clamp(tl.load(scores + entry)[None, :] - tau_row[:, None], 0.0, 1.0)
            if GATE == "key_value":
                logits *= gate
            state = _accumulate(logits, scale, values, gate, state, True, ACC, PRECISION)
    # The loops are short of registers: what the last one and the end need, they take anew.
    queries, member, exists = tile_rows(anew(tile, window), s, G, GP, BQ)
    end = num_general(count - gated, oldest, num_middle, query_tile, s, BQ)
    for low in tl.range(0, end, BG):
        real, entry, position, until = general_entries(
            low + tl.arange(0, BG), end, alive + gated, count - gated, oldest, middle, num_middle, S + t - s, S,
            visible_until,
        )  # fmt: skip
        keys, values = load_pairs(entry, real, pairs, D, BD, HAS_CARRY, True)
        logits = row_products(q_tile, keys, ACC, PRECISION)
        gate = 1.0
        if GATE != "none":
            score = tl.load(scores + entry, mask=real, other=0.0)
            gate = tl.clamp(score[None, :] - tau_row[:, None], 0.0, 1.0)
            gate = tl.where(queries[:, None] - position[None, :] < window, 1.0, gate)
        if GATE == "key_value":
            logits *= gate
        visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
        logits = tl.where(visible, logits, float("-inf"))
        state = _accumulate(logits, scale, values, gate, state, GATE != "none", ACC, PRECISION)

    largest, total, acc = state
    bg, batch, head = program_of(anew(tl.program_id(1), t), g)
    queries, member, exists = tile_rows(anew(tile, t), s, G, GP, BQ)
    total = tl.where(exists, total, 1.0)
    width = tl.arange(0, BD)
    place = ((batch * s + queries) * g * G + head * G + member) * D
    store = exists[:, None] & (width < D)[None, :]
    tl.store(out + place[:, None] + width[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=store)
    tl.store(lse + (batch * g * G + head * G + member) * s + queries, largest + tl.log2(total), mask=exists)
