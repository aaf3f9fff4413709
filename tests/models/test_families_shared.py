"""Every family on two ranks that share its sequences, as it is tuned: logits and gradients of one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import Tensor

from sparsek_dist.config import AttentionConfig
from sparsek_dist.models.adapter import install
from sparsek_dist.parallel import comm
from sparsek_dist.parallel.mesh import RankGroup, build_mesh
from tests.distributed import run_distributed
from tests.models.tiny import MODELS, tiny_model, tokens

LENGTH, RANKS = 48, 2


def _logits_and_gradients(name: str, group: RankGroup) -> tuple[Tensor, dict[str, Tensor]]:
    """Of this rank's shard; gradients are summed over ranks."""
    model = tiny_model(name)
    torch.manual_seed(5)
    install(model, AttentionConfig(num_selected=6, window=5, support=11), group, seed=5)
    shard = slice(group.rank * LENGTH // group.size, (group.rank + 1) * LENGTH // group.size)
    positions = torch.arange(LENGTH).expand(2, -1)[:, shard]
    logits = model(tokens(LENGTH)[:, shard], position_ids=positions, use_cache=False).logits
    logits.square().sum().backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters()}
    if group.size > 1:
        gradients = {key: comm.all_reduce_sum(gradient, group) for key, gradient in gradients.items()}
    return logits.detach(), gradients


def _on_ranks(rank: int, world_size: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    group = build_mesh(world_size, timeout=timedelta(seconds=60)).sequence
    return {name: _logits_and_gradients(name, group) for name in MODELS}


@pytest.fixture(scope="module")
def by_rank():
    return run_distributed(_on_ranks, RANKS, timeout=120)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_computes(name, by_rank):
    logits, gradients = _logits_and_gradients(name, RankGroup())
    # Families whose norms round to float32 turn rounding in float64 into rounding in float32.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([found[name][0] for found in by_rank], dim=1), logits, **close)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for found in by_rank:
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[name][1][key] / scale, gradient / scale, rtol=0, atol=1e-6, msg=key)
