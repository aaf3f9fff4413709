"""The loss weighs every target alike, and a rank without targets adds exactly nothing."""

import deepspeed.runtime.chunked_cross_entropy as chunked
import pytest
import torch
import torch.nn.functional as F

from sparsek_dist.parallel.loss import IGNORE, count_targets, engine_loss, losses, step_targets
from sparsek_dist.parallel.mesh import RankGroup
from tests.parallel.largest import Largest


def test_sums_over_shards_are_the_sum_over_the_sequence():
    logits, labels = torch.randn(2, 10, 7, dtype=torch.float64), torch.randint(0, 7, (2, 10))
    labels[:, ::3] = IGNORE
    shards = [(logits[:, :6], labels[:, :6]), (logits[:, 6:], labels[:, 6:])]
    total = sum(losses(*part).sum() for part in shards)
    torch.testing.assert_close(total, losses(logits, labels).sum(), rtol=0, atol=1e-12)
    assert sum(count_targets(part[1]) for part in shards) == (labels != IGNORE).sum()


def test_no_targets_give_zero_loss_and_zero_gradient():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = losses(logits, torch.full((1, 4), IGNORE)).sum()
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    assert step_targets([torch.full((1, 4), IGNORE)], RankGroup()) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_loss_in_float32_without_a_copy_of_all_logits(dtype, device, monkeypatch):
    monkeypatch.setattr(chunked, "_BLOCK_ELEMENTS", 100)
    logits = (3 * torch.randn(2, 21, 17)).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 17, (2, 21), device=device)
    labels[:, ::4] = IGNORE
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (0.3 * expected).backward()
    with Largest(torch.float32) as largest:
        each = losses(logits, labels)
        loss = each.sum()
        (0.3 * loss).backward()
    assert loss.dtype == torch.float32 and largest.numbers <= 100
    assert torch.equal(each == 0, labels == IGNORE)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_engine_loss_undoes_the_divisions_of_deepspeed():
    nats, targets = torch.tensor(12.0), torch.tensor(6.0, dtype=torch.float64)
    assert engine_loss(nats, targets, world_size=4, accumulation_steps=3) == 12 * 4 * 3 / 6
