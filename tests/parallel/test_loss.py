"""The loss weighs every target alike, and a rank without targets adds exactly nothing."""

import torch

from sparsek_dist.parallel.loss import IGNORE, count_targets, engine_loss, loss_sum, step_targets
from sparsek_dist.parallel.mesh import RankGroup


def test_sums_over_shards_are_the_sum_over_the_sequence():
    logits, labels = torch.randn(2, 10, 7, dtype=torch.float64), torch.randint(0, 7, (2, 10))
    labels[:, ::3] = IGNORE
    shards = [(logits[:, :6], labels[:, :6]), (logits[:, 6:], labels[:, 6:])]
    total = sum(loss_sum(*part) for part in shards)
    torch.testing.assert_close(total, loss_sum(logits, labels), rtol=0, atol=1e-12)
    assert sum(count_targets(part[1]) for part in shards) == (labels != IGNORE).sum()


def test_no_targets_give_zero_loss_and_zero_gradient():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = loss_sum(logits, torch.full((1, 4), IGNORE))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    assert step_targets([torch.full((1, 4), IGNORE)], RankGroup()) == 1


def test_engine_loss_undoes_the_divisions_of_deepspeed():
    nats, targets = torch.tensor(12.0), torch.tensor(6.0, dtype=torch.float64)
    assert engine_loss(nats, targets, world_size=4, accumulation_steps=3) == 12 * 4 * 3 / 6
