"""What all kernels of one attention call share: sizes, strides and constants, read from the tensors once."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.gpu.tiles import Tile, Tiles, is_hopper, tiles_for

_ACCUMULATE = {torch.float64: tl.float64}


@dataclass(frozen=True)
class Call:
    """The tensors of one call, as the kernels take them. Legend: kernels/README.md; entries: carried scores, stream."""

    query: Tensor
    """[b, s, h, d]; d contiguous, as in key and value [b, t, g, d]."""
    key: Tensor
    value: Tensor
    carry_key: Tensor
    """[b, g, k, d], contiguous; k = 0 where nothing comes before."""
    carry_value: Tensor
    stream_scores: Tensor
    """[b, t, g]."""
    carry_scores: Tensor
    """[b, g, S]."""
    tau: Tensor
    visible_until: Tensor
    fractional_from: Tensor
    alive: Tensor
    document_start: Tensor
    """[b, s] int64."""
    window: int
    gate: str
    scale: float
    tiles: Tiles

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """b, s, h, d, t, g, S."""
        b, s, h, d = self.query.shape
        t, g = self.key.shape[1:3]
        return b, s, h, d, t, g, self.carry_scores.shape[-1]

    @property
    def accumulate(self) -> torch.dtype:
        """Of running sums and of the saved log-sum-exp."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @cached_property
    def scores(self) -> Tensor:
        """[b, g, S + t]; not made where no gate is computed."""
        return torch.cat([self.carry_scores, self.stream_scores.transpose(1, 2)], dim=-1)

    def gated_from(self, gate: str) -> Tensor:
        """[b, g, S + t]: from this query on an entry has a gate below 1, unless it is out of sight before."""
        return self.visible_until if gate == "none" else self.fractional_from

    @property
    def forward_gate(self) -> str:
        """The gate that counts in the forward."""
        return "none" if self.gate == "straight_through" else self.gate

    def strides(self) -> tuple[int, ...]:
        """Those of query (b, s, h), key (b, t, g), value (b, t, g), carried pairs (b, g, k)."""
        key, value, carried = self.key.stride(), self.value.stride(), self.carry_key.stride()
        return (*self.query.stride()[:3], *key[:3], *value[:3], *carried[:3])

    @property
    def scale2(self) -> float:
        """Scale of the logits for softmax in base 2."""
        return self.scale * math.log2(math.e)

    def constants(self, tile: Tile, *, key_major: bool = False) -> dict[str, Any]:
        """The constexpr arguments and launch options of one kernel."""
        _, _, h, d, _, g, _ = self.sizes
        group = min(triton.next_power_of_2(h // g), tile.rows)
        queries = tile.rows // group
        return {
            "G": h // g,
            "GP": group,
            "D": d,
            "BD": max(16, triton.next_power_of_2(d)),
            "BQ": min(queries, self.tiles.span if key_major else self.tiles.chunk),
            "BN": tile.columns,
            "ACC": _ACCUMULATE.get(self.query.dtype, tl.float32),
            "PRECISION": tile.precision,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        }

    def num_tiles(self, constants: dict[str, Any]) -> int:
        """Tiles of rows of one KV head: those of queries, as often as the query heads need."""
        return triton.cdiv(self.query.shape[1], constants["BQ"]) * self.num_parts(constants)

    def num_parts(self, constants: dict[str, Any]) -> int:
        """Tiles that share a query."""
        return triton.cdiv(constants["G"], constants["GP"])

    @property
    def has_carry(self) -> bool:
        return self.carry_key.shape[2] > 0

    def query_tables(self, gate: str, scores: Tensor) -> tuple[Tensor, ...]:
        """The first arguments of the query-major kernels."""
        return (
            self.query, self.key, self.value, self.carry_key, self.carry_value, scores, self.tau, self.visible_until,
            self.gated_from(gate), self.alive, self.document_start,
        )  # fmt: skip

    def forward_tables(self) -> tuple[Tensor, ...]:
        """Those of the forward; without gates no score is read."""
        gate = self.forward_gate
        return self.query_tables(gate, self.tau if gate == "none" else self.scores)

    def numbers(self) -> tuple[int | float, ...]:
        """And their last ones before the constants."""
        _, s, _, _, t, g, support = self.sizes
        return (*self.strides(), s, t, support, self.window, self.scale2, self.alive.shape[2], g)

    def query_constants(self) -> dict[str, int | bool]:
        """And the constants that say which pairs they list."""
        k = self.alive.shape[-1]
        return {"K": k, "KP": triton.next_power_of_2(max(k, 1)), "CHUNK": self.tiles.chunk, "HAS_CARRY": self.has_carry}


def new_call(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, carry: tuple[Tensor, Tensor, Tensor],
    selection: tuple[Tensor, Tensor, Tensor, Tensor], document_start: Tensor, window: int, gate: str, scale: float,
) -> Call:  # fmt: skip
    """A call whose tensors the kernels can read.

    Args:
        scores: [b, t, g].
        carry: key and value [b, g, k, d], scores [b, g, S].
        selection: tau, visible_until, fractional_from, alive.
    """
    h, d, g = query.shape[2], query.shape[3], key.shape[2]
    tau, visible_until, fractional_from, alive = selection
    return Call(
        query=contiguous_rows(query),
        key=contiguous_rows(key),
        value=contiguous_rows(value),
        carry_key=carry[0].contiguous(),
        carry_value=carry[1].contiguous(),
        stream_scores=scores,
        carry_scores=carry[2],
        tau=tau.contiguous(),
        visible_until=visible_until.to(torch.int32).contiguous(),
        fractional_from=fractional_from.to(torch.int32).contiguous(),
        alive=alive.to(torch.int32).contiguous(),
        document_start=document_start.to(torch.int64).contiguous(),
        window=window,
        gate=gate,
        scale=scale,
        tiles=tiles_for(
            d,
            h // g,
            query.element_size(),
            hopper=is_hopper(query.device),
            gate=gate,
        ),
    )


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def contiguous_rows(x: Tensor) -> Tensor:
    """As it is, if neighbouring numbers of a head are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
