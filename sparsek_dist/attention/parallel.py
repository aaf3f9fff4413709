"""The attention of one layer on one rank: SPARSEK and its baselines, one code path, any sequence-parallel degree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsek_dist.attention.exchange import Exchange, add_halo, exchange_carry
from sparsek_dist.attention.scorer import RandomScores, ScoringNetwork, SinkScores
from sparsek_dist.config import NUM_SINKS, AttentionConfig
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Budget, attend_shard, select_shard


def budget_of(config: AttentionConfig) -> Budget:
    """What a query may see, in the terms of the one operator that serves SPARSEK and every baseline but `full`.

    All kinds see num_selected + window pairs. Only `sparsek` has soft gates; the others need no support.
    """
    k, reach = config.num_selected, config.reach
    if config.kind == "sparsek":
        return Budget(k, reach, config.support_size, config.gate)
    if config.kind == "random":
        return Budget(k, reach, k + 1, "none")
    if config.kind == "sink_window":
        return Budget(NUM_SINKS, reach, NUM_SINKS + 1, "none")
    assert config.kind == "window", "`full` is dense attention: it has no budget"
    return Budget(0, reach, 0, "none")


@dataclass(frozen=True)
class ParallelAttention:
    """Attention over a sequence of which this rank holds one contiguous shard."""

    budget: Budget
    group: RankGroup
    backend: str = "auto"
    exchange: Exchange = "auto"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, position_ids: Tensor, *, scale: float
    ) -> Tensor:
        """Output [b, s, h, d] of this shard, equal to that of one process holding the whole sequence.

        Args:
            query: [b, s, h, d].
            key: [b, s, g, d]; likewise value.
            scores: [b, s, g], finite.
            position_ids: [b, s], each token's position in its document; a document may have begun on an earlier rank.
            scale: of the logits.
        """
        budget, group = self.budget, self.group
        index = torch.arange(query.shape[1], device=query.device)
        document_start = index - position_ids.expand(query.shape[0], -1)
        best = incoming = None
        if group.size > 1:
            key, value, scores = add_halo(key, value, scores, budget.window - 1, group)
            sizes = {"num_selected": budget.num_selected, "support": budget.support}
            key, value, incoming = exchange_carry(
                key, value, scores, document_start, group, **sizes, exchange=self.exchange
            )
            best = incoming.best
        # Scores alone select: the pairs of other ranks travel meanwhile.
        selection = select_shard(query, scores, best, document_start, budget=budget, backend=self.backend)
        return attend_shard(
            query,
            key,
            value,
            scores,
            None if incoming is None else incoming.carry(),
            document_start,
            selection,
            budget=budget,
            scale=scale,
            backend=self.backend,
        )


def build_scorer(config: AttentionConfig, *, hidden_size: int, num_kv_heads: int, seed: int, layer: int) -> nn.Module:
    """Maps (hidden [b, s, e], position_ids [b, s]) to scores [b, s, g]."""
    if config.kind == "sparsek":
        slopes = {"slope": config.score_slope, "slope_ratio": config.slope_ratio}
        return ScoringNetwork(hidden_size, num_kv_heads, std=config.score_std, **slopes)
    if config.kind == "random":
        return RandomScores(num_kv_heads, seed=seed, layer=layer)
    return SinkScores(num_kv_heads)
