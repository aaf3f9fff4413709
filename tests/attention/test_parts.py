"""Parts beside the whole: the gradients of plain slices and gathers, without their tables of zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsek_dist.attention.parts import with_rows, with_tail
from sparsek_kernels import take
from tests.kernels.counting import _Operations

ROWS = torch.tensor([[[0, 3, 3, 10], [5, 5, 5, 1]], [[10, 9, 0, 2], [4, 4, 7, 8]]])


def plain_tail(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x[:, -4:]


def plain_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, take(x.transpose(1, 2), ROWS)


CASES = [(lambda x: with_tail(x, 4), plain_tail), (lambda x: with_rows(x, ROWS), plain_rows)]
Part = Callable[[Tensor], tuple[Tensor, Tensor]]


def value_and_gradient(part: Part, x: Tensor, use: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    whole, some = part(leaf * 1)
    (grad,) = torch.autograd.grad(use(whole) + some.pow(3).sum(), leaf)
    return some.detach(), grad


@pytest.mark.parametrize(("ours", "plain"), CASES, ids=["tail", "rows"])
@pytest.mark.parametrize("use", [torch.sum, lambda x: x.sin().sum()], ids=["one_number_for_all", "a_gradient_each"])
def test_gradients_are_those_of_plain_indexing(ours: Part, plain: Part, use: Callable[[Tensor], Tensor]) -> None:
    """Rows that are taken twice, too; and gradients that are one number shown many times."""
    x = torch.randn(2, 11, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip(value_and_gradient(ours, x, use), value_and_gradient(plain, x, use), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ours", "plain"), CASES, ids=["tail", "rows"])
def test_no_table_of_zeros(ours: Part, plain: Part) -> None:
    x = torch.randn(2, 11, 2, 3, requires_grad=True)

    def seen(part: Part) -> dict[str, int]:
        whole, some = part(x)
        with _Operations(counted := Counter()):
            torch.autograd.grad([whole, some], x, [torch.ones(whole.shape), torch.ones(some.shape)])
        return counted

    tables = {"torch new_zeros", "torch zeros", "torch slice_backward", "torch add"}
    assert tables & seen(plain).keys()
    assert not tables & seen(ours).keys()
