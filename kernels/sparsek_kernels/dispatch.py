"""Which implementation runs: resolved once, said once, never changed behind the caller's back."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch", "reference"]
logger = logging.getLogger(__name__)

WIDEST_HEAD, MOST_GROUPED, MOST_HEADS, MOST_SELECTED = 256, 64, 65535, 32768
"""Limits of the Triton kernels: d, G = h / g, b * g (a grid's second axis), and k (one block holds a list)."""
SHARED_WIDE = 132 * 1024
"""Bytes of shared memory that heads wider than 128 need; the other kernels fit into 99 KB."""


def resolve(backend: str, query: Tensor, num_kv_heads: int, num_selected: int = 0) -> str:
    """The implementation behind `backend` for queries [b, s, h, d] of this dtype on this device.

    Raises:
        ValueError: for a name that does not exist, or an explicit choice that cannot be honoured here.
    """
    if backend not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"backend = {backend!r} must be auto, triton, torch or reference")
    if backend not in ("auto", "triton"):
        return _say(backend, query.device.type, "as asked")
    hindrance = why_not_triton(query, num_kv_heads, num_selected)
    if hindrance is None and (backend == "triton" or query.device.type == "cuda"):
        return _say("triton", query.device.type, "as asked" if backend == "triton" else "the fastest here")
    if backend == "triton":
        raise ValueError(f"backend = 'triton' cannot run here: {hindrance}; use 'auto' or 'torch'")
    return _say("torch", query.device.type, hindrance or "Triton's interpreter runs only where it is asked for")


def why_not_triton(query: Tensor, num_kv_heads: int, num_selected: int = 0) -> str | None:
    """What keeps the Triton kernels from running on these queries, in words; None if nothing does."""
    b, _, h, d = query.shape
    if hindrance := no_triton():
        return hindrance
    interpreted = _interpreted()
    if query.device.type != "cuda" and not interpreted:
        return f"the tensors are on {query.device.type}, and Triton compiles for CUDA devices"
    if query.device.type == "cuda" and _capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    dtypes = (torch.float16, torch.bfloat16, torch.float32, *((torch.float64,) if interpreted else ()))
    if query.dtype not in dtypes:
        return f"the tensors are {query.dtype}, the kernels take bfloat16, float16 and float32"
    if d > WIDEST_HEAD:
        return f"heads are {d} wide, the kernels take at most {WIDEST_HEAD}"
    if h // num_kv_heads > MOST_GROUPED:
        return f"{h // num_kv_heads} query heads share a KV head, the kernels take at most {MOST_GROUPED}"
    if d > 128 and query.dtype.itemsize > 2 and h // num_kv_heads > 32:
        return f"{h // num_kv_heads} float32 query heads, {d} wide, share a KV head: their tiles need too much memory"
    if d > 128 and query.device.type == "cuda" and _shared_memory(query.device) < SHARED_WIDE:
        return f"heads are {d} wide, and the GPU has no {SHARED_WIDE // 1024} KB of shared memory for a block"
    if num_selected > MOST_SELECTED:
        return f"num_selected is {num_selected}, the kernels take at most {MOST_SELECTED}"
    if b * num_kv_heads > MOST_HEADS:
        return f"batch x KV heads is {b * num_kv_heads}, the kernels take at most {MOST_HEADS}"
    return None


# What the machine is like is no part of a compiled graph, in which a question to the driver could not stand.
@torch.compiler.assume_constant_result
def no_triton() -> str | None:
    """What keeps Triton from running on this machine at all, in words; None if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreted() and torch.cuda.device_count() == 0:
        return "there is no CUDA device, for which Triton compiles"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_WIDE)


def _say(chosen: str, device: str, reason: str) -> str:
    if not torch.compiler.is_compiling():
        _log_once(chosen, device, reason)
    return chosen


@functools.cache
def _log_once(chosen: str, device: str, reason: str) -> None:
    logger.info("SPARSEK attention on %s: the %s implementation (%s)", device, chosen, reason)
