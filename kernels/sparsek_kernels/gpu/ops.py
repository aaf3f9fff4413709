"""The Triton path as custom operators: autograd and torch.compile see one node each way, and no Triton inside."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_kernels.budget import Budget
from sparsek_kernels.carry import Best, Carry
from sparsek_kernels.decode_state import DecodeState
from sparsek_kernels.gpu import attention as kernels
from sparsek_kernels.gpu.call import new_call, on_device_of
from sparsek_kernels.gpu.decode import decode_step_triton
from sparsek_kernels.gpu.selection import select_gpu
from sparsek_kernels.gpu.tiles import tiles_for
from sparsek_kernels.selection import Selection


def select_for(query: Tensor, scores: Tensor, carried: Best, document_start: Tensor, budget: Budget) -> Selection:
    """What each query of a shard sees, in the form that `attend` wants.

    Args:
        query: [b, s, h, d], for its shape and dtype.
        scores: [b, t, g]: with the halo of w - 1 earlier tokens, t = w - 1 + s, or without, t = s.
        carried: of S entries, or of none where nothing comes before.
        document_start: [b, s], counted from the first query.
    """
    precise = _precise(query)
    chunk = tiles_for(query.shape[-1], query.shape[2] // scores.shape[2], query.element_size()).chunk
    return Selection(
        *select_op(
            scores.detach().to(precise),
            document_start,
            carried.scores.detach().to(precise),
            carried.positions,
            budget.num_selected,
            budget.window,
            budget.support,
            chunk,
        )
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    carry: Carry,
    document_start: Tensor,
    found: Selection,
    budget: Budget,
    scale: float,
) -> Tensor:
    """Output [b, s, h, d] of a shard; differentiable in query, key, value, scores and what is carried.

    Args:
        query: [b, s, h, d], float16, bfloat16 or float32 (float64 in Triton's interpreter).
        key: [b, t, g, d], of as many tokens as scores [b, t, g]; likewise value.
        carry: of S entries and k pairs, or of none where nothing comes before.
        found: from `select_for`.
    """
    precise = _precise(query)
    return attention_op(
        query, key, value, scores.to(precise), carry.key.to(key.dtype), carry.value.to(key.dtype),
        carry.scores.to(precise), found.tau, found.visible_until, found.fractional_from, found.fractional_until,
        found.num_fractional, found.alive, document_start, budget.window, budget.gate, scale,
    )[0]  # fmt: skip


def _precise(query: Tensor) -> torch.dtype:
    """The kernels know two precisions: that of the pairs, and the one they accumulate in, which scores have too."""
    return torch.promote_types(query.dtype, torch.float32)


@torch.library.custom_op("sparsek::select", mutates_args=())
def select_op(
    scores: Tensor, document_start: Tensor, carry_scores: Tensor, carry_positions: Tensor, num_selected: int,
    window: int, support: int, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`select_gpu` for scores [b, t, g]; the fields of Selection, in its order."""
    with on_device_of(scores):
        found = select_gpu(
            scores.transpose(1, 2).contiguous(), document_start, carry_scores, carry_positions,
            num_selected=num_selected, window=window, support=support, chunk_size=chunk_size,
        )  # fmt: skip
    return (
        found.tau, found.visible_until, found.fractional_from, found.fractional_until, found.num_fractional,
        found.support_size, found.selected_mass, found.alive,
    )  # fmt: skip


@select_op.register_fake
def _(scores, document_start, carry_scores, carry_positions, num_selected, window, support, chunk_size):
    (b, t, g), s = scores.shape, document_start.shape[1]
    entries = carry_scores.shape[-1] + t

    def integers(*shape: int) -> Tensor:
        return scores.new_empty(b, g, *shape, dtype=torch.int32)

    return (
        scores.new_empty(b, g, s), integers(entries), integers(entries), integers(entries), integers(s), integers(s),
        scores.new_empty(b, g, s), integers(-(-s // chunk_size), num_selected),
    )  # fmt: skip


@torch.library.custom_op("sparsek::attention", mutates_args=())
def attention_op(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, carry_key: Tensor, carry_value: Tensor,
    carry_scores: Tensor, tau: Tensor, visible_until: Tensor, fractional_from: Tensor, fractional_until: Tensor,
    num_fractional: Tensor, alive: Tensor, document_start: Tensor, window: int, gate: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [b, s, h, d] and log-sum-exp in base 2 [b, h, s]."""
    call = new_call(
        query, key, value, scores, (carry_key, carry_value, carry_scores), (tau, visible_until, fractional_from, alive),
        document_start, window, gate, scale,
    )  # fmt: skip
    with on_device_of(query):
        return kernels.forward(call)


@attention_op.register_fake
def _(query, key, value, scores, carry_key, carry_value, carry_scores, tau, *rest):
    b, s, h, _ = query.shape
    lse = query.new_empty(b, h, s, dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("sparsek::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Tensor,
    carry_key: Tensor, carry_value: Tensor, carry_scores: Tensor, tau: Tensor, visible_until: Tensor,
    fractional_from: Tensor, fractional_until: Tensor, num_fractional: Tensor, alive: Tensor, document_start: Tensor,
    window: int, gate: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first seven inputs of `sparsek::attention`."""
    call = new_call(
        query, key, value, scores, (carry_key, carry_value, carry_scores), (tau, visible_until, fractional_from, alive),
        document_start, window, gate, scale,
    )  # fmt: skip
    with on_device_of(query):
        return kernels.backward(call, out, lse, grad_out, fractional_until, num_fractional)


@attention_backward_op.register_fake
def _(grad_out, out, lse, *inputs):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:7])


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.gate, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None:
        return (None,) * 17
    grads = attention_backward_op(grad_out, *ctx.saved_tensors, ctx.window, ctx.gate, ctx.scale)
    return *grads, *(None,) * 10


attention_op.register_autograd(_backward, setup_context=_save)


WRITTEN = (
    "past_key", "past_value", "past_scores", "selected_positions", "support_scores", "support_positions", "length",
    "arrivals", "tau",
)  # fmt: skip
"""What a step changes of the state: all of its tensors but `document_start`."""


@torch.library.custom_op("sparsek::decode_step", mutates_args=WRITTEN)
def decode_op(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, past_key: Tensor, past_value: Tensor,
    past_scores: Tensor, selected_positions: Tensor, support_scores: Tensor, support_positions: Tensor, length: Tensor,
    document_start: Tensor, arrivals: Tensor, tau: Tensor, window: int, gate: str, scale: float,
) -> Tensor:  # fmt: skip
    """`decode_step_triton`, for torch.compile: outside of it a call of that costs the host less."""
    state = DecodeState(
        past_key, past_value, past_scores, selected_positions, support_scores, support_positions, length,
        document_start, arrivals, tau, window,
    )  # fmt: skip
    return decode_step_triton(query, key, value, scores, state, gate=gate, scale=scale)


@decode_op.register_fake
def _(query, *rest):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
