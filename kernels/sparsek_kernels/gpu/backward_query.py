"""Backward, query-major: what each query needs to know of its whole row, and the gradient of the queries.

With P the softmax, m the gates and dov_ij = do_i . v_j, the gradient of a logit is P_ij (m_ij dov_ij - delta_i), where
delta_i = sum_j P_ij m_ij dov_ij. That is o_i . do_i where o was computed with the gates. `straight_through` computes o
without them, so its delta lacks sum_j P_ij (1 - m_ij) dov_ij: a sum over the columns whose gate is below 1.
"""

import triton
import triton.language as tl

from sparsek_kernels.gpu.columns import column_entries, gates_of, load_rows, row_pointers, tile_columns, tile_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_query_rows(x, batch, head, queries, member, exists, xb, xs, xh, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of a tensor [b, s, h, d]."""
    rows = queries.to(tl.int64) * xs + (head * G + member) * xh
    return load_rows(x + batch.to(tl.int64) * xb + rows, exists, D, BD, True)


@triton.jit
def weights_of(q_tile, keys, lse_row, scale, gate, GATE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities and ungated logits (base 2), both [rows, BN]."""
    logits = tl.dot(q_tile, tl.trans(keys), out_dtype=ACC, input_precision=PRECISION) * scale
    if GATE == "key_value":
        return tl.exp2(logits * gate - lse_row[:, None]), logits
    return tl.exp2(logits - lse_row[:, None]), logits


@triton.jit
def gate_sums_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, plain_until, alive, num_alive, document_start, out, grad_out,
    lse, delta, grad_sums, qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks, g,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, STRAIGHT: tl.constexpr,
    HAS_CARRY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta [b, h, s], and the sum of each query's gradients of fractional gates, grad_sums [b, g, s]."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // g, tl.program_id(1) % g
    bg = tl.program_id(1).to(tl.int64)
    heads = g * G
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    q_tile = load_query_rows(q, batch, head, queries, member, exists, qb, qs, qh, G, D, BD)
    place = ((batch.to(tl.int64) * s + queries) * heads + head * G + member) * D
    out_tile = load_rows(out + place, exists, D, BD, True)
    do_tile = load_rows(grad_out + place, exists, D, BD, True)
    row = (batch.to(tl.int64) * heads + head * G + member) * s + queries
    lse_row = tl.load(lse + row, mask=exists, other=float("inf"))
    delta_row = tl.sum(out_tile.to(ACC) * do_tile.to(ACC), 1)
    sums = tl.zeros([BQ * GP], ACC)
    missing = tl.zeros([BQ * GP], ACC)
    if GATE != "none":
        alive, middle, num_middle, count, num_plain, oldest, num_leaving, num_newest, newest = tile_columns(
            tile, alive + bg * num_chunks * K, num_alive + bg * num_chunks, plain_until + bg * (S + t),
            document_start + batch.to(tl.int64) * s, s, t - s, window, S + t - s, K, KP, CHUNK, BQ,
        )  # fmt: skip
        k, v = k + batch.to(tl.int64) * kb + head * kg, v + batch.to(tl.int64) * vb + head * vg
        carry_k, carry_v = carry_k + batch.to(tl.int64) * cb + head * cg, carry_v + batch.to(tl.int64) * cb + head * cg
        visible_until, scores = visible_until + bg * (S + t), scores + bg * (S + t)
        tau_row = tl.load(tau + bg * s + queries, mask=exists, other=0.0)
        # A window shorter than the tile: even the tile's own keys can leave it and be selected.
        end = num_middle + count + num_leaving + tl.where(window < BQ, num_newest, 0)
        for low in tl.range(num_middle + num_plain, end, BN):
            column = low + tl.arange(0, BN)
            real = column < end
            entry, position = column_entries(
                column, alive, middle, num_middle, count, oldest, num_leaving, newest, S + t - s
            )
            entry = tl.where(real, entry, S)
            until = tl.load(visible_until + entry, mask=real, other=0)
            score = tl.load(scores + entry, mask=real, other=0.0)
            keys = load_rows(row_pointers(entry, k, carry_k, ks, cs, S, HAS_CARRY), real, D, BD, True)
            values = load_rows(row_pointers(entry, v, carry_v, vs, cs, S, HAS_CARRY), real, D, BD, True)
            gate = gates_of(score[None, :], tau_row[:, None], position[None, :], queries[:, None], window)
            weights, logits = weights_of(q_tile, keys, lse_row, scale, gate, GATE, ACC, PRECISION)
            visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
            gain = tl.dot(do_tile, tl.trans(values), out_dtype=ACC, input_precision=PRECISION)
            weights = tl.where(visible, weights, 0.0)
            gain *= weights
            missing += tl.sum(gain * (1.0 - gate), 1)
            if GATE == "key_value":
                gain += (gain * gate - weights * delta_row[:, None]) * (logits / LOG2E)
            sums += tl.sum(tl.where((gate > 0.0) & (gate < 1.0), gain, 0.0), 1)
    if STRAIGHT:
        delta_row -= missing
    tl.store(delta + row, delta_row, mask=exists)
    per_query = tl.sum(tl.reshape(tl.where(exists, sums, 0.0), (BQ, GP)), 1)
    first = tile * BQ + tl.arange(0, BQ)
    tl.store(grad_sums + bg * s + first, per_query, mask=first < s)


@triton.jit
def grad_query_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, plain_until, alive, num_alive, document_start, grad_out, lse,
    delta, grad_q, qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window, scale, num_chunks, g,
    K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr, HAS_CARRY: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = scale * sum_j P_ij (m_ij dov_ij - delta_i) k_j, with k gated for `key_value`."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // g, tl.program_id(1) % g
    bg = tl.program_id(1).to(tl.int64)
    heads = g * G
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    q_tile = load_query_rows(q, batch, head, queries, member, exists, qb, qs, qh, G, D, BD)
    place = ((batch.to(tl.int64) * s + queries) * heads + head * G + member) * D
    do_tile = load_rows(grad_out + place, exists, D, BD, True)
    row = (batch.to(tl.int64) * heads + head * G + member) * s + queries
    lse_row = tl.load(lse + row, mask=exists, other=float("inf"))
    delta_row = tl.load(delta + row, mask=exists, other=0.0)
    alive, middle, num_middle, count, num_plain, oldest, num_leaving, num_newest, newest = tile_columns(
        tile, alive + bg * num_chunks * K, num_alive + bg * num_chunks, plain_until + bg * (S + t),
        document_start + batch.to(tl.int64) * s, s, t - s, window, S + t - s, K, KP, CHUNK, BQ,
    )  # fmt: skip
    k, v = k + batch.to(tl.int64) * kb + head * kg, v + batch.to(tl.int64) * vb + head * vg
    carry_k, carry_v = carry_k + batch.to(tl.int64) * cb + head * cg, carry_v + batch.to(tl.int64) * cb + head * cg
    visible_until, scores = visible_until + bg * (S + t), scores + bg * (S + t)

    acc = tl.zeros([BQ * GP, BD], ACC)
    full = (num_middle + num_plain) // BN * BN
    for low in tl.range(0, full, BN):
        column = low + tl.arange(0, BN)
        entry, _ = column_entries(column, alive, middle, num_middle, count, oldest, num_leaving, newest, S + t - s)
        keys = load_rows(row_pointers(entry, k, carry_k, ks, cs, S, HAS_CARRY), entry, D, BD, False)
        values = load_rows(row_pointers(entry, v, carry_v, vs, cs, S, HAS_CARRY), entry, D, BD, False)
        weights, _ = weights_of(q_tile, keys, lse_row, scale, 1.0, "none", ACC, PRECISION)
        gain = tl.dot(do_tile, tl.trans(values), out_dtype=ACC, input_precision=PRECISION)
        weights *= gain - delta_row[:, None]
        acc = tl.dot(weights.to(keys.dtype), keys, acc, out_dtype=ACC, input_precision=PRECISION)

    end = num_middle + count + num_leaving + num_newest
    if GATE != "none":
        tau_row = tl.load(tau + bg * s + queries, mask=exists, other=0.0)
    for low in tl.range(full, end, BN):
        column = low + tl.arange(0, BN)
        real = column < end
        entry, position = column_entries(
            column, alive, middle, num_middle, count, oldest, num_leaving, newest, S + t - s
        )
        entry = tl.where(real, entry, S)
        until = tl.load(visible_until + entry, mask=real, other=0)
        keys = load_rows(row_pointers(entry, k, carry_k, ks, cs, S, HAS_CARRY), real, D, BD, True)
        values = load_rows(row_pointers(entry, v, carry_v, vs, cs, S, HAS_CARRY), real, D, BD, True)
        gate = 1.0
        if GATE != "none":
            score = tl.load(scores + entry, mask=real, other=0.0)
            gate = gates_of(score[None, :], tau_row[:, None], position[None, :], queries[:, None], window)
        weights, _ = weights_of(q_tile, keys, lse_row, scale, gate, GATE, ACC, PRECISION)
        visible = (position[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
        gain = tl.dot(do_tile, tl.trans(values), out_dtype=ACC, input_precision=PRECISION) * gate
        weights = tl.where(visible, weights, 0.0) * (gain - delta_row[:, None])
        if GATE == "key_value":
            weights *= gate
        acc = tl.dot(weights.to(keys.dtype), keys, acc, out_dtype=ACC, input_precision=PRECISION)

    width = tl.arange(0, BD)
    store = exists[:, None] if D == BD else exists[:, None] & (width < D)[None, :]
    acc *= scale / LOG2E
    tl.store(grad_q + place[:, None] + width[None, :], acc.to(grad_q.dtype.element_ty), mask=store)
