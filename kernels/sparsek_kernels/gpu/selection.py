"""`sparsek_kernels.selection.select` on the GPU: every query finds its own thresholds in a wavelet tree.

Where the torch path scans over chunks, here all queries work at once: the candidates of a query are one range of the
table of a row, and the tree (wavelet.py) answers rank questions about a range in O(log n) steps. Then every entry finds
its intervals by binary search over the queries, and every chunk lists what its first query selects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.gpu.alive import PART, SPARSE, alive_kernel
from sparsek_kernels.gpu.threshold import select_kernel
from sparsek_kernels.gpu.wavelet import Wavelet, build_wavelet, bytes_per_entry
from sparsek_kernels.selection import Selection

BLOCK = 128
"""Queries, entries or slots that one program works on."""
SELECT_REGISTERS = 72
"""What the assembler takes for `select_kernel` on Hopper. Not told, it takes 64 for older GPUs and spills."""
MAX_BYTES = 1 << 30
"""Trees are built for as many rows at a time as stay below it (but for one at least)."""


def select_gpu(
    scores: Tensor,
    document_start: Tensor,
    carry_scores: Tensor,
    carry_positions: Tensor,
    *,
    num_selected: int,
    window: int,
    support: int,
    chunk_size: int = 128,
) -> Selection:
    """Selects for every query of a shard, without waiting for the device. Deterministic.

    Args:
        scores: [b, g, t], finite, float32 (float64 for tests): of the shard's s tokens, preceded by those of the halo
            (t = w - 1 + s) if there is one (else t = s).
        document_start: [b, s] index, counted from the first query, of the first token of each query's document; never
            decreasing, negative if before the shard.
        carry_scores: [b, g, S], best first, -inf for empty slots; S = 0 if nothing came before.
        carry_positions: [b, g, S], all at most -window; NOWHERE for empty slots.
        num_selected: k >= 0.
        support: S > k, even where nothing is carried.
        chunk_size: B, queries per chunk of `alive`.

    Returns:
        As `selection.select`, but with int32 instead of int64, key fields [b, g, S + t], and the entries of `alive`
        [b, g, c, k] best first.
    """
    b, g, length = scores.shape
    s, carried = document_start.shape[1], carry_scores.shape[-1]
    halo, entries, chunks = length - s, carried + length, triton.cdiv(s, chunk_size)
    latest_first = scores.new_empty(b * g, entries)
    if carried > 0:
        # A sort keeps the strides of what it sorts, whatever they are; the kernels read rows.
        carry_positions, carry_order = (x.contiguous().view(b * g, carried) for x in carry_positions.sort(dim=-1))
    else:
        carry_positions = carry_order = carry_positions.view(b * g, 0)
    table_kernel[(triton.cdiv(entries, BLOCK), b * g)](
        scores.contiguous(), carry_scores.contiguous(), carry_order, latest_first, entries, carried, BLOCK=BLOCK
    )
    document_start = document_start.contiguous()

    def integers(*shape: int) -> Tensor:
        return torch.empty(b * g, *shape, dtype=torch.int32, device=scores.device)

    selection = Selection(
        tau=scores.new_empty(b * g, s),
        visible_until=integers(entries),
        fractional_from=integers(entries),
        fractional_until=integers(entries),
        num_fractional=integers(s),
        support_size=integers(s),
        selected_mass=scores.new_empty(b * g, s),
        alive=integers(chunks, num_selected),
    )
    sizes = (g, s, carried, carried.bit_length(), halo, num_selected, window)
    group = max(1, MAX_BYTES // (entries * bytes_per_entry(entries)))
    for first in range(0, b * g, group):
        rows = slice(first, min(first + group, b * g))
        tree = build_wavelet(latest_first[rows], length)
        part = _Rows(
            selection=Selection(**{name: field[rows] for name, field in vars(selection).items()}),
            tree=tree,
            bounds=tree.ranks.new_empty(2, rows.stop - first, s),
            document_start=document_start,
            carry_positions=carry_positions[rows],
            carry_order=carry_order[rows],
            sizes=(first, *sizes),
        )
        _find_thresholds(part, support)
        _find_intervals(part)
        if num_selected > 0:
            _list_alive(part, chunk_size)
    return Selection(**{name: field.unflatten(0, (b, g)) for name, field in vars(selection).items()})


@dataclass(frozen=True)
class _Rows:
    """What the kernels need of the rows they work on at a time."""

    selection: Selection
    """To be filled in; the rows of all fields are [rows, ...]."""
    tree: Wavelet
    bounds: Tensor
    """[2, rows, s] int32: ranks of the k-th and the S-th best candidate of each query."""
    document_start: Tensor
    """[b, s], of all rows."""
    carry_positions: Tensor
    """[rows, S], ascending; and `carry_order` [rows, S], the slot of the carry that each comes from."""
    carry_order: Tensor
    sizes: tuple[int, ...]
    """first row, g, s, S, bit_length(S), w - 1 or 0 tokens of halo, k, w: the order in which all kernels take them."""

    @property
    def tables(self) -> tuple[Tensor | int, ...]:
        tree = self.tree
        return tree.ends, tree.sums, tree.ranked, tree.ranks.shape[1], tree.levels, 1 << tree.levels

    def grid(self, length: int) -> tuple[int, int]:
        return triton.cdiv(length, BLOCK), self.tree.ranks.shape[0]


def _find_thresholds(part: _Rows, support: int) -> None:
    selection = part.selection
    fields = (selection.tau, selection.num_fractional, selection.support_size, selection.selected_mass)
    select_kernel[part.grid(selection.tau.shape[1])](
        *part.tables, part.tree.centre, part.document_start, part.carry_positions, *fields, *part.bounds, *part.sizes,
        support, TILE=part.tree.tile, BLOCK=BLOCK, num_warps=4, maxnreg=SELECT_REGISTERS,
    )  # fmt: skip


def _find_intervals(part: _Rows) -> None:
    selection, tree = part.selection, part.tree
    fields = (selection.visible_until, selection.fractional_from, selection.fractional_until)
    (s, entries) = selection.tau.shape[1], tree.ranks.shape[1]
    interval_kernel[part.grid(entries)](
        tree.ranked, tree.ranks, part.document_start, part.carry_positions, part.carry_order, selection.tau,
        *part.bounds, *fields, entries, s.bit_length(), *part.sizes, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def _list_alive(part: _Rows, chunk_size: int) -> None:
    alive = part.selection.alive
    parts = triton.cdiv(alive.shape[2], PART)
    alive_kernel[(parts * alive.shape[1], alive.shape[0])](
        *part.tables, part.tree.order, part.document_start, part.carry_positions, part.carry_order, alive,
        *part.sizes, chunk_size, TILE=part.tree.tile, BLOCK=BLOCK, PART=PART, SPARSE=SPARSE, num_warps=1,
    )  # fmt: skip


@triton.jit
def table_kernel(scores, carry_scores, carry_order, latest_first, length, carried, BLOCK: tl.constexpr):
    """The scores of a row by position, from the last to the first; -0.0 becomes 0.0: equal scores, then equal bits."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_carried, streams = entry < carried, (entry >= carried) & (entry < length)
    slot = tl.load(carry_order + row * carried + entry, mask=is_carried, other=0)
    old = tl.load(carry_scores + row * carried + slot, mask=is_carried, other=0.0)
    new = tl.load(scores + row * (length - carried) + entry - carried, mask=streams, other=0.0)
    score = tl.where(is_carried, old, new)
    tl.store(latest_first + row * length + length - 1 - entry, tl.where(score == 0, 0.0, score), mask=entry < length)


