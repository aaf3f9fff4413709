"""Where the key-major backward writes: one row per selected pair and span of queries, counted out beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """All tensors int32. Entries: carried scores (S), then the stream (t)."""

    first_row: Tensor
    """[b, g, S + t + 1]: row of each entry's first span; the next entry's is its end."""
    chosen: Tensor
    """[b, g, t + 1]: entries of the stream that are selected at least once, oldest first; the rest is unused."""
    span_start: Tensor
    """[b, g, c + 1]: how many of `chosen` became candidates before each span; the last: how many there are."""
    num_rows: int
    """Never more rows than this per KV head."""


def rows_of_selected(
    visible_until: Tensor, *, num_selected: int, support: int, window: int, span: int, num_queries: int
) -> Layout:
    """A pair is selected during [became, until): one row for each span that this interval touches.

    Args:
        visible_until: [b, g, S + t].
    """
    b, g, entries = visible_until.shape
    t, device = entries - support, visible_until.device
    halo, num_spans = t - num_queries, -(-num_queries // span)
    became = torch.arange(t, dtype=torch.int32, device=device) - halo + window
    became = torch.cat([became.new_zeros(support), became.clamp_min(0)])
    selected = visible_until > became
    count = torch.where(selected, (visible_until - 1) // span - became // span + 1, 0)
    first_row = running_sum(count)

    stream = selected[..., support:]
    before = running_sum(stream.to(torch.int32))
    entry = torch.arange(support, entries, dtype=torch.int32, device=device).expand(b, g, -1)
    place = torch.where(stream, before[..., :-1], t).long()
    chosen = torch.zeros(b, g, t + 1, dtype=torch.int32, device=device).scatter_(-1, place, entry)
    edges = (torch.arange(num_spans + 1, device=device) * span - window + halo).clamp(0, t)
    edges[-1] = t
    return Layout(
        first_row=first_row,
        chosen=chosen,
        span_start=before[..., edges].contiguous(),
        num_rows=num_spans * num_selected + t,
    )


def running_sum(x: Tensor, *, tile: int = 512) -> Tensor:
    """[..., n] -> [..., n + 1]: what comes before each element, and the total; the same bits every time.

    Within tiles, then over their totals: few long rows would leave most of a GPU idle, and a scan over flat memory adds
    in an order that differs from run to run. For numbers that round, torch has no deterministic cumsum on CUDA devices:
    there the scan of a tile is a product with a triangle of ones.
    """
    n = x.shape[-1]
    tiles = F.pad(x, (0, -n % tile)).unflatten(-1, (-1, tile))
    if x.is_floating_point():
        within = tiles @ torch.ones(tile, tile, dtype=x.dtype, device=x.device).triu()
    else:
        within = tiles.cumsum(-1, dtype=x.dtype)
    if within.shape[-2] > 1:
        within = within + running_sum(within[..., -1], tile=tile)[..., :-1].unsqueeze(-1)
    return F.pad(within.flatten(-2)[..., :n], (1, 0))
