"""Step lines in plain words: where the run stands, how fast it goes, when it will be done."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import timedelta

logger = logging.getLogger(__name__)


class Progress:
    """One line every `log_every` steps, and one per evaluation. Every rank logs it; only rank 0 has a console."""

    def __init__(self, steps: int, log_every: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps, self.log_every = steps, log_every
        self._clock = clock
        self._first = 0
        self._began = 0.0

    def start(self, step: int) -> None:
        """Speed and remaining time are measured from here."""
        self._first = step
        self._began = self._clock()

    def step(self, step: int, record: dict[str, float | int]) -> None:
        """Tells about the step if it is due; evaluations are always told."""
        if step % self.log_every == 0 or step in (self._first + 1, self.steps):
            logger.info(self._line(step, record))
        if "held_out/loss" in record:
            logger.info(
                f"step {step}: on held-out text, loss {record['held_out/loss']:.4f}, "
                f"{record['held_out/bits_per_byte']:.4f} bits per byte"
            )

    def _line(self, step: int, record: dict[str, float | int]) -> str:
        now = self._clock()
        # The mean over the whole run: evaluations and checkpoints are part of the time that remains.
        pace = (now - self._began) / max(1, step - self._first)
        remaining = timedelta(seconds=math.ceil(pace * (self.steps - step)))
        scorers = f" ({record['scorer_lr']:.2e} of the scorers)" if "scorer_lr" in record else ""
        return (
            f"step {step}/{self.steps}: loss {record['loss']:.4f}, {record['bits_per_byte']:.4f} bits per byte, "
            f"learning rate {record['lr']:.2e}{scorers}, gradient norm {record['grad_norm']:.3f}, "
            f"{record['tokens_per_second']:,.0f} tokens/s, {remaining} to go"
        )
