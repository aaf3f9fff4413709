"""Backward, key-major and without atomics: gradients of keys, values and, directly through the gates, scores.

A selected pair collects its gradient from queries far apart. So queries are cut into spans; for each span one program
per block of selected pairs loads them once, loops over the span's queries, and writes ONE row per pair and span. The
rows of a pair stand together, in the order of the spans, at a place known beforehand from its interval of queries alone
(`layout.py`). A second kernel sums them up, and the window's kernel, which is a plain sliding window, begins its own
sums with that. Every sum has a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from sparsek_kernels.gpu.backward_query import LOG2E
from sparsek_kernels.gpu.columns import anew, load_pairs, load_rows, pairs_of, program_of
from sparsek_kernels.gpu.rows import anew_strides, query_rows, whole_query_rows


@triton.jit
def _accumulate(
    keys, values, rows, scale, gate, visible, state,
    GATE: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries to (dk / scale, dv, du) of a block of keys; gate and visible are [BN, rows]."""
    grad_k, grad_v, grad_u = state
    q_tile, do_tile, lse_row, delta_row = rows
    logits = tl.dot(keys, tl.trans(q_tile), out_dtype=ACC, input_precision=PRECISION) * scale
    weights = tl.exp2((logits * gate if GATE == "key_value" else logits) - lse_row[None, :])
    if MASK:
        weights = tl.where(visible, weights, 0.0)
    gain = tl.dot(values, tl.trans(do_tile), out_dtype=ACC, input_precision=PRECISION)
    if GATE != "none":
        gated = weights * gate
        grad_logits = weights * (gain * gate - delta_row[None, :])
        grad_gate = weights * gain
        if GATE == "key_value":
            grad_gate += grad_logits * (logits / LOG2E)
            grad_logits *= gate
        # Where the gate is below 1 (what is visible has one above 0: the k-th best score lies above tau), or the weight
        # is 0, and so its gradient. Asked of the gates themselves, the compiler would compute these twice.
        grad_u += tl.sum(tl.where(gated < weights, grad_gate, 0.0), 1)
    else:
        gated = weights
        grad_logits = weights * (gain - delta_row[None, :])
    grad_v = tl.dot(gated.to(do_tile.dtype), do_tile, grad_v, out_dtype=ACC, input_precision=PRECISION)
    grad_k = tl.dot(grad_logits.to(q_tile.dtype), q_tile, grad_k, out_dtype=ACC, input_precision=PRECISION)
    return grad_k, grad_v, grad_u


