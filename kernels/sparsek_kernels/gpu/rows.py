"""The rows of one tile of queries, as a block of keys meets them: device functions of the key-major backward."""

import triton
import triton.language as tl

from sparsek_kernels.gpu.columns import anew, load_rows, tile_rows


@triton.jit
def anew_strides(strides, size):
    """`anew` of each of four numbers."""
    return anew(strides[0], size), anew(strides[1], size), anew(strides[2], size), anew(strides[3], size)


@triton.jit
def query_rows(
    tile, q, grad_out, lse, delta, s, batch, head, strides, G: tl.constexpr, GP: tl.constexpr,
    BQ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(q and do [rows, BD], lse and delta [rows]) of a tile, and its queries. Heads that do not exist weigh nothing.

    Args:
        strides: KV heads, and strides of q's batches, tokens and heads.
        WHOLE: all queries of the tile exist. Otherwise, no key sees those that do not: the caller masks them.
    """
    g, qb, qs, qh = strides
    heads = g * G
    queries, member, exists = tile_rows(tile, s, G, GP, BQ)
    check: tl.constexpr = not WHOLE or G % GP != 0
    q_rows = q + batch * qb + head * G * qh + (queries.to(tl.int64) * qs + member.to(tl.int64) * qh)
    q_tile = load_rows(q_rows, exists, D, BD, check)
    do_rows = grad_out + (batch * s * heads + head * G) * D + queries.to(tl.int64) * (heads * D) + member * D
    do_tile = load_rows(do_rows, exists, D, BD, check)
    row = (batch * heads + head * G + member) * s + queries
    if not check:
        lse_row, delta_row = tl.load(lse + row), tl.load(delta + row)
    else:
        # An infinite lse is a weight of 0, but also a choice per row, that the loop carries on to where lse is used.
        lse_row = tl.load(lse + row, mask=exists, other=float("inf") if G % GP != 0 else 0.0)
        delta_row = tl.load(delta + row, mask=exists, other=0.0)
    return (q_tile, do_tile, lse_row, delta_row), queries


@triton.jit
def whole_query_rows(
    tile, q, grad_out, lse, delta, s, batch, head, strides, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`query_rows` of a whole tile: what does not change from tile to tile stands apart. Saves a tenth of the window's
    kernel; `grad_selected_kernel`, short of registers, loses as much by it."""
    g, qb, qs, qh = strides
    heads = g * G
    PARTS: tl.constexpr = tl.cdiv(G, GP)
    of_tile, member = tl.arange(0, BQ * GP) // GP, tile % PARTS * GP + tl.arange(0, BQ * GP) % GP
    first, exists = (tile // PARTS * BQ).to(tl.int64), member < G
    check: tl.constexpr = G % GP != 0
    q_rows = q + batch * qb + head * G * qh + first * qs + (of_tile * qs + member.to(tl.int64) * qh)
    q_tile = load_rows(q_rows, exists, D, BD, check)
    do_rows = grad_out + (batch * s * heads + head * G) * D + first * (heads * D) + (of_tile * heads + member) * D
    do_tile = load_rows(do_rows, exists, D, BD, check)
    row = (batch * heads + head * G) * s + member.to(tl.int64) * s + of_tile + first
    lse_row = tl.load(lse + row, mask=exists, other=float("inf"))
    return q_tile, do_tile, lse_row, tl.load(delta + row, mask=exists, other=0.0)
