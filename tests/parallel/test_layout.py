"""Shards as literal lists."""

import pytest
import torch

from sparsek_dist.parallel.layout import positions, shard, unshard


def test_shards_are_contiguous():
    x = torch.arange(8).view(1, 8)
    assert [shard(x, rank, 4).tolist() for rank in range(4)] == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert positions(6, 1, 2).tolist() == [3, 4, 5]


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_unshard_inverts_shard(degree):
    x = torch.randn(2, 6, 3)
    assert torch.equal(unshard([shard(x, rank, degree) for rank in range(degree)]), x)


def test_unequal_shards_are_refused():
    with pytest.raises(ValueError, match="7 cannot be cut into 2 equal shards"):
        shard(torch.arange(7), 0, 2, dim=0)
