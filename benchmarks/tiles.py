"""Times the attention kernels with the shipped tiles and with others, and holds the gradients against each other.

    python benchmarks/tiles.py                            # h32 g8 d128, k = w = 1024, 131072 tokens, bfloat16
    python benchmarks/tiles.py --shapes 8,8,128 16,4,256 --n 65536
    TRITON_INTERPRET=1 python benchmarks/tiles.py --tiny  # no GPU: does it run? Its times mean nothing.

Every candidate changes one kernel's tile. `forward` is the one for all GPUs, also where Hopper has another (d = 64 and
128). Printed for each: median milliseconds of that kernel in one pass, registers and spilled bytes of a thread as the
driver reports them, and the largest difference of any gradient from that of the shipped tiles, over the gradient's
largest entry: rounding, 0.01 in bfloat16, and no more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparsek_kernels import sparsek_attention
from sparsek_kernels.gpu import attention
from sparsek_kernels.gpu import call as calls
from sparsek_kernels.gpu.tiles import Tile, Tiles, is_hopper, tiles_for

MOST_APART = 0.02
# By widest head and kernel: rows, columns, warps, stages; query-major ones: gated columns, too.
CANDIDATES: dict[int, dict[str, list[tuple[int, ...]]]] = {
    128: {
        "forward": [(128, 64, 8, 2), (64, 64, 4, 3)],
        "grad_query": [(128, 64, 8, 2, 16), (128, 32, 8, 3, 16), (64, 64, 4, 2, 16)],
        "grad_selected": [(32, 128, 8, 2), (16, 64, 4, 2), (16, 64, 4, 3), (32, 64, 8, 2)],
        "grad_window": [(32, 128, 8, 3), (16, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2)],
    },
    # Only tiles of 64 keys (rows, in the query-major kernels) let the compiler use Hopper's own matrix products well.
    # (64, 64, ...) and dq's (128, 32, ...) do not fit GPUs before it.
    256: {
        "forward": [(128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2)],
        "grad_query": [(64, 32, 8, 2, 16), (64, 64, 8, 2, 16), (128, 32, 8, 2, 16)],
        "grad_selected": [(32, 32, 8, 2), (16, 64, 8, 3), (32, 64, 8, 2), (32, 64, 8, 3)],
        "grad_window": [(64, 64, 8, 2), (32, 64, 8, 3), (16, 64, 8, 3)],
    },
}
GATES = ("straight_through", "value")


class Stopwatch:
    """Stands in for a kernel: launches it, times each launch, keeps what the driver says of it."""

    def __init__(self, kernel: Any, device: str) -> None:
        self.kernel, self.device = kernel, device
        self.stamps: list[tuple[Any, Any]] = []
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: object, **constants: object) -> None:
            begin = self._stamp()
            self.compiled = self.kernel[grid](*args, **constants)
            self.stamps.append((begin, self._stamp()))

        return launch

    def _stamp(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Milliseconds of all launches since the last call."""
        stamps, self.stamps = self.stamps, []
        if self.device == "cpu":
            return 1e3 * sum(end - begin for begin, end in stamps)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in stamps)


def with_tile(tiles: Tiles, kernel: str, numbers: tuple[int, ...]) -> Tiles:
    return replace(tiles, **{kernel: Tile(*numbers)})


def measure(kernel: str, tiles: Tiles, inputs: list[Tensor], grad: Tensor, args: argparse.Namespace) -> tuple:
    """Median milliseconds of the kernel, registers, spilled bytes, and the gradients."""
    watch = Stopwatch(getattr(attention, f"{kernel}_kernel"), inputs[0].device.type)
    samples = []
    with (
        mock.patch.object(calls, "tiles_for", lambda *_, **__: tiles),
        mock.patch.object(attention, "hopper_forward_applies", lambda call: False),
        mock.patch.object(attention, f"{kernel}_kernel", watch),
    ):
        for _ in range(args.rounds + 1):
            out = sparsek_attention(*inputs, num_selected=args.k, window=args.k, gate=args.gate, backend="triton")
            grads = torch.autograd.grad(out, inputs, grad)
            samples.append(watch.read())
    registers, words = (getattr(watch.compiled, name, None) for name in ("n_regs", "n_spills"))
    return statistics.median(samples[1:]), registers, None if words is None else 4 * words, grads


def furthest(grads: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference over the largest entry, of the gradient where that is largest; NaN if anything is."""
    apart = [(x - y).abs().max().float() / y.abs().max().float() for x, y in zip(grads, expected, strict=True)]
    return float(torch.stack(apart).max())


def shape(text: str) -> tuple[int, int, int]:
    h, g, d = map(int, text.split(","))
    return h, g, d


def compare(h: int, g: int, d: int, args: argparse.Namespace) -> bool:
    """Prints the table of one shape; whether all gradients agree."""
    device, dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    inputs = [torch.randn(1, args.n, x, d, device=device, dtype=dtype, requires_grad=True) for x in (h, g, g)]
    inputs.append(torch.randn(1, args.n, g, device=device, requires_grad=True))
    grad, agree = torch.randn_like(inputs[0]), True
    shipped = tiles_for(d, h // g, dtype.itemsize, hopper=is_hopper(grad.device), gate=args.gate)
    candidates = CANDIDATES[128 if d <= 128 else 256]
    print(f"h{h} g{g} d{d}, k = w = {args.k}, {args.n} tokens, {dtype}, gate {args.gate}")
    titles = ("kernel", "rows, columns, warps, stages", "ms", "registers", "spilled", "apart")
    print("  {:14s} {:30s} {:>9s} {:>9s} {:>8s} {:>9s}".format(*titles))
    for kernel in args.kernels:
        expected: tuple[Tensor, ...] = ()
        for numbers in [(), *candidates[kernel][: 1 if args.tiny else None]]:
            name = str(numbers) if numbers else "shipped"
            try:
                ms, registers, spilled, grads = measure(
                    kernel, with_tile(shipped, kernel, numbers) if numbers else shipped, inputs, grad, args
                )
            except Exception as error:  # a tile may need more shared memory than there is; others may not
                if not numbers:
                    raise
                print(f"  {kernel:14s} {name:30s} failed: {error!r}"[:118], flush=True)
                continue
            expected = expected or grads
            apart = furthest(grads, expected)
            agree &= apart <= MOST_APART
            print(f"  {kernel:14s} {name:30s} {ms:9.3f} {registers!s:>9s} {spilled!s:>8s} {apart:9.2g}", flush=True)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(32, 8, 128)], metavar="H,G,D")
    parser.add_argument("--n", type=int, default=131072)
    parser.add_argument("--k", type=int, default=1024, help="selected pairs, and window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES[128], default=list(CANDIDATES[128]))
    parser.add_argument("--gate", choices=GATES, default=GATES[0], help="with straight_through dq sums keys, too")
    parser.add_argument("--tiny", action="store_true", help="on the CPU in Triton's interpreter")
    args = parser.parse_args()
    if args.tiny:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--tiny runs in Triton's interpreter: set TRITON_INTERPRET=1")
        args.shapes, args.n, args.k, args.rounds = [(2, 1, 16)], 40, 8, 1
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; without one: TRITON_INTERPRET=1 python benchmarks/tiles.py --tiny")
    if not all([compare(*heads, args) for heads in args.shapes]):
        raise SystemExit(f"error: gradients differ by more than {MOST_APART}")


if __name__ == "__main__":
    main()
