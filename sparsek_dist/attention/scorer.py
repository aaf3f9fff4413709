"""Where scores come from: a small learned network, or the fixed rules of the baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsek_dist.config import NUM_SINKS


class ScoringNetwork(nn.Module):
    """u = X w_score + slope * position (arXiv 2406.16747): one score per token and KV head, whatever the query.

    One score per KV head, not per query head, because the cache holds one pair per KV head; weights of variance
    std^2 / e, so that scores of a normalised input start with standard deviation std; and a slope of its own for each
    head, from `slope` for the first to `slope * slope_ratio` for the last, so that some remember the near and some the
    far (all our choices).
    """

    def __init__(
        self, hidden_size: int, num_kv_heads: int, *, std: float, slope: float, slope_ratio: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kv_heads, hidden_size))
        self.slope, self.slope_ratio = slope, slope_ratio
        nn.init.normal_(self.weight, std=std * hidden_size**-0.5)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Normalised layer input [b, s, e] and positions in the document [b, s] -> scores [b, s, g].

        At least float32 whatever the input: scores decide by their order, and bfloat16 would make ties of neighbours.
        """
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scores = hidden.to(precise) @ self.weight.to(precise).T
        return scores + self.slopes(scores) * position_ids.to(precise).unsqueeze(-1)

    def slopes(self, like: Tensor) -> Tensor | float:
        """One number, or one per KV head [g] with the type and device of `like`.

        Those are computed anew, as a buffer would follow the weights to bfloat16.
        """
        if self.slope_ratio == 1:
            # No launches for what is a constant: decoding waits for the host.
            return self.slope
        heads = len(self.weight)
        place = torch.arange(heads, dtype=like.dtype, device=like.device) / max(1, heads - 1)
        return self.slope * self.slope_ratio**place


class RandomScores(nn.Module):
    """The `random` baseline: a frozen hash of (seed, layer, head, position), so that every rank and step agrees."""

    def __init__(self, num_kv_heads: int, *, seed: int, layer: int) -> None:
        super().__init__()
        self.num_kv_heads, self.salt = num_kv_heads, (seed * 1000 + layer) % (1 << 22)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, e], [b, s] -> [b, s, g], uniform in [0, 1)."""
        heads = torch.arange(self.num_kv_heads, device=hidden.device)
        mixed = position_ids.unsqueeze(-1) * self.num_kv_heads + heads + (self.salt << 40)
        # The finaliser of splitmix64 (Steele, Lea, Flood 2014), in wrapping 64-bit arithmetic.
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            mixed = (mixed ^ _logical_shift(mixed, shift)) * factor
        mixed = mixed ^ _logical_shift(mixed, 31)
        return _logical_shift(mixed, 40).float() / (1 << 24)


class SinkScores(nn.Module):
    """The `sink_window` baseline: the first tokens of a document score above all others, hence stay for ever."""

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, e], [b, s] -> [b, s, g]."""
        return (position_ids < NUM_SINKS).float().unsqueeze(-1).expand(-1, -1, self.num_kv_heads)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
