"""Which calls the kernels written for Hopper compute, and how they are launched."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import triton
from torch import Tensor

from sparsek_kernels.gpu.call import Call
from sparsek_kernels.gpu.tiles import Tile, is_hopper

logger = logging.getLogger(__name__)

HOPPER_FORWARD = {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)}
"""By d; a warp computes 16 rows, and the kernel is written for two stages."""


def hopper_forward_applies(call: Call) -> bool:
    """Whether the forward written for Hopper computes this call; where not, the one for all GPUs does, more slowly."""
    if not is_hopper(call.query.device):
        return False
    hindrance = why_not_hopper(call)
    _log_once(hindrance)
    return hindrance is None


def why_not_hopper(call: Call) -> str | None:
    """What keeps the forward for Hopper from computing this call on such a GPU, in words; None if nothing does."""
    _, _, h, d, _, g, _ = call.sizes
    tensors = (call.query, call.key, call.value, *((call.carry_key, call.carry_value) if call.has_carry else ()))
    if call.gate == "key_value":
        return "gate key_value scales the logits, too"
    if any(x.dtype != call.query.dtype or x.dtype not in (torch.float16, torch.bfloat16) for x in tensors):
        return "the tensors are not all float16, or all bfloat16"
    if d not in HOPPER_FORWARD:
        return f"heads are {d} wide, and its tiles were made for {' and '.join(map(str, HOPPER_FORWARD))}"
    if h // g > HOPPER_FORWARD[d].rows:
        return f"{h // g} query heads share a KV head, more than a tile has rows"
    if call.alive.shape[-1] >= 1 << 15:
        return f"num_selected is {call.alive.shape[-1]}, and 2^15 do not fit the number that counts them"
    # Its copies move 16 bytes at a time, and the compiler must see that they can: strides are multiples of 16.
    if any(x.data_ptr() % 16 or any(i % 16 for i in x.stride()[:3]) for x in tensors):
        return "rows do not all begin at multiples of 16 numbers"
    return None if kernel_for_hopper() is not None else f"Triton {triton.__version__} lacks what it is written in"


@functools.cache
def kernel_for_hopper() -> Any:
    """The kernel, or None where Triton lacks what it is written in."""
    try:
        from sparsek_kernels.gpu.forward_hopper import forward_hopper_kernel
    except ImportError:
        return None
    return forward_hopper_kernel


@functools.cache
def _log_once(hindrance: str | None) -> None:
    if hindrance is None:
        logger.info("SPARSEK attention: the forward for Hopper")
    else:
        logger.info("SPARSEK attention: the forward for all GPUs, not the faster one for Hopper (%s)", hindrance)


def forward_on_hopper(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fills output [b, s, h, d] and log-sum-exp in base 2 [b, h, s]."""
    constants = hopper_constants(call)
    grid = (triton.cdiv(call.query.shape[1], constants["BQ"]), out.shape[0] * call.key.shape[2])
    kernel_for_hopper()[grid](*call.forward_tables(), out, lse, *call.numbers(), **constants)


def hopper_constants(call: Call) -> dict[str, Any]:
    """The constexpr arguments and launch options of the forward written for Hopper."""
    from triton.experimental.gluon import language as gl

    _, _, _, d, t, _, support = call.sizes
    tile = HOPPER_FORWARD[d]
    shared = call.constants(tile)
    # Rows are 32-bit offsets into those of one (b, g) unless there are too many.
    furthest = (support + t) * max(call.key.stride(1), call.value.stride(1), call.carry_key.stride(2))
    return {
        **{name: shared[name] for name in ("G", "GP", "BQ", "BN", "num_warps")},
        **call.query_constants(),
        "D": d,
        "GATE": call.forward_gate,
        "OFFSET": gl.int32 if furthest < 1 << 31 else gl.int64,
    }
