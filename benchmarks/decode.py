"""Times one decoding step of one attention layer: SPARSEK over its constant state against dense SDPA over a full cache.

    python benchmarks/decode.py --out results               # on a GPU: below 90 s
    python benchmarks/decode.py --out results --quick       # a few cells

On a CPU it times the PyTorch step, in float32, over states that were filled by as many tokens as it says.

On a GPU first checks outputs against float64. A measurement is one CUDA graph of many steps, each on a state (or cache)
of its own, as the layers of a model have: together larger than the L2 cache, so every step reads from memory. SPARSEK's
states are full and every step admits a pair and writes it. GB/s counts the keys and values read, and
is set against a measured device copy. Dense is the faster of cuDNN and flash, without the append to its cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from decode_cells import (
    BACKEND,
    DEVICE,
    DTYPE,
    GPU,
    Row,
    copy_bandwidth,
    dense_row,
    random_token,
    sparsek_row,
    tried,
)
from decode_report import report, save_all
from machine import Heads, add_options, describe
from sparsek_kernels import sparsek_attention
from sparsek_kernels.decode import decode_step, prefill


def check() -> bool:
    """Compares steps in bfloat16 with float64 attention over the whole past; prints what it finds."""
    torch.manual_seed(1)
    worst = {}
    for heads, gate in [(Heads(32, 8, 128), "straight_through"), (Heads(16, 16, 64), "key_value"),
                        (Heads(12, 4, 128), "value"), (Heads(7, 1, 96), "none")]:  # fmt: skip
        sizes = {"num_selected": 48, "window": 33, "support": 150}
        tokens = random_token(heads, 2, 260)
        tokens["scores"] = torch.randn(2, 260, heads.g, device=DEVICE)
        exact = {name: x.double() for name, x in tokens.items()}
        expected = sparsek_attention(**exact, gate=gate, **sizes, backend="torch")
        for past in (20, 220):
            head = {name: x[:, :past] for name, x in tokens.items() if name != "query"}
            states = {backend: prefill(**head, **sizes) for backend in (BACKEND, "torch")}
            for step in range(past, past + 40):
                token = {name: x[:, step : step + 1] for name, x in tokens.items()}
                for backend, state in states.items():
                    out = decode_step(**token, state=state, gate=gate, backend=backend)
                    error = float((out.double() - expected[:, step : step + 1]).abs().max())
                    key = (heads.name, gate, backend)
                    worst[key] = max(worst.get(key, 0.0), error if error == error else float("inf"))
            for name in ("selected_positions", "support_positions"):
                kept = [getattr(state, name).sort(dim=-1).values for state in states.values()]
                if not torch.equal(kept[0], kept[-1]):
                    worst[(heads.name, gate, BACKEND)] = float("inf")
    good = True
    for (heads, gate, backend), error in worst.items():
        fine = error < 3e-2
        good &= fine
        print(f"check {heads} {gate} {backend}: largest error against float64 {error:.1e} {'ok' if fine else 'WRONG'}")
    return good


@dataclass(frozen=True)
class Grid:
    shapes: list[Heads]
    budgets: list[int]
    batches: list[int]
    contexts: list[int]


def grid(quick: bool) -> Grid:
    if not GPU:
        return Grid([Heads(8, 2, 64)], [256], [1], [1000, 10_000] if quick else [1000, 10_000, 100_000])
    if quick:
        return Grid([Heads(32, 8, 128)], [512], [1, 64], [4096, 65536])
    return Grid([Heads(32, 8, 128), Heads(16, 16, 64)], [512, 1024], [1, 4, 16, 64], [4096, 32768, 262144, 1048576])


def sparsek_rows(cells: Grid) -> Iterator[Row]:
    """States as many tokens leave them, by context; on a GPU then full ones, of which every step admits a pair."""
    heads, last = cells.shapes[0], cells.contexts[-1]
    for budget in cells.budgets:
        for context in cells.contexts:
            yield sparsek_row(heads, 1, budget, context, prefilled=True)
    if not GPU:
        yield sparsek_row(heads, 1, cells.budgets[0], last, "key_value", prefilled=True)
        return
    for heads in cells.shapes:
        for budget in cells.budgets:
            for batch in cells.batches:
                yield sparsek_row(heads, batch, budget, last)
            for batch in sorted({cells.batches[0], cells.batches[-1]}):
                for gate in ("straight_through", "key_value"):
                    yield sparsek_row(heads, batch, budget, last, gate)
    yield from tried(cells.shapes[0], cells.budgets[0], cells.batches, last)


def dense_rows(cells: Grid, deadline: float) -> Iterator[Row]:
    """Once the time is up, cells are left out and say so."""
    size = int(min(torch.cuda.mem_get_info()[0] * 0.45, 18e9)) if GPU else 200_000_000
    pool = torch.empty(size // DTYPE.itemsize, device=DEVICE, dtype=DTYPE).normal_()
    for context in cells.contexts:
        for heads in cells.shapes:
            for batch in cells.batches:
                if time.perf_counter() > deadline:
                    yield Row(heads.name, batch, "dense", context, note="not run: out of time")
                else:
                    yield dense_row(heads, batch, context, pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=75)
    parser.add_argument("--quick", action="store_true", help="a few cells")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    good, machine = check(), describe(DEVICE, options.commit)
    bandwidth, cells = copy_bandwidth(), grid(options.quick)
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    sparse = list(sparsek_rows(cells))
    report(sparse, bandwidth, machine)
    print(f"SPARSEK done after {time.perf_counter() - begin:.0f} s", flush=True)
    # Saved before the dense part, which runs other people's kernels at the limit of the memory.
    save_all(sparse, bandwidth, good, machine, options.out)
    dense = list(dense_rows(cells, begin + options.seconds))
    report(dense, bandwidth, machine)
    save_all(sparse + dense, bandwidth, good, machine, options.out)
    print(f"all done after {time.perf_counter() - begin:.0f} s")
    sys.exit(0 if good else "the check against float64 failed")


if __name__ == "__main__":
    main()
