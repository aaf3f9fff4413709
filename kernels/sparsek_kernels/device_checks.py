"""Conditions on numbers that only the device knows: computed at once, looked at when the host has queued its work.

A look waits for the device, and a device that is waited for stands idle until the host has launched more. So each flag
sets out for the host as soon as it is computed, and whoever needs the answer asks last: it then waits for the flag
alone, not for what was queued behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceChecks:
    """Conditions that must hold, in the order in which they were named."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.cuda.Event | None, str]] = []

    def add(self, holds: Tensor, complaint: str) -> None:
        """A condition [] bool, and what to say if it does not hold.

        In a compiled graph nothing may wait for the device: there the device itself stops.
        """
        if torch.compiler.is_compiling():
            torch._assert_async(holds, complaint)
        elif holds.is_cuda:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(holds, non_blocking=True)
            with torch.cuda.device(holds.device):
                arrived = torch.cuda.Event()
                arrived.record()
            self._pending.append((flag, arrived, complaint))
        else:
            self._pending.append((holds, None, complaint))

    def failure(self) -> str | None:
        """The complaint of the first condition that does not hold, or None. Forgets all of them."""
        pending, self._pending = self._pending, []
        for flag, arrived, complaint in pending:
            if arrived is not None:
                arrived.synchronize()
            if not bool(flag):
                return complaint
        return None

    def look(self) -> None:
        """Raises ValueError with that complaint."""
        if (complaint := self.failure()) is not None:
            raise ValueError(complaint)
