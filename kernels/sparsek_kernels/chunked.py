"""SPARSEK attention of one shard in linear time and memory, in PyTorch, with its own backward.

Queries are worked on in chunks of B. The keys that a chunk can see are the (at most k) pairs selected when it begins
and the w - 1 + B newest tokens, so each chunk is a small dense attention over gathered columns: every key a query sees
stands in exactly one column, whether the window or the selection shows it. The mask comes from `selection.py`: key j
is visible to the queries [j, visible_until_j).

Columns are the whole row of a query, so the backward recomputes the softmax instead of keeping it: what is saved does
not grow with k or w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_kernels.carry import NOWHERE, Carry
from sparsek_kernels.selection import MAX_ELEMENTS, Selection, select


@dataclass(frozen=True)
class Shape:
    """The integers of one call: k, w, S, the gate, the logit scale and the chunk size B."""

    num_selected: int
    window: int
    support: int
    gate: str
    scale: float
    chunk_size: int = 64


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, document_start: Tensor, carry: Carry, shape: Shape
) -> Tensor:
    """Output [b, s, h, d] for a shard of s queries.

    Args:
        query: [b, s, h, d].
        key: [b, w - 1 + s, g, d]: the halo of w - 1 earlier tokens, then the shard; likewise value.
        scores: [b, w - 1 + s, g], float32 or float64.
        document_start: [b, s], counted from the first query.
        carry: what all earlier tokens left behind.
    """
    selection = select(
        scores.detach().transpose(1, 2),
        num_selected=shape.num_selected,
        window=shape.window,
        support=shape.support,
        document_start=document_start,
        carry=carry,
        chunk_size=shape.chunk_size,
    )
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
        for part in _chunks(tables, selection, shape):
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
        grad_rows = _chunk_queries(grad_out, g, num_chunks, shape.chunk_size)
        grad_query = torch.empty_like(grad_rows)
        grad_sums = selection.tau.new_zeros(b, g, num_chunks, shape.chunk_size)
        for part in _chunks(tables, selection, shape):
            logits, probabilities = part.attend()
            grad_row = grad_rows[:, :, part.chunks].flatten(3, 4).to(probabilities.dtype)
            gates = part.gates.unsqueeze(-2)
            # P (do . v): what one unit of gate adds to the loss, and gated, what one unit of log-probability adds.
            gain = part.per_head(grad_row @ part.value.transpose(-1, -2)).mul_(probabilities)
            weights = probabilities if shape.gate == "none" else probabilities * gates
            gated_gain = gain if shape.gate == "none" else gain * gates
            delta = gated_gain.sum(-1, keepdim=True)
            grad_logits = torch.addcmul(gated_gain, probabilities, delta, value=-1)
            if shape.gate != "none":
                grad_gates = gain.addcmul_(grad_logits, logits) if shape.gate == "key_value" else gain
                fractional = (part.gates > 0) & (part.gates < 1)
                grad_gates = torch.where(fractional, grad_gates.sum(-2), 0)
                grad_sums[:, :, part.chunks] = grad_gates.sum(-1)
                grads.scores.add(part, grad_gates.sum(-2).unsqueeze(-1))
            if shape.gate == "key_value":
                grad_logits.mul_(gates)
            grad_logits = grad_logits.flatten(3, 4)
            grad_query[:, :, part.chunks] = part.rows((grad_logits @ part.key).mul_(shape.scale)).to(grad_query.dtype)
            grads.key.add(part, grad_logits.transpose(-1, -2) @ part.query)
            grads.value.add(part, weights.flatten(3, 4).transpose(-1, -2) @ grad_row)

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
    direct: _TableGradient, grad_sums: Tensor, selection: Selection, tables: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """du_j = sum_i g_ij - (C[b_j] - C[a_j]), C the running sum of c_i = sum_j g_ij / N_i (sparsek README, gradients).

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


