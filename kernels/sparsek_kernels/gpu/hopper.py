"""Which calls the kernels written for Hopper compute, and how they are launched."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import triton
from torch import Tensor

from sparsek_kernels.gpu.call import Call
from sparsek_kernels.gpu.tiles import Tile

HOPPER_FORWARD = {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)}
"""By d; a warp computes 16 rows, and the kernel is written for two stages."""


def hopper_forward_applies(call: Call) -> bool:
    """Whether the forward written for Hopper computes this call; where not, the one for all GPUs does, more slowly.

    Its matrix products exist on capability 9.x only, in half precision, and its tiles were made for d of 64 and 128
    without gates (`straight_through` has none in the forward); more query heads per KV head than its tile has rows do
    not fit, nor 2^15 selected pairs the number that counts them. Its copies move 16 bytes at a time: every row must
    begin at a multiple of them, as the compiler finds it if strides are multiples of 16. Triton must have Gluon.
    """
    _, _, h, d, _, g, _ = call.sizes
    tensors = (call.query, call.key, call.value, *((call.carry_key, call.carry_value) if call.has_carry else ()))
    return (
        is_hopper(call.query.device)
        and call.gate in ("none", "straight_through")
        and all(x.dtype == call.query.dtype and x.dtype in (torch.float16, torch.bfloat16) for x in tensors)
        and d in HOPPER_FORWARD
        and h // g <= HOPPER_FORWARD[d].rows
        and call.alive.shape[-1] < 1 << 15
        and all(x.data_ptr() % 16 == 0 and all(i % 16 == 0 for i in x.stride()[:3]) for x in tensors)
        and kernel_for_hopper() is not None
    )


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def kernel_for_hopper() -> Any:
    """The kernel, or None where Triton lacks what it is written in."""
    try:
        from sparsek_kernels.gpu.forward_hopper import forward_hopper_kernel
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "Triton %s lacks what the forward for Hopper is written in (%s): the one for all GPUs runs, which takes a "
            "fifth more time",
            triton.__version__,
            error,
        )
        return None
    return forward_hopper_kernel


def forward_on_hopper(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fills output [b, s, h, d] and log-sum-exp in base 2 [b, h, s]."""
    constants = hopper_constants(call)
    grid = (triton.cdiv(call.query.shape[1], constants["BQ"]), out.shape[0] * call.key.shape[2])
    kernel_for_hopper()[grid](*call.query_tables("none", call.tau), out, lse, *call.numbers(), **constants)


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
        "OFFSET": gl.int32 if furthest < 1 << 31 else gl.int64,
    }
