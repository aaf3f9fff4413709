"""What one forward and one backward of the Triton path ask of the device, counted without one.

    python -m tests.kernels.counting 131072

The host code runs on tensors of the `meta` device, which have shapes and no numbers: every Triton launch and every
operation of torch that computes something is counted, at any length, and whatever would wait for the device raises. An
operation of torch may be several kernels (`sort`); views and allocations are none and are not counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sparsek_kernels.gpu import ops

NO_WORK = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class _Operations(TorchDispatchMode):
    """Counts operations of torch that are neither views nor allocations, and not on empty tensors."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        some = next((x for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)), None)
        if not is_view and name not in NO_WORK and some is not None and some.numel() > 0:
            self.seen[f"torch {name}"] += 1
        return result


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what runs within it; no kernel is really launched."""
    seen: Counter[str] = Counter()

    def launch(kernel, *args, grid, **kwargs):
        assert all(size > 0 for size in grid), grid
        seen[f"triton {getattr(kernel, 'fn', kernel).__name__}"] += 1

    with (
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(JITFunction, "run", launch),
        _Operations(seen),
    ):
        yield seen


def count(
    n: int, *, b: int = 1, h: int = 32, g: int = 8, d: int = 128, k: int = 1024, carry: bool = False,
    gate: str = "straight_through",
) -> dict[str, Counter[str]]:  # fmt: skip
    """Launches of the selection, the forward and the backward; k = w, S = 4 k."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    t, slots, pairs = (n + k - 1, 4 * k, k) if carry else (n, 0, 0)
    query, key, value = empty(b, n, h, d), empty(b, t, g, d), empty(b, t, g, d)
    scores, starts = empty(b, t, g, dtype=torch.float32), empty(b, n, dtype=torch.int64)
    carry_scores, positions = empty(b, g, slots, dtype=torch.float32), empty(b, g, slots, dtype=torch.int64)
    carry_pairs = [empty(b, g, pairs, d) for _ in range(2)]
    with counted() as selection:
        found = ops.select_op._init_fn(scores, starts, carry_scores, positions, k, k, 4 * k, 128)
    tau, visible, from_, until, number, _, _, alive = found
    inputs = (
        query, key, value, scores, *carry_pairs, carry_scores, tau, visible, from_, until, number, alive, starts, k,
        gate, d**-0.5,
    )  # fmt: skip
    with counted() as forward:
        out, lse = ops.attention_op._init_fn(*inputs)
    with counted() as backward:
        ops.attention_backward_op._init_fn(torch.empty_like(out), out, lse, *inputs)
    return {"selection": selection, "forward": forward, "backward": backward}


def main() -> None:
    for length in map(int, sys.argv[1:]):
        for carry in (False, True):
            for part, seen in count(length, carry=carry).items():
                kinds = {
                    kind: sum(x for name, x in seen.items() if name.startswith(kind)) for kind in ("triton", "torch")
                }
                print(f"n = {length}, {'carry' if carry else 'no carry'}, {part}: {kinds}, {dict(seen)}")


if __name__ == "__main__":
    main()
