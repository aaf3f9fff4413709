"""SPARSEK: a differentiable top-k, and attention that selects with it. See kernels/README.md for the mathematics."""

from sparsek_kernels.attention import shard_attention, sparsek_attention
from sparsek_kernels.carry import Carry, empty_carry, merge, summarize
from sparsek_kernels.decode import decode_step, extend, prefill
from sparsek_kernels.decode_state import DecodeState, empty_state
from sparsek_kernels.operator import sparsek
from sparsek_kernels.selection import Selection, select

__all__ = [
    "Carry",
    "DecodeState",
    "Selection",
    "decode_step",
    "empty_carry",
    "empty_state",
    "extend",
    "merge",
    "prefill",
    "select",
    "shard_attention",
    "sparsek",
    "sparsek_attention",
    "summarize",
]
