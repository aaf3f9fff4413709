"""SPARSEK: a differentiable top-k, and attention that selects with it. See kernels/README.md for the mathematics."""

from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.budget import Budget
from sparsek_kernels.carry import Best, Carry, best_of_parts, best_of_shard, empty_carry, merge, summarize, take
from sparsek_kernels.decode import decode_step, extend, prefill
from sparsek_kernels.decode_state import DecodeState, empty_state
from sparsek_kernels.operator import sparsek
from sparsek_kernels.selection import Selection, select
from sparsek_kernels.shards import attend_shard, select_shard, shard_attention

__all__ = [
    "Best",
    "Budget",
    "Carry",
    "DecodeState",
    "Selection",
    "attend_shard",
    "best_of_parts",
    "best_of_shard",
    "decode_step",
    "empty_carry",
    "empty_state",
    "extend",
    "merge",
    "prefill",
    "select",
    "select_shard",
    "shard_attention",
    "sparsek",
    "sparsek_attention",
    "summarize",
    "take",
]
