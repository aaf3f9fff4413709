"""The columns of each chunk of queries: gathered from the tables of keys and values, and gradients summed back.

A chunk sees the (at most k) pairs selected when it begins and the newest tokens, in whole blocks of B. Every key that a
query sees stands in exactly one column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_kernels.budget import Budget
from sparsek_kernels.carry import NOWHERE
from sparsek_kernels.selection import MAX_ELEMENTS, Selection


@dataclass(frozen=True)
class Shape(Budget):
    """What one call of the attention is about, beside its tensors: k, w, S, gate, scale of the logits, chunk size B."""

    scale: float
    chunk_size: int

    @property
    def blocks(self) -> int:
        """Blocks of B tokens that hold a chunk and the w - 1 tokens before it."""
        return -(-(self.window - 1) // self.chunk_size) + 1


@dataclass(frozen=True)
class Columns:
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


def columns_of(tables: tuple[Tensor, ...], selection: Selection, shape: Shape) -> Iterator[Columns]:
    """All chunks in groups small enough for MAX_ELEMENTS."""
    query, key, value, scores, carry_key, carry_value, carry_scores, carry_positions = tables
    b, s, h, _d = query.shape
    g, num_chunks, size = key.shape[2], selection.alive.shape[2], shape.chunk_size
    work = torch.promote_types(query.dtype, torch.float32)
    num_carried, support = carry_key.shape[2], carry_scores.shape[2]
    blocks = shape.blocks
    length = (num_chunks + blocks - 1) * size

    def stream(x: Tensor, fill: float = 0) -> Tensor:
        """[b, g, t, ...] -> [b, g, c, blocks * B, ...] view: the newest tokens of each chunk, oldest first."""
        rest = x.dim() - 3
        padded = F.pad(x, (0, 0) * rest + (0, length - x.shape[2]), value=fill)
        return padded.unfold(2, blocks * size, size).movedim(-1, 3)

    stream_positions = torch.arange(length, device=query.device) - (shape.window - 1)
    newest = stream_positions.unfold(0, blocks * size, size)
    rows = chunk_queries(query, g, num_chunks, size)
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
        yield Columns(
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


class TableGradient:
    """Sums the columns' gradients back onto the table they were gathered from: carried pairs, then the stream."""

    def __init__(self, like: Tensor, num_carried: int, length: int, shape: Shape, num_chunks: int, width: int) -> None:
        b, g = like.shape[0], like.shape[2]
        self.num_carried, self.length = num_carried, length
        self.size, self.blocks = shape.chunk_size, shape.blocks
        padded = num_carried + (num_chunks + self.blocks - 1) * shape.chunk_size
        self.table = like.new_zeros(b, g, padded, width, dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, part: Columns, columns: Tensor) -> None:
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


def chunk_queries(x: Tensor, num_kv_heads: int, num_chunks: int, size: int) -> Tensor:
    """[b, s, h, d] -> [b, g, c, B, G, d], padded with zeros."""
    padded = F.pad(x, (0, 0, 0, 0, 0, num_chunks * size - x.shape[1]))
    return padded.unflatten(1, (num_chunks, size)).unflatten(3, (num_kv_heads, -1)).permute(0, 3, 1, 2, 4, 5)


def _take_pairs(table: Tensor, row: Tensor) -> Tensor:
    """[b, g, t, d] at [b, g, c, k] -> [b, g, c, k, d]."""
    b, g, t, d = table.shape
    offset = torch.arange(b * g, device=row.device).view(b, g, 1, 1) * t
    return table.reshape(b * g * t, d).index_select(0, (row + offset).flatten()).view(*row.shape, d)
