"""What a query may see, and how its selected pairs are gated: the settings of one attention, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    num_selected: int
    """k: pairs of each KV head beside the window."""
    window: int
    """w >= 1: newest tokens, the query's own included."""
    support: int
    """S > k: candidates that take part in the projection."""
    gate: str
    """`value`, `key_value`, `straight_through` or `none`; see `sparsek_attention`."""

    def at_most(self, candidates: int) -> Budget:
        """What selects the same where no query has more candidates: smaller tables do."""
        return replace(self, num_selected=min(self.num_selected, candidates), support=min(self.support, candidates))
