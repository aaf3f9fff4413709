"""What `auto` takes on a CUDA device: Triton by itself, or PyTorch with the reason, which is said once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from sparsek_kernels import dispatch

QUERY = {"shape": (1, 2, 4, 64), "device": torch.device("cuda", 0), "dtype": torch.bfloat16}
CASES = {
    "ordinary": ({}, 2, (8, 0), None),
    "old": ({}, 2, (7, 5), "the GPU is older than compute capability 8.0"),
    "wide": ({"shape": (1, 2, 4, 264)}, 2, (9, 0), "heads are 264 wide"),
    "grouped": ({"shape": (1, 2, 65, 64)}, 1, (9, 0), "65 query heads share a KV head"),
    "double": ({"dtype": torch.float64}, 2, (9, 0), "the tensors are torch.float64"),
    "many rows": ({"shape": (70_000, 2, 4, 64)}, 1, (9, 0), "batch x KV heads is 70000"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_choice_on_a_cuda_device(case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    changes, num_kv_heads, capability, hindrance = CASES[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "no_triton", lambda: None)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: 227 * 1024)
    dispatch._log_once.cache_clear()
    query = SimpleNamespace(**(QUERY | changes))
    with caplog.at_level(logging.INFO):
        chosen = {dispatch.resolve("auto", query, num_kv_heads) for _ in range(3)}
    assert chosen == {"torch" if hindrance else "triton"}
    (said,) = caplog.messages
    assert (hindrance or "the triton implementation (the fastest here)") in said
    if hindrance:
        with pytest.raises(ValueError, match=f"cannot run here: {hindrance}.*; use 'auto' or 'torch'"):
            dispatch.resolve("triton", query, num_kv_heads)
