"""Dense attention of a share of the heads: never by a kernel that holds an [n, n] matrix, documents apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_dist.attention.ulysses import _within_documents

DOCUMENTS = (7, 1, 12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_matrix_of_all_pairs_is_built(kv_heads, dtype):
    n = sum(DOCUMENTS)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, heads, 8, dtype=dtype) for heads in (4, kv_heads, kv_heads))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(2, n)
    # Raises where the kernel that streams over the keys cannot take its inputs. (That on CPUs takes shared KV heads in
    # float32, too; those on GPUs do not: see below.)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = _within_documents(query, key, value, positions, 0.3)

    document = (positions == 0).cumsum(dim=1)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    visible = causal & (document.unsqueeze(1) == document.unsqueeze(2))
    keys, values = (x.double().repeat_interleave(4 // kv_heads, dim=2) for x in (key, value))
    logits = 0.3 * torch.einsum("bihd,bjhd->bhij", query.double(), keys)
    weights = logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, values)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_length_alone_on_a_gpu(dtype):
    """At 65,536 tokens a matrix of all pairs would take 8 GB a head."""
    n = 65_536
    query, key, value = (
        torch.randn(1, n, heads, 64, dtype=dtype, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _within_documents(query, key, value, torch.arange(n, device="cuda").unsqueeze(0), 0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9
