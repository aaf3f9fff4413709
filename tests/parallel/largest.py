"""How large the tensors are that some code makes on its way."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation made: of any dtype, or of one."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.numbers = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and self.dtype in (None, made.dtype):
            self.numbers = max(self.numbers, made.numel())
        return made
