"""SPARSEK attention in Triton: which kernels run, over which grid, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsek_kernels.gpu.backward_key import grad_selected_kernel, grad_window_kernel, sum_rows_kernel
from sparsek_kernels.gpu.backward_query import grad_query_kernel
from sparsek_kernels.gpu.call import Call
from sparsek_kernels.gpu.forward import forward_kernel
from sparsek_kernels.gpu.layout import Layout, rows_of_selected, running_sum

ROWS_AT_ONCE = 16
"""Partial rows of a pair that are added in one step; a power of two."""
ROWS_BYTES = 1 << 28
"""Memory that the rows of the key-major backward may take; one KV head's rows are taken in any case."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output [b, s, h, d] and log-sum-exp in base 2 [b, h, s]."""
    b, s, h, d, _, g, _ = call.sizes
    out = torch.empty(b, s, h, d, dtype=call.query.dtype, device=call.query.device)
    lse = torch.empty(b, h, s, dtype=call.accumulate, device=call.query.device)
    gate = "none" if call.gate == "straight_through" else call.gate
    constants = call.constants(call.tiles.forward)
    forward_kernel[(triton.cdiv(s, constants["BQ"]), b * g)](
        *_tables(call, gate), out, lse, *_numbers(call), GATE=gate, **_query_constants(call), **constants
    )
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, fractional_until: Tensor, num_fractional: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, scores [b, t, g], carried keys, values, and scores."""
    b, s, h, d, _, g, support = call.sizes
    gate = "value" if call.gate == "straight_through" else call.gate
    grad_out = grad_out.contiguous()
    delta, grad_sums = torch.empty_like(lse), torch.empty(b, g, s, dtype=lse.dtype, device=lse.device)
    grad_query = torch.empty(b, s, h, d, dtype=call.query.dtype, device=lse.device)
    constants = call.constants(call.tiles.grad_query)
    grad_query_kernel[(triton.cdiv(s, constants["BQ"]), b * g)](
        *_tables(call, gate), out, grad_out, lse, delta, grad_sums, grad_query, *_numbers(call), GATE=gate,
        STRAIGHT=call.gate == "straight_through", BG=call.tiles.gated_columns, **_query_constants(call), **constants,
    )  # fmt: skip
    grad_key, grad_value, grad_u, carried = _grad_keys(call, gate, grad_out, lse, delta)
    if gate != "none":
        shares = grad_sums.double() / num_fractional.clamp_min(1)
        running = running_sum(shares)
        from_, until = call.fractional_from.long(), torch.maximum(fractional_until, call.fractional_from).long()
        grad_u -= (running.gather(-1, until) - running.gather(-1, from_)).to(grad_u.dtype)
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_u[..., support:].transpose(1, 2).clone(memory_format=torch.contiguous_format),
        carried[0],
        carried[1],
        grad_u[..., :support].clone(),
    )


def _grad_keys(
    call: Call, gate: str, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Gradients of keys and values, the direct part of the scores' [b, g, S + t], and the carried pairs'."""
    b, s, _, d, t, g, support = call.sizes
    k, num_carried, tiles = call.alive.shape[-1], call.carry_key.shape[2], call.tiles
    layout = rows_of_selected(
        call.visible_until, num_selected=k, support=support, window=call.window, span=tiles.span, num_queries=s
    )
    empty: dict[str, Any] = {"dtype": lse.dtype, "device": lse.device}
    grad_key, grad_value = (torch.empty(b, t, g, d, dtype=call.key.dtype, device=lse.device) for _ in range(2))
    grad_u = torch.zeros(b, g, support + t, **empty)
    carried = [torch.zeros(b * g, num_carried, d, **empty) for _ in range(2)]
    heads = max(1, min(b * g, ROWS_BYTES // (2 * layout.num_rows * d * lse.element_size())))
    rows_key, rows_value = torch.empty(2, heads * layout.num_rows, d, **empty)
    rows_u = torch.empty(heads * layout.num_rows, **empty)
    for first in range(0, b * g, heads):
        count = min(heads, b * g - first)
        if k > 0:
            _grad_selected(call, gate, layout, grad_out, lse, delta, (rows_key, rows_value, rows_u), (first, count))
            sum_rows_kernel[(num_carried + t, count)](
                rows_key, rows_value, rows_u, layout.first_row, layout.chosen, layout.span_start, grad_u, num_carried,
                support, t, layout.span_start.shape[-1] - 1, layout.num_rows, first,
                D=d, BD=max(16, triton.next_power_of_2(d)), ROWS=ROWS_AT_ONCE, HAS_GATE=gate != "none",
                ACC=call.constants(tiles.grad_window)["ACC"], num_warps=4,
            )  # fmt: skip
        constants = call.constants(tiles.grad_window, key_major=True)
        grad_window_kernel[(triton.cdiv(t, constants["BN"]), count)](
            call.query, call.key, call.value, call.visible_until, layout.first_row, grad_out, lse, delta, rows_key,
            rows_value, grad_key, grad_value, *call.strides()[:9], s, t, support, call.window, call.scale2,
            layout.num_rows, g, first, **constants,
        )  # fmt: skip
        if num_carried > 0:
            begin, end = (layout.first_row.flatten(0, 1)[first : first + count, i : i + num_carried] for i in (0, 1))
            place = begin + torch.arange(count, device=lse.device).unsqueeze(-1) * layout.num_rows
            for sums, rows in zip(carried, (rows_key, rows_value), strict=True):
                found = rows[place.clamp_max(len(rows) - 1)]
                sums[first : first + count] = torch.where((end > begin).unsqueeze(-1), found, 0)
    pairs = tuple(x.view(b, g, num_carried, d).to(call.carry_key.dtype) for x in carried)
    return grad_key, grad_value, grad_u, (pairs[0], pairs[1])


def _grad_selected(
    call: Call, gate: str, layout: Layout, grad_out: Tensor, lse: Tensor, delta: Tensor,
    rows: tuple[Tensor, Tensor, Tensor], heads: tuple[int, int],
) -> None:  # fmt: skip
    """Fills the rows of the KV heads [first, first + count) of all batches."""
    _, s, _, _, t, g, support = call.sizes
    k, span = call.alive.shape[-1], call.tiles.span
    constants = call.constants(call.tiles.grad_selected, key_major=True)
    num_spans, num_blocks = layout.span_start.shape[-1] - 1, triton.cdiv(k, constants["BN"])
    joining = triton.cdiv(min(span, t), constants["BN"]) + 1
    grad_selected_kernel[(num_blocks + joining, num_spans, heads[1])](
        call.query, call.key, call.value, call.carry_key, call.carry_value, call.scores, call.tau, call.visible_until,
        call.plain_until(gate), call.alive, layout.chosen, layout.span_start, layout.first_row, grad_out, lse, delta,
        *rows, *call.strides(), s, t, support, call.window, call.scale2, call.alive.shape[2], num_spans,
        layout.num_rows, g, heads[0], num_blocks, K=k, CHUNK=call.tiles.chunk, SPAN=span, GATE=gate,
        HAS_CARRY=call.has_carry, **constants,
    )  # fmt: skip


def _tables(call: Call, gate: str) -> tuple[Tensor, ...]:
    """The first arguments of the query-major kernels."""
    num_alive = (call.alive >= 0).sum(-1, dtype=torch.int32)
    return (
        call.query, call.key, call.value, call.carry_key, call.carry_value, call.scores, call.tau, call.visible_until,
        call.plain_until(gate), call.alive, num_alive, call.document_start,
    )  # fmt: skip


def _numbers(call: Call) -> tuple[int | float, ...]:
    """And their last ones before the constants."""
    _, s, _, _, t, g, support = call.sizes
    return (*call.strides(), s, t, support, call.window, call.scale2, call.alive.shape[2], g)


def _query_constants(call: Call) -> dict[str, int | bool]:
    k = call.alive.shape[-1]
    return {"K": k, "KP": triton.next_power_of_2(max(k, 1)), "CHUNK": call.tiles.chunk, "HAS_CARRY": call.has_carry}
