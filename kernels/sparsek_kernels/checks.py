"""One clear ValueError for each argument that cannot work, before any work is done."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsek_kernels.device_checks import DeviceChecks

Gate = Literal["straight_through", "value", "key_value", "none"]


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    num_selected: int,
    window: int,
    support: int | None,
    gate: str,
    scale: float | None = None,
    halo: int = 0,
) -> None:
    """Shapes, dtypes and sizes; `halo` is how many keys precede the first query."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query and key must be [b, s, h, d] and [b, s, g, d], not {_shapes(query, key)}")
    b, s, h, d = query.shape
    if s == 0:
        raise ValueError("query holds no token: s = 0")
    g = key.shape[2]
    if key.shape != (b, s + halo, g, d) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be [b, s, g, d] = [{b}, {s + halo}, g, {d}] like query, not {_shapes(key, value)}"
        )
    if g == 0 or h % g:
        raise ValueError(f"the {h} query heads of query must be a multiple of the {g} KV heads of key")
    if scores.shape != (b, s + halo, g):
        raise ValueError(f"scores must be [b, s, g] = {[b, s + halo, g]}, not {_shapes(scores)}")
    for name, x in {"query": query, "key": key, "value": value, "scores": scores}.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, not {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, query on {query.device}: move it there")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value must share a dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if num_selected < 0:
        raise ValueError(f"num_selected = {num_selected} must not be negative")
    if window < 1:
        raise ValueError(f"window = {window} must be at least 1: every token sees itself")
    if support is not None and num_selected > 0 and support <= num_selected:
        raise ValueError(
            f"support = {support} must exceed num_selected = {num_selected}, or every gate is 1 and no score learns"
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale} must be a positive number: logits are scaled by it")
    if gate not in get_args(Gate):
        raise ValueError(f"gate = {gate!r} must be one of {', '.join(get_args(Gate))}")


def check_finite(scores: Tensor, checks: DeviceChecks | None = None) -> None:
    """A NaN would make the selection arbitrary without a trace. Waits for the device, or leaves that to `checks`."""
    _require(
        torch.isfinite(scores).all(),
        "scores hold NaN or infinity: the scoring network has diverged, or its input has",
        checks,
    )


def document_starts(document_ids: Tensor | None, query: Tensor, checks: DeviceChecks | None = None) -> Tensor:
    """[b, s] ids -> [b, s] index of the first token of each token's document; never decreasing, whatever the ids."""
    b, s = query.shape[:2]
    if document_ids is None:
        return torch.zeros(b, s, dtype=torch.int64, device=query.device)
    if document_ids.shape != (b, s) or document_ids.is_floating_point():
        raise ValueError(
            f"document_ids must be integers [b, s] = {[b, s]}, not {document_ids.dtype} {_shapes(document_ids)}"
        )
    step = document_ids.diff(dim=1)
    _require((step >= 0).all(), "document_ids must not decrease along the sequence: documents are contiguous", checks)
    index = torch.arange(s, device=query.device).expand(b, s)
    begins = torch.nn.functional.pad(step != 0, (1, 0), value=True)
    return torch.where(begins, index, 0).cummax(dim=1).values


def _require(condition: Tensor, message: str, checks: DeviceChecks | None) -> None:
    """Now, or whenever the caller looks at its `checks`."""
    later = DeviceChecks() if checks is None else checks
    later.add(condition, message)
    if checks is None:
        later.look()


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)
