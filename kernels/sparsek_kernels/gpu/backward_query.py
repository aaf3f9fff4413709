"""Backward, query-major: the gradient of the queries, and what the key-major backward needs of each query's whole row.

With P the softmax, m the gates and gain_ij = P_ij (do_i . v_j), the gradient of a logit is m_ij gain_ij - P_ij delta_i,
where delta_i = sum_j m_ij gain_ij. That is o_i . do_i where o was computed with the gates. `straight_through` computes
o without them: its delta is o_i . do_i - sum_j (1 - m_ij) gain_ij, known only after all columns whose gate is below 1.
So these come first, with two accumulators, sum m gain k and sum P k; the plain columns, nearly all, follow as ever.
"""

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
    window_columns,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _accumulate(
    rows, keys, values, gate, visible, scale, state, GATE: tl.constexpr, STRAIGHT: tl.constexpr,
    MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds columns to (dq, sum P k, delta, sum of fractional gates' gradients); gate, visible [rows, BN].

    `straight_through` begins with o_i . do_i for delta, which these columns complete; otherwise it stays as it is.
    """
    q_tile, do_tile, lse_row = rows
    grad_q, mean_k, delta_row, sums = state
    logits = row_products(q_tile, keys, ACC, PRECISION) * scale
    gain = row_products(do_tile, values, ACC, PRECISION)
    weights = tl.exp2((logits * gate if GATE == "key_value" else logits) - lse_row[:, None])
    if MASK:
        weights = tl.where(visible, weights, 0.0)
    gain *= weights
    if GATE == "none":
        grad_logits = gain - weights * delta_row[:, None]
    elif STRAIGHT:
        grad_logits = gain * gate
        delta_row -= tl.sum(gain - grad_logits, 1)
        mean_k = tl.dot(weights.to(keys.dtype), keys, mean_k, out_dtype=ACC, input_precision=PRECISION)
    else:
        grad_logits = gain * gate - weights * delta_row[:, None]
    if GATE != "none":
        grad_gate = gain
        if GATE == "key_value":
            grad_gate += grad_logits * (logits / LOG2E)
            grad_logits *= gate
        # What is visible has a gate above 0: the k-th best score lies above tau.
        sums += tl.sum(tl.where(gate < 1.0, grad_gate, 0.0), 1)
    grad_q = tl.dot(grad_logits.to(keys.dtype), keys, grad_q, out_dtype=ACC, input_precision=PRECISION)
    return grad_q, mean_k, delta_row, sums


@triton.jit
def _accumulate_plain(rows, delta_row, keys, values, scale, grad, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Adds columns without mask or gate to dq."""
    q_tile, do_tile, lse_row = rows
    logits = row_products(q_tile, keys, ACC, PRECISION)
    gain = row_products(do_tile, values, ACC, PRECISION)
    weights = tl.exp2(logits * scale - lse_row[:, None]) * (gain - delta_row[:, None])
    return tl.dot(weights.to(keys.dtype), keys, grad, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def _store_tile(
    tile, pair, grad, grad_q, s, g, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Writes dq of a tile of rows."""
    _bg, batch, head = program_of(pair, g)
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    place = ((batch * s + queries) * g * G + head * G + member) * D
    width = tl.arange(0, BD)
    store = exists[:, None] & (width < D)[None, :]
    tl.store(grad_q + place[:, None] + width[None, :], grad.to(grad_q.dtype.element_ty), mask=store)


@triton.jit
def _store_sums(tile, pair, sums, grad_sums, s, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Writes the sums over the tile's heads for each of its queries."""
    PARTS: tl.constexpr = tl.cdiv(G, GP)
    _queries, _member, exists = tile_rows(tile, s, G, GP, BQ)
    first = tile // PARTS * BQ + tl.arange(0, BQ)
    per_query = tl.sum(tl.reshape(tl.where(exists, sums, 0.0), (BQ, GP)), 1)
    place = pair.to(tl.int64) * PARTS + tile % PARTS
    tl.store(grad_sums + place * s + first, per_query, mask=first < s)


@triton.jit
def grad_query_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, fractional_from, alive, document_start, out, grad_out,
    lse, delta, grad_sums, grad_q, qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks,
    g, K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, GATE: tl.constexpr,
    STRAIGHT: tl.constexpr, HAS_CARRY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, delta [b, h, s], and the sum of each query's gradients of fractional gates [b, g, G / GP rounded up, s].

    BG: columns at a time where gates, masks or two accumulators are needed, a divisor of BN. The loops are short of
    registers. So each result is written when it is known, what later parts need they take anew, and the first two
    loops, with two accumulators or wide heads, hold nothing that they can compute in each step.
    """
    tile, query_tile = tl.program_id(0), tl.program_id(0) // tl.cdiv(G, GP)
    bg, batch, head = program_of(tl.program_id(1), g)
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    q_tile = load_rows(q + batch * qb + queries.to(tl.int64) * qs + (head * G + member) * qh, exists, D, BD, True)
    place = ((batch * s + queries) * g * G + head * G + member) * D
    do_tile = load_rows(grad_out + place, exists, D, BD, True)
    row = (batch * g * G + head * G + member) * s + queries
    lse_row = tl.load(lse + row, mask=exists, other=float("inf"))
    delta_row = tl.sum(load_rows(out + place, exists, D, BD, True).to(ACC) * do_tile.to(ACC), 1)
    if not STRAIGHT:
        tl.store(delta + row, delta_row, mask=exists)
    tau_row = tl.load(tau + bg * s + queries, mask=exists, other=0.0)
    pairs = pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S)
    visible_until, scores = visible_until + bg * (S + t), scores + bg * (S + t)
    alive, count, plain, gated, middle, num_middle, oldest = tile_columns(
        query_tile, alive + bg * num_chunks * K, fractional_from + bg * (S + t), visible_until,
        document_start + batch * s, s, t - s, window, K, KP, CHUNK, BQ, BN, BG,
    )  # fmt: skip
    rows = (q_tile, do_tile, lse_row)
    state = (tl.zeros([BQ * GP, BD], ACC), tl.zeros([BQ * GP, BD], ACC), delta_row, tl.zeros([BQ * GP], ACC))
    if GATE == "none":
        gated = plain
    else:
        for step in tl.range(0, (gated - plain) // BG, disable_licm=BD > 128):
            entry = tl.load(alive + plain + step * BG + tl.arange(0, BG))
            keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
            gate = tl.clamp(tl.load(scores + entry)[None, :] - tau_row[:, None], 0.0, 1.0)
            state = _accumulate(rows, keys, values, gate, 1, scale, state, GATE, STRAIGHT, False, ACC, PRECISION)
    queries, member, exists = tile_rows(anew(tile, window), s, G, GP, BQ)
    end = num_general(count - gated, oldest, num_middle, query_tile, s, BQ)
    for low in tl.range(0, end, BG, disable_licm=BD > 128 or STRAIGHT):
        real, entry, position, until = general_entries(
            low + tl.arange(0, BG), end, alive + gated, count - gated, oldest, middle, num_middle, S + t - s, S,
            visible_until,
        )  # fmt: skip
        score = tl.load(scores + entry, mask=real, other=0.0)
        keys, values = load_pairs(entry, real, pairs, D, BD, HAS_CARRY, True)
        gate = tl.clamp(score[None, :] - tau_row[:, None], 0.0, 1.0)
        gate = tl.where(queries[:, None] - position[None, :] < window, 1.0, gate)
        visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
        state = _accumulate(rows, keys, values, gate, visible, scale, state, GATE, STRAIGHT, True, ACC, PRECISION)
    grad, mean_k, delta_row, sums = state
    new_tile, query_tile = anew(tile, num_chunks), anew(query_tile, num_chunks)
    _store_sums(new_tile, tl.program_id(1), sums, grad_sums, s, G, GP, BQ)
    bg, batch, head = program_of(anew(tl.program_id(1), num_chunks), g)
    queries, member, exists = tile_rows(new_tile, s, G, GP, BQ)
    row = (batch * g * G + head * G + member) * s + queries
    lse_row = tl.load(lse + row, mask=exists, other=float("inf"))
    if STRAIGHT:
        tl.store(delta + row, delta_row, mask=exists)
        grad -= delta_row[:, None] * mean_k
    rows = (q_tile, do_tile, lse_row)
    pairs = pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S)
    middle, num_middle, oldest = window_columns(query_tile, document_start + batch * s, s, t - s, window, CHUNK, BQ, BN)
    for low in tl.range(0, num_middle, BN):
        keys, values = load_neighbours(middle + t - s + low, pairs, D, BD, BN)
        grad = _accumulate_plain(rows, delta_row, keys, values, scale, grad, ACC, PRECISION)
    for low in tl.range(0, plain, BN):
        entry = tl.load(alive + low + tl.arange(0, BN))
        keys, values = load_pairs(entry, entry, pairs, D, BD, HAS_CARRY, False)
        grad = _accumulate_plain(rows, delta_row, keys, values, scale, grad, ACC, PRECISION)
    _store_tile(anew(tile, t), anew(tl.program_id(1), t), grad * (scale / LOG2E), grad_q, s, g, G, GP, BQ, D, BD)