VISIBLE, FROM, UNTIL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _first_query(low, high, steps, score, rank, tau, bound, KIND: tl.constexpr):
    """First of the queries [low, high) that an entry has dropped out of, or high; it never comes back."""
    for _ in range(steps):
        query = (low + high) // 2
        is_open = low < high
        if KIND == VISIBLE:
            dropped = rank > tl.load(bound + query, mask=is_open, other=0)
        else:
            threshold = tl.load(tau + query, mask=is_open, other=0)
            if KIND == FROM:
                dropped = score - 1 < threshold
            else:
                dropped = (score <= threshold) | (rank > tl.load(bound + query, mask=is_open, other=0))
        high = tl.where(is_open & dropped, query, high)
        low = tl.where(is_open & (dropped == 0), query + 1, low)
    return high


@triton.jit
def interval_kernel(
    ranked, ranks, document_start, carry_positions, carry_order, tau, theta, sigma,
    visible_until, fractional_from, fractional_until,
    length, steps, first_row, heads, s, carried, carry_steps, halo, num_selected, window, BLOCK: tl.constexpr,
):  # fmt: skip
    """The queries that see each entry of the table, and that see it fractionally."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < length
    is_carried = inside & (entry < carried)
    position = (entry - carried - halo).to(tl.int64)
    position = tl.where(
        is_carried, tl.load(carry_positions + row * carried + entry, mask=is_carried, other=0), position
    )
    slot = tl.load(carry_order + row * carried + entry, mask=is_carried, other=0)
    rank = tl.load(ranks + row * length + entry, mask=inside, other=0)
    score = tl.load(ranked + row * length + rank, mask=inside, other=0)

    # The first query of a later document. An entry's own query, if it has one, is of its document.
    starts = document_start + (first_row + row) // heads * s
    low = tl.where(inside, tl.minimum(tl.maximum(position + 1, 0), s), s).to(tl.int32)
    end = tl.zeros_like(low) + s
    for _ in range(steps):
        query = (low + end) // 2
        is_open = low < end
        later = tl.load(starts + query, mask=is_open, other=0) > position
        end = tl.where(is_open & later, query, end)
        low = tl.where(is_open & (later == 0), query + 1, low)

    begin = tl.minimum(tl.maximum(position + window, 0), end).to(tl.int32)
    tau, theta, sigma = tau + row * s, theta + row * s, sigma + row * s
    until = _first_query(begin, end, steps, score, rank, tau, theta, VISIBLE)
    fraction_from = _first_query(begin, end, steps, score, rank, tau, sigma, FROM)
    fraction_until = _first_query(fraction_from, end, steps, score, rank, tau, sigma, UNTIL)
    out = row * length + tl.where(is_carried, slot, entry)
    tl.store(visible_until + out, until, mask=inside)
    tl.store(fractional_from + out, fraction_from, mask=inside)
    tl.store(fractional_until + out, fraction_until, mask=inside)
