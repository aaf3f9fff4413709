"""SPARSEK attention of one shard in linear time and memory, in PyTorch, with its own backward.

Queries are worked on in chunks of B. The keys that a chunk can see are the (at most k) pairs selected when it begins
and the w - 1 + B newest tokens, so each chunk is a small dense attention over gathered columns: every key a query sees
stands in exactly one column, whether the window or the selection shows it. The mask comes from `selection.py`: key j
is visible to the queries [j, visible_until_j).

Columns are the whole row of a query, so the backward recomputes the softmax instead of keeping it: what is saved does
not grow with k or w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_kernels.carry import Carry
from sparsek_kernels.columns import Shape, TableGradient, chunk_queries, columns_of
from sparsek_kernels.selection import Selection


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, carry: Carry, selection: Selection, shape: Shape
) -> Tensor:
    """Output [b, s, h, d] for a shard of s queries.

    Args:
        query: [b, s, h, d].
        key: [b, w - 1 + s, g, d]: the halo of w - 1 earlier tokens, then the shard; likewise value.
        scores: [b, w - 1 + s, g], float32 or float64.
        carry: what all earlier tokens left behind.
        selection: of these scores, in chunks of `shape.chunk_size`.
    """
    return _ChunkedAttention.apply(
        query, key, value, scores, carry.key, carry.value, carry.scores, carry.positions, selection, shape
    )


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, scores, carry_key, carry_value, carry_scores, carry_positions, selection, shape
    ):
        tables = (query, key, value, scores, carry_key, carry_value, carry_scores, carry_positions)
        ctx.save_for_backward(*tables)
        ctx.selection, ctx.shape = selection, shape
        b, s, h, d = query.shape
        out = query.new_empty(b, key.shape[2], selection.alive.shape[2], shape.chunk_size, h // key.shape[2], d)
        for part in columns_of(tables, selection, shape):
            _, probabilities = part.attend()
            if shape.gate in ("value", "key_value"):
                probabilities = probabilities * part.gates.unsqueeze(-2)
            out[:, :, part.chunks] = part.rows(probabilities.flatten(3, 4) @ part.value).to(out.dtype)
        return out.permute(0, 2, 3, 1, 4, 5).reshape(b, -1, h, d)[:, :s]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        tables, selection, shape = ctx.saved_tensors, ctx.selection, ctx.shape
        query, key, value, _scores, carry_key = tables[:5]
        b, s, h, d = query.shape
        g, num_chunks = key.shape[2], selection.alive.shape[2]
        grads = _Gradients(tables, num_chunks, shape)
        grad_rows = chunk_queries(grad_out, g, num_chunks, shape.chunk_size)
        grad_query = torch.empty_like(grad_rows)
        grad_sums = selection.tau.new_zeros(b, g, num_chunks, shape.chunk_size)
        for part in columns_of(tables, selection, shape):
            logits, probabilities = part.attend()
            grad_row = grad_rows[:, :, part.chunks].flatten(3, 4).to(probabilities.dtype)
            gates = part.gates.unsqueeze(-2)
            # P (do . v): what one unit of gate adds to the loss, and gated, what one unit of log-probability adds.
            gain = part.per_head(grad_row @ part.value.transpose(-1, -2)).mul_(probabilities)
            grad_logits = gain.clone() if shape.gate == "none" else gain * gates
            delta = grad_logits.sum(-1, keepdim=True)
            grad_logits.addcmul_(probabilities, delta, value=-1)
            if shape.gate != "none":
                grad_gates = gain.addcmul_(grad_logits, logits) if shape.gate == "key_value" else gain
                fractional = (part.gates > 0) & (part.gates < 1)
                grad_gates = torch.where(fractional, grad_gates.sum(-2), 0)
                grad_sums[:, :, part.chunks] = grad_gates.sum(-1)
                grads.scores.add(part, grad_gates.sum(-2).unsqueeze(-1))
                probabilities.mul_(gates)
            if shape.gate == "key_value":
                grad_logits.mul_(gates)
            grad_logits = grad_logits.flatten(3, 4)
            grad_query[:, :, part.chunks] = part.rows((grad_logits @ part.key).mul_(shape.scale)).to(grad_query.dtype)
            grads.key.add(part, grad_logits.transpose(-1, -2) @ part.query)
            grads.value.add(part, probabilities.flatten(3, 4).transpose(-1, -2) @ grad_row)

        grad_carry_key, grad_key = grads.key.split()
        grad_carry_value, grad_value = grads.value.split()
        grad_carry_scores, grad_scores = _score_gradient(grads.scores, grad_sums.flatten(2)[..., :s], selection, tables)
        return (
            grad_query.permute(0, 2, 3, 1, 4, 5).reshape(b, -1, h, d)[:, :s],
            grad_key.transpose(1, 2).to(key.dtype),
            grad_value.transpose(1, 2).to(value.dtype),
            grad_scores.transpose(1, 2),
            grad_carry_key.to(carry_key.dtype),
            grad_carry_value.to(carry_key.dtype),
            grad_carry_scores,
            None,
            None,
            None,
        )


def _score_gradient(
    direct: TableGradient, grad_sums: Tensor, selection: Selection, tables: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """du_j = sum_i g_ij - (C[b_j] - C[a_j]), C the running sum of c_i = sum_j g_ij / N_i (kernels/README.md, 4).

    The second term is what raising u_j takes from the others: it raises tau_i for all queries i in whose support entry
    j is fractional, [a_j, b_j), selected or not. That is how unselected pairs learn.
    """
    carry_scores, carry_key = tables[6], tables[4]
    shares = grad_sums.double() / selection.num_fractional.clamp_min(1)
    running = F.pad(shares.cumsum(-1), (1, 0))
    taken = running.gather(-1, selection.fractional_until) - running.gather(-1, selection.fractional_from)
    carried, stream = (part.squeeze(-1) for part in direct.split())
    unselected = carry_scores.shape[-1] - carry_key.shape[2]
    total = torch.cat([F.pad(carried, (0, unselected)), stream], dim=-1) - taken.to(stream.dtype)
    return total[..., : carry_scores.shape[-1]], total[..., carry_scores.shape[-1] :]


class _Gradients:
    """Gradients of the keys, the values and, directly through the gates, the scores."""

    def __init__(self, tables: tuple[Tensor, ...], num_chunks: int, shape: Shape) -> None:
        key, scores, carry_key = tables[1], tables[3], tables[4]
        sizes = (carry_key.shape[2], key.shape[1], shape, num_chunks)
        self.key = TableGradient(key, *sizes, width=key.shape[-1])
        self.value = TableGradient(key, *sizes, width=key.shape[-1])
        self.scores = TableGradient(scores, *sizes, width=1)
