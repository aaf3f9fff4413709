"""Memory that nobody has written yet holds garbage here, as it may on a GPU, so that reading it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

GARBAGE = -12345
"""In integers: no index, rank, row or count that could pass for one of a small test."""


def poison(x: Tensor) -> Tensor:
    """`x`, every number of it garbage."""
    if x.device.type == "meta" or x.numel() == 0:
        return x
    if x.is_floating_point() or x.is_complex():
        # Also a leaf that will get a gradient, as compilers make some.
        x.detach().fill_(float("nan"))
        return x
    return x.fill_(GARBAGE if x.dtype in (torch.int32, torch.int64) else 1)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and new_empty hand out NaN and garbage."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **settings: poison(make(*args, **settings))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