@dataclass(frozen=True)
class _Chunks:
    """Some chunks of queries with their columns: k carried pairs, then the newest tokens."""

    chunks: slice
    query: Tensor
    """[b, g, c, B * G, d], scaled."""
    key: Tensor
    """[b, g, c, m, d]; likewise value."""
    value: Tensor
    visible: Tensor
    """[b, g, c, B, m] bool."""
    gates: Tensor
    """[b, g, c, B, m]: 1 inside the window."""
    alive: Tensor
    """[b, g, c, k]: row of each carried pair in the key table (carried pairs, then stream), 0 for none."""
    group_size: int
    """G, query heads per KV head."""
    shape: Shape

    def attend(self) -> tuple[Tensor, Tensor]:
        """Ungated logits (with `key_value`; else not meant for use) and probabilities, both [b, g, c, B, G, m]."""
        logits = self.per_head(self.query @ self.key.transpose(-1, -2))
        if self.shape.gate == "key_value":
            return logits, (logits * self.gates.unsqueeze(-2)).masked_fill_(self.hidden, -torch.inf).softmax(-1)
        return logits, logits.masked_fill_(self.hidden, -torch.inf).softmax(-1)

    def per_head(self, x: Tensor) -> Tensor:
        """[b, g, c, B * G, m] -> [b, g, c, B, G, m]."""
        return x.unflatten(3, (-1, self.group_size))

    rows = per_head

    @property
    def hidden(self) -> Tensor:
        """[b, g, c, B, 1, m] bool: what no query head sees."""
        return ~self.visible.unsqueeze(-2)


