"""Causal attention to all earlier tokens, by a kernel without an [n, n] matrix where torch has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Output [b, h, n, d] of queries [b, h, n, d] over keys and values [b, g, n, d], g a divisor of h.

    Kernels that stream over the keys want a batch dimension, and on GPUs, in float32, as many KV heads as query heads:
    else torch takes the plain formula without a word. So it does on GPUs for float64 and for heads wider than 256,
    whatever is done here.
    """
    each = query.shape[1] // key.shape[1]
    if each > 1 and query.dtype == torch.float32:
        key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
    shared = key.shape[1] < query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