@triton.jit
def _entries_of_block(
    block, span, bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t, S, window,
    K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Entries [BN] of one block of a span's pairs, which of them are real, and the query at which each joins."""
    low, offsets = span * SPAN, tl.arange(0, BN)
    if block < num_blocks:
        index = block * BN + offsets
        entry = tl.load(alive + (bg * num_chunks + low // CHUNK) * K + index, mask=index < K, other=-1)
        real = entry >= 0
        joined = tl.full([BN], low, tl.int32)
    else:
        # The entries of the stream that become candidates during the span; in the last one, all that are left.
        edge = low - window + t - s
        num_before += bg * (t + 1)
        begin = tl.load(num_before + tl.minimum(tl.maximum(edge, 0), t))
        edge = tl.where(span == num_spans - 1, t, edge + SPAN)
        end = tl.load(num_before + tl.minimum(tl.maximum(edge, 0), t))
        index = begin + (block - num_blocks) * BN + offsets
        entry = tl.load(chosen + bg * t + index, mask=index < end, other=-1)
        # Who joins with the span's first query stands in the list of those selected when it begins.
        joined = tl.where(index < end, entry - S - (t - s) + window, s)
        real = (joined > low) & (index < end)
    return tl.where(real, entry, S), real, joined


@triton.jit
def _joined_until(
    block, span, bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t, S, window, visible_until,
    scores, K: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For each pair of a block [BN], the span's queries that select it, [joined, until), and its score."""
    entry, real, joined = _entries_of_block(
        block, span, bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t, S, window,
        K, CHUNK, SPAN, BN,
    )  # fmt: skip
    entry += bg * (S + t)
    until = tl.minimum(tl.load(visible_until + entry, mask=real, other=0), tl.minimum(span * SPAN + SPAN, s))
    return joined, until, tl.load(scores + entry, mask=real, other=0.0)


@triton.jit
def grad_selected_kernel(
    q, k, v, carry_k, carry_v, scores, tau, visible_until, fractional_from, alive, chosen, num_before, first_row,
    grad_out, lse, delta, rows_k, rows_v, rows_u, qb, qs, qh, kb, ks, kg, vb, vs, vg, cb, cg, cs, s, t, S, window,
    scale, num_chunks, num_spans, num_rows, g, first_bg, num_blocks, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    GATE: tl.constexpr, HAS_CARRY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the pairs that a span's queries select: those selected when it begins, then those that join."""
    block, span = tl.program_id(0), tl.program_id(1)
    bg, batch, head = program_of(tl.program_id(2) + first_bg, g)
    entry, real, joined = _entries_of_block(
        block, span, bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t, S, window,
        K, CHUNK, SPAN, BN,
    )  # fmt: skip
    high = tl.minimum(span * SPAN + SPAN, s)
    until = tl.minimum(tl.load(visible_until + bg * (S + t) + entry, mask=real, other=0), high)
    score = tl.load(scores + bg * (S + t) + entry, mask=real, other=0.0)
    pairs = pairs_of(k, v, carry_k, carry_v, batch, head, kb, ks, kg, vb, vs, vg, cb, cg, cs, S)
    keys, values = load_pairs(entry, real, pairs, D, BD, HAS_CARRY, True)
    strides = (g, qb, qs, qh)
    state = (tl.zeros([BN, BD], ACC), tl.zeros([BN, BD], ACC), tl.zeros([BN], ACC))

    # Tiles before `gated` see all pairs of the block with gate 1, those before `general` see all.
    PARTS: tl.constexpr = tl.cdiv(G, GP)
    first = tl.min(joined, 0) // BQ * PARTS
    last = tl.maximum(tl.cdiv(tl.max(until, 0), BQ) * PARTS, first)
    plain = tl.min(tl.load(fractional_from + bg * (S + t) + entry, mask=real, other=s), 0)
    seen = tl.min(tl.where(real, until, high), 0)
    general = tl.where(block < num_blocks, tl.maximum(tl.minimum(seen // BQ * PARTS, last), first), first)
    gated = tl.maximum(tl.minimum(plain // BQ * PARTS, general), first)
    # Loops begin at 0: with a bound that depends on data the compiler does not pipeline the loads. The later ones are
    # short of registers: what does not change from tile to tile they compute in each, rather than spill it.
    for step in tl.range(0, gated - first):
        rows, _ = query_rows(first + step, q, grad_out, lse, delta, s, batch, head, strides, G, GP, BQ, D, BD, True)
        state = _accumulate(keys, values, rows, scale, 1.0, 1, state, "none", False, ACC, PRECISION)
    if GATE != "none":
        bg, batch, head = program_of(tl.program_id(2) + anew(first_bg, window), g)
        others = anew_strides(strides, window)
        for step in tl.range(0, general - gated, disable_licm=BD > 64):
            rows, queries = query_rows(
                gated + step, q, grad_out, lse, delta, s, batch, head, others, G, GP, BQ, D, BD, True
            )
            tau_row = tl.load(tau + bg * s + queries)
            gate = tl.clamp(score[:, None] - tau_row[None, :], 0.0, 1.0)
            state = _accumulate(keys, values, rows, scale, gate, 1, state, GATE, False, ACC, PRECISION)
    bg, batch, head = program_of(tl.program_id(2) + anew(first_bg, t), g)
    others = anew_strides(strides, t)
    joined, until, score = _joined_until(
        anew(block, t), anew(span, t), bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t,
        anew(S, t), window, visible_until, scores, K, CHUNK, SPAN, BN,
    )  # fmt: skip
    last = tl.maximum(tl.cdiv(tl.max(until, 0), BQ) * PARTS, general)
    for step in tl.range(0, last - general, disable_licm=BD > 64):
        rows, queries = query_rows(
            general + step, q, grad_out, lse, delta, s, batch, head, others, G, GP, BQ, D, BD, False
        )
        visible = (joined[:, None] <= queries[None, :]) & (queries[None, :] < until[:, None])
        tau_row = tl.load(tau + bg * s + queries, mask=queries < s, other=0.0)
        gate = tl.clamp(score[:, None] - tau_row[None, :], 0.0, 1.0)
        state = _accumulate(keys, values, rows, scale, gate, visible, state, GATE, True, ACC, PRECISION)

    bg, batch, head = program_of(tl.program_id(2) + anew(first_bg, s), g)
    S = anew(S, s)
    entry, real, joined = _entries_of_block(
        anew(block, s), anew(span, s), bg, alive, chosen, num_before, num_chunks, num_spans, num_blocks, s, t, S,
        window, K, CHUNK, SPAN, BN,
    )  # fmt: skip
    became = tl.where(entry < S, 0, tl.maximum(entry - S - (t - s) + window, 0)) // SPAN
    row = tl.load(first_row + bg * (S + t + 1) + entry, mask=real, other=0) + span - became
    row = tl.program_id(2).to(tl.int64) * num_rows + row
    _store_rows(row, real, state, rows_k, rows_v, rows_u, D, BD, GATE)


@triton.jit
def _store_rows(row, real, state, rows_k, rows_v, rows_u, D: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr):
    """One row per pair, dk still without the scale: a pair's rows begin with the span in which it became a candidate
    (carried: with the first)."""
    grad_k, grad_v, grad_u = state
    width = tl.arange(0, BD)
    store = real[:, None] & (width < D)[None, :]
    tl.store(rows_k + row[:, None] * D + width[None, :], grad_k, mask=store)
    tl.store(rows_v + row[:, None] * D + width[None, :], grad_v, mask=store)
    if GATE != "none":
        tl.store(rows_u + row, grad_u, mask=real)


@triton.jit
def sum_rows_kernel(
    rows_k, rows_v, rows_u, first_row, chosen, num_before, grad_u, grad_carry_k, grad_carry_v, num_carried, S, t,
    num_rows, first_bg, scale, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, HAS_GATE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums the rows of one pair, in order, into its first row; carried pairs first, then all ever selected.

    The sums of a carried pair are its gradient; no row, no gradient.
    """
    bg = (tl.program_id(1) + first_bg).to(tl.int64)
    index = tl.program_id(0)
    entry = index
    if index >= num_carried:
        if index - num_carried >= tl.load(num_before + bg * (t + 1) + t):
            return
        entry = tl.load(chosen + bg * t + index - num_carried)
    begin = tl.load(first_row + bg * (S + t + 1) + entry)
    end = tl.load(first_row + bg * (S + t + 1) + entry + 1)
    base = tl.program_id(1).to(tl.int64) * num_rows
    width = tl.arange(0, BD)
    sum_k, sum_v = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    if HAS_GATE:
        sum_u = tl.zeros([ROWS], ACC)
    for low in tl.range(begin, end, ROWS):
        row = low + tl.arange(0, ROWS)
        place = (base + row)[:, None] * D + width[None, :]
        load = (row < end)[:, None] & (width < D)[None, :]
        sum_k += tl.sum(tl.load(rows_k + place, mask=load, other=0.0), 0)
        sum_v += tl.sum(tl.load(rows_v + place, mask=load, other=0.0), 0)
        if HAS_GATE:
            sum_u += tl.load(rows_u + base + row, mask=row < end, other=0.0)
    if index < num_carried:
        place = (bg * num_carried + index) * D + width
        tl.store(grad_carry_k + place, (sum_k * (scale / LOG2E)).to(grad_carry_k.dtype.element_ty), mask=width < D)
        tl.store(grad_carry_v + place, sum_v.to(grad_carry_v.dtype.element_ty), mask=width < D)
    elif end > begin + 1:
        tl.store(rows_k + (base + begin) * D + width, sum_k, mask=width < D)
        tl.store(rows_v + (base + begin) * D + width, sum_v, mask=width < D)
    if HAS_GATE:
        tl.store(grad_u + bg * (S + t) + entry, tl.sum(sum_u, 0))


@triton.jit
def _keys_of_block(block, visible_until, bg, s, t, S, window, BN: tl.constexpr):
    """Rows [BN] of some neighbouring keys, which of them exist, their positions, and until when a window shows them."""
    row = block * BN + tl.arange(0, BN)
    position = row - (t - s)
    until = tl.load(visible_until + bg * (S + t) + S + row, mask=row < t, other=0)
    return row, row < t, position, tl.minimum(tl.minimum(until, position + window), s)


@triton.jit
def grad_window_kernel(
    q, k, v, visible_until, first_row, grad_out, lse, delta, rows_k, rows_v, grad_k, grad_v,
    qb, qs, qh, kb, ks, kg, vb, vs, vg, s, t, S, window, scale, num_rows, g, first_bg, G: tl.constexpr,
    GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of neighbouring keys and the queries in whose window they are, added to the selected part's sums."""
    block = tl.program_id(0)
    bg, batch, head = program_of(tl.program_id(1) + first_bg, g)
    halo = t - s
    row, real, position, until = _keys_of_block(block, visible_until, bg, s, t, S, window, BN)
    begin = tl.load(first_row + bg * (S + t + 1) + S + row, mask=real, other=0)
    was_selected = real & (tl.load(first_row + bg * (S + t + 1) + S + row + 1, mask=real, other=0) > begin)
    begin += tl.program_id(1).to(tl.int64) * num_rows
    sum_k = load_rows(rows_k + begin * D, was_selected, D, BD, True)
    sum_v = load_rows(rows_v + begin * D, was_selected, D, BD, True)
    strides = (g, qb, qs, qh)
    state = (sum_k, sum_v, tl.zeros([BN], ACC))
    keys = load_rows(k + batch * kb + head * kg + row.to(tl.int64) * ks, real, D, BD, True)
    values = load_rows(v + batch * vb + head * vg + row.to(tl.int64) * vs, real, D, BD, True)

    PARTS: tl.constexpr = tl.cdiv(G, GP)
    first = tl.maximum(block * BN - halo, 0) // BQ * PARTS
    last = tl.maximum(tl.cdiv(tl.max(until, 0), BQ) * PARTS, first)
    newest = tl.maximum(tl.minimum(block * BN + BN, t) - 1 - halo, 0)
    # Tiles [begin, end): every query sees every key of the block.
    begin = tl.minimum(tl.maximum(tl.cdiv(newest, BQ) * PARTS, first), last)
    end = tl.minimum(tl.maximum(tl.min(tl.where(real, until, s), 0) // BQ * PARTS, begin), last)
    for step in tl.range(0, end - begin, disable_licm=BD > 128):
        rows = whole_query_rows(begin + step, q, grad_out, lse, delta, s, batch, head, strides, G, GP, BQ, D, BD)
        state = _accumulate(keys, values, rows, scale, 1.0, 1, state, "none", False, ACC, PRECISION)
    bg, batch, head = program_of(tl.program_id(1) + anew(first_bg, s), anew(g, s))
    others = anew_strides(strides, s)
    row, real, position, until = _keys_of_block(anew(block, s), visible_until, bg, s, t, anew(S, s), window, BN)
    for step in tl.range(0, last - first - (end - begin), disable_licm=BD > 128):
        tile = first + step + tl.where(first + step < begin, 0, end - begin)
        rows, queries = query_rows(tile, q, grad_out, lse, delta, s, batch, head, others, G, GP, BQ, D, BD, False)
        visible = (position[:, None] <= queries[None, :]) & (queries[None, :] < until[:, None])
        state = _accumulate(keys, values, rows, scale, 1.0, visible, state, "none", True, ACC, PRECISION)

    row = anew(block, t) * BN + tl.arange(0, BN)
    real = row < t
    width = tl.arange(0, BD)
    place = ((batch * t + row) * g + head)[:, None] * D + width[None, :]
    store = real[:, None] & (width < D)[None, :]
    tl.store(grad_k + place, (state[0] * (scale / LOG2E)).to(grad_k.dtype.element_ty), mask=store)
    tl.store(grad_v + place, state[1].to(grad_v.dtype.element_ty), mask=store)