def _chunks(tables: tuple[Tensor, ...], selection: Selection, shape: Shape) -> Iterator[_Chunks]:
    """All chunks in groups small enough for MAX_ELEMENTS."""
    query, key, value, scores, carry_key, carry_value, carry_scores, carry_positions = tables
    b, s, h, _d = query.shape
    g, num_chunks, size = key.shape[2], selection.alive.shape[2], shape.chunk_size
    work = torch.promote_types(query.dtype, torch.float32)
    num_carried, support = carry_key.shape[2], carry_scores.shape[2]
    blocks = -(-(shape.window - 1) // size) + 1
    length = (num_chunks + blocks - 1) * size

    def stream(x: Tensor, fill: float = 0) -> Tensor:
        """[b, g, t, ...] -> [b, g, c, blocks * B, ...] view: the newest tokens of each chunk, oldest first."""
        rest = x.dim() - 3
        padded = F.pad(x, (0, 0) * rest + (0, length - x.shape[2]), value=fill)
        return padded.unfold(2, blocks * size, size).movedim(-1, 3)

    stream_positions = torch.arange(length, device=query.device) - (shape.window - 1)
    newest = stream_positions.unfold(0, blocks * size, size)
    rows = _chunk_queries(query, g, num_chunks, size)
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    newest_keys, newest_values = stream(keys), stream(values)
    newest_scores = stream(scores.transpose(1, 2))
    newest_until = stream(selection.visible_until[..., support:])
    key_table, value_table = torch.cat([carry_key, keys], 2), torch.cat([carry_value, values], 2)
    score_table = torch.cat([carry_scores, scores.transpose(1, 2)], -1)
    position_table = torch.cat([carry_positions, stream_positions[: keys.shape[2]].expand(b, g, -1)], -1)
    tau = F.pad(selection.tau, (0, num_chunks * size - s), value=-torch.inf).unflatten(2, (-1, size))

    columns = num_carried + blocks * size
    group = max(1, MAX_ELEMENTS // (b * h * size * columns))
    for low in range(0, num_chunks, group):
        chunks = slice(low, min(low + group, num_chunks))
        alive = selection.alive[:, :, chunks]
        exists, entry = alive >= 0, alive.clamp_min(0)
        # The first k carried entries and the stream have keys; the carried entries between them have scores only.
        row = torch.where(entry < support, entry, entry - support + num_carried)

        def carried(table: Tensor, index: Tensor, empty: float) -> Tensor:
            return torch.where(exists, table.gather(-1, index.flatten(2)).view_as(index), empty)  # noqa: B023

        count = chunks.stop - chunks.start
        position = torch.cat([carried(position_table, entry, NOWHERE), newest[chunks].expand(b, g, -1, -1)], -1)
        until = torch.cat([carried(selection.visible_until, entry, 0), newest_until[:, :, chunks]], -1)
        score = torch.cat([carried(score_table, entry, 0.0), newest_scores[:, :, chunks]], -1)
        queries = torch.arange(low * size, chunks.stop * size, device=query.device).view(count, size, 1)
        visible = (position.unsqueeze(-2) <= queries) & (queries < until.unsqueeze(-2))
        # A padded query sees its own (padded) key alone, so that no row of the softmax is empty.
        visible |= (position.unsqueeze(-2) == queries) & (queries >= s)
        gates = (score.unsqueeze(-2) - tau[:, :, chunks].unsqueeze(-1)).clamp(0, 1)
        gates = torch.where(position.unsqueeze(-2) > queries - shape.window, 1, gates).to(work)
        yield _Chunks(
            chunks=chunks,
            query=rows[:, :, chunks].flatten(3, 4).to(work) * shape.scale,
            key=torch.cat([_take_pairs(key_table, row), newest_keys[:, :, chunks]], 3).to(work),
            value=torch.cat([_take_pairs(value_table, row), newest_values[:, :, chunks]], 3).to(work),
            visible=visible,
            gates=gates,
            alive=row,
            group_size=h // g,
            shape=shape,
        )


class _TableGradient:
    """Sums the columns' gradients back onto the table they were gathered from: carried pairs, then the stream."""

    def __init__(self, like: Tensor, num_carried: int, length: int, shape: Shape, num_chunks: int, width: int) -> None:
        b, g = like.shape[0], like.shape[2]
        self.num_carried, self.length, self.size = num_carried, length, shape.chunk_size
        self.blocks = -(-(shape.window - 1) // shape.chunk_size) + 1
        padded = num_carried + (num_chunks + self.blocks - 1) * shape.chunk_size
        self.table = like.new_zeros(b, g, padded, width, dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, part: _Chunks, columns: Tensor) -> None:
        """columns: [b, g, c, m, width]."""
        chunks, alive = part.chunks, part.alive
        selected, newest = columns[:, :, :, : alive.shape[-1]], columns[:, :, :, alive.shape[-1] :]
        index = alive.flatten(2).unsqueeze(-1).expand(-1, -1, -1, columns.shape[-1])
        self.table.scatter_add_(2, index, selected.flatten(2, 3).to(self.table.dtype))
        # The newest tokens of neighbouring chunks overlap block by block: each block position is one strided add.
        stream = self.table[:, :, self.num_carried :].unflatten(2, (-1, self.size))
        for block in range(self.blocks):
            own = newest[:, :, :, block * self.size : (block + 1) * self.size]
            stream[:, :, chunks.start + block : chunks.stop + block] += own

    def split(self) -> tuple[Tensor, Tensor]:
        """Gradients of the carried pairs [b, g, k, width] and of the stream [b, g, w - 1 + s, width]."""
        return self.table[:, :, : self.num_carried], self.table[:, :, self.num_carried :][:, :, : self.length]


class _Gradients:
    """Gradients of the keys, the values and, directly through the gates, the scores."""

    def __init__(self, tables: tuple[Tensor, ...], num_chunks: int, shape: Shape) -> None:
        key, scores, carry_key = tables[1], tables[3], tables[4]
        sizes = (carry_key.shape[2], key.shape[1], shape, num_chunks)
        self.key = _TableGradient(key, *sizes, width=key.shape[-1])
        self.value = _TableGradient(key, *sizes, width=key.shape[-1])
        self.scores = _TableGradient(scores, *sizes, width=1)


def _chunk_queries(x: Tensor, num_kv_heads: int, num_chunks: int, size: int) -> Tensor:
    """[b, s, h, d] -> [b, g, c, B, G, d], padded with zeros."""
    padded = F.pad(x, (0, 0, 0, 0, 0, num_chunks * size - x.shape[1]))
    return padded.unflatten(1, (num_chunks, size)).unflatten(3, (num_kv_heads, -1)).permute(0, 3, 1, 2, 4, 5)


def _take_pairs(table: Tensor, row: Tensor) -> Tensor:
    """[b, g, t, d] at [b, g, c, k] -> [b, g, c, k, d]."""
    b, g, t, d = table.shape
    offset = torch.arange(b * g, device=row.device).view(b, g, 1, 1) * t
    return table.reshape(b * g * t, d).index_select(0, (row + offset).flatten()).view(*row.shape, d)
