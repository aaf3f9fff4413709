"""Which implementation runs: resolved once, said once, never changed behind the caller's back."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch", "reference"]
logger = logging.getLogger(__name__)


def resolve(backend: str, device: torch.device) -> str:
    """The implementation behind `backend` on this device.

    Raises:
        ValueError: for a name that does not exist, or an explicit choice that cannot be honoured here.
    """
    if backend not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"backend = {backend!r} must be auto, triton, torch or reference")
    if backend == "triton":
        raise ValueError("backend = 'triton' is not part of this version: use 'auto' or 'torch'")
    return _say(backend, device.type)


@functools.cache
def _say(backend: str, device: str) -> str:
    chosen = "torch" if backend == "auto" else backend
    reason = "this version has no Triton kernels" if backend == "auto" else "as asked"
    logger.info("SPARSEK attention on %s: the %s implementation (%s)", device, chosen, reason)
    return chosen
