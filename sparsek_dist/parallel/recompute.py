"""Recomputing a layer must not communicate: what it received is kept from the forward pass until then.

Activation checkpointing runs a layer's forward pass a second time. What arrived from other ranks would arrive again,
unchanged, so it is kept instead: of constant size, unlike the activations that checkpointing saves. Nothing is ever
kept without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor

Communicate = Callable[[], Tensor]

_around: ContextVar[Callable[[Communicate], Tensor] | None] = ContextVar("_around", default=None)


def keep_received() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `context_fn` of torch.utils.checkpoint: one context for the forward pass, one for its recomputation."""
    kept: list[Tensor] = []

    def record(communicate: Communicate) -> Tensor:
        kept.append(communicate())
        return kept[-1]

    # The second list of messages is the first, in the same order: recomputation repeats the same calls.
    return _within(lambda: record), _within(lambda: _replay(kept))


def received_once(communicate: Communicate) -> Tensor:
    """What `communicate` receives, or received when this very call was made in the forward pass."""
    around = _around.get()
    return communicate() if around is None else around(communicate)


def _replay(kept: list[Tensor]) -> Callable[[Communicate], Tensor]:
    messages = iter(kept)
    return lambda communicate: next(messages)


@contextmanager
def _within(begin: Callable[[], Callable[[Communicate], Tensor]]) -> Iterator[None]:
    token = _around.set(begin())
    try:
        yield
    finally:
        _around.reset(token)
