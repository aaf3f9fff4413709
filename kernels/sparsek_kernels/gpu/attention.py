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
from sparsek_kernels.gpu.hopper import forward_on_hopper, hopper_forward_applies
from sparsek_kernels.gpu.layout import Layout, rows_of_selected
from sparsek_kernels.gpu.score_gradient import score_gradient

ROWS_AT_ONCE = 16
"""Partial rows of a pair that are added in one step; a power of two."""
SUM_REGISTERS = 128
"""Most of a thread that adds them: not told, the assembler may take fewer than it needs."""
ROWS_BYTES = 1 << 28
"""Memory that the rows of the key-major backward may take; one KV head's rows are taken in any case."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output [b, s, h, d] and log-sum-exp in base 2 [b, h, s]."""
    b, s, h, d, _, g, _ = call.sizes
    out = torch.empty(b, s, h, d, dtype=call.query.dtype, device=call.query.device)
    lse = torch.empty(b, h, s, dtype=call.accumulate, device=call.query.device)
    if hopper_forward_applies(call):
        forward_on_hopper(call, out, lse)
        return out, lse
    constants = call.constants(call.tiles.forward)
    forward_kernel[(call.num_tiles(constants), b * g)](
        *call.forward_tables(), out, lse, *call.numbers(), GATE=call.forward_gate, BG=call.tiles.forward.at_once,
        **call.query_constants(), **constants,
    )  # fmt: skip
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, fractional_until: Tensor, num_fractional: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, scores [b, t, g], carried keys, values, and scores."""
    b, s, h, d, t, g, support = call.sizes
    gate = "value" if call.gate == "straight_through" else call.gate
    grad_out = grad_out.contiguous()
    constants = call.constants(call.tiles.grad_query)
    parts = call.num_parts(constants)
    delta, grad_sums = torch.empty_like(lse), torch.empty(b, g, parts, s, dtype=lse.dtype, device=lse.device)
    grad_query = torch.empty(b, s, h, d, dtype=call.query.dtype, device=lse.device)
    grad_query_kernel[(call.num_tiles(constants), b * g)](
        *call.query_tables(gate, call.scores), out, grad_out, lse, delta, grad_sums, grad_query, *call.numbers(),
        GATE=gate, STRAIGHT=call.gate == "straight_through", BG=call.tiles.grad_query.at_once,
        **call.query_constants(), **constants,
    )  # fmt: skip
    layout = rows_of_selected(
        call.visible_until, num_selected=call.alive.shape[-1], support=support, window=call.window,
        span=call.tiles.span, num_queries=s,
    )  # fmt: skip
    grad_key, grad_value, grad_u, carried = _grad_keys(call, gate, layout, grad_out, lse, delta)
    if gate == "none":
        grad_scores, grad_carry_scores = grad_u.new_zeros(b, t, g), grad_u.new_zeros(b, g, support)
    else:
        grad_scores, grad_carry_scores = score_gradient(
            grad_u,
            layout.first_row,
            grad_sums.sum(2) if parts > 1 else grad_sums[:, :, 0],
            num_fractional.contiguous(),
            (call.fractional_from, fractional_until.contiguous()),
            t,
        )
    return grad_query, grad_key, grad_value, grad_scores, *carried, grad_carry_scores


def _grad_keys(
    call: Call, gate: str, layout: Layout, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Gradients of keys, values, the scores' direct part [b, g, S + t] where entries have rows, and carried pairs."""
    b, s, _, d, t, g, support = call.sizes
    num_carried, tiles = call.carry_key.shape[2], call.tiles
    empty: dict[str, Any] = {"dtype": lse.dtype, "device": lse.device}
    grad_key, grad_value = (torch.empty(b, t, g, d, dtype=call.key.dtype, device=lse.device) for _ in range(2))
    grad_u = torch.empty(b, g, support + t, **empty)
    # Not empty_like: strides of an empty tensor may be any, and would be copied.
    carried = (call.carry_key.new_empty(call.carry_key.shape), call.carry_value.new_empty(call.carry_value.shape))
    heads = max(1, min(b * g, ROWS_BYTES // (2 * layout.num_rows * d * lse.element_size())))
    rows_key, rows_value = torch.empty(2, heads * layout.num_rows, d, **empty)
    rows_u = torch.empty(heads * layout.num_rows, **empty)
    for first in range(0, b * g, heads):
        count = min(heads, b * g - first)
        if call.alive.shape[-1] > 0:
            _grad_selected(call, gate, layout, grad_out, lse, delta, (rows_key, rows_value, rows_u), (first, count))
            sum_rows_kernel[(num_carried + t, count)](
                rows_key, rows_value, rows_u, layout.first_row, layout.chosen, layout.num_before, grad_u, *carried,
                num_carried, support, t, layout.num_rows, first, call.scale2,
                D=d, BD=max(16, triton.next_power_of_2(d)), ROWS=ROWS_AT_ONCE, HAS_GATE=gate != "none",
                ACC=call.constants(tiles.grad_window)["ACC"], num_warps=4, maxnreg=SUM_REGISTERS,
            )  # fmt: skip
        constants = call.constants(tiles.grad_window, key_major=True)
        grad_window_kernel[(triton.cdiv(t, constants["BN"]), count)](
            call.query, call.key, call.value, call.visible_until, layout.first_row, grad_out, lse, delta, rows_key,
            rows_value, grad_key, grad_value, *call.strides()[:9], s, t, support, call.window, call.scale2,
            layout.num_rows, g, first, **constants,
        )  # fmt: skip
    return grad_key, grad_value, grad_u, carried


def _grad_selected(
    call: Call, gate: str, layout: Layout, grad_out: Tensor, lse: Tensor, delta: Tensor,
    rows: tuple[Tensor, Tensor, Tensor], heads: tuple[int, int],
) -> None:  # fmt: skip
    """Fills the rows of the KV heads [first, first + count) of all batches."""
    _, s, _, _, t, g, support = call.sizes
    k, span = call.alive.shape[-1], call.tiles.span
    constants = call.constants(call.tiles.grad_selected, key_major=True)
    num_spans, num_blocks = layout.num_spans, triton.cdiv(k, constants["BN"])
    joining = triton.cdiv(min(span, t), constants["BN"]) + 1
    grad_selected_kernel[(num_blocks + joining, num_spans, heads[1])](
        call.query, call.key, call.value, call.carry_key, call.carry_value, call.scores, call.tau, call.visible_until,
        call.gated_from(gate), call.alive, layout.chosen, layout.num_before, layout.first_row, grad_out, lse, delta,
        *rows, *call.strides(), s, t, support, call.window, call.scale2, call.alive.shape[2], num_spans,
        layout.num_rows, g, heads[0], num_blocks, K=k, CHUNK=call.tiles.chunk, SPAN=span, GATE=gate,
        HAS_CARRY=call.has_carry, **constants,
    )  # fmt: skip
