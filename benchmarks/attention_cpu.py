"""Times one attention layer, forward and backward: the chunked SPARSEK path against dense SDPA, side by side.

    make bench                              # 2k, 4k, 8k, 16k tokens; h8 g2 d64, k = w = 256
    make bench ARGS='--lengths 2048 4096 --rounds 5'

Each round times every method at every length once, in an order that alternates, so that a slow moment of the machine
falls on both; the figure is the median of the rounds. The last column fits time ~ length^slope over all lengths.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsek_kernels import sparsek_attention

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def sparsek_layer(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, budget: int) -> Tensor:
    """k = w = budget, S = 4 k, gradients of the scores included."""
    return sparsek_attention(query, key, value, scores, num_selected=budget, window=budget, backend="torch")


def dense_layer(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, budget: int) -> Tensor:
    """torch's own causal attention over all pairs."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def seconds(layer: Callable[..., Tensor], length: int, budget: int) -> float:
    """Wall time of one forward and backward pass on fresh random inputs."""
    query = torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True)
    key, value = (torch.randn(1, length, KV_HEADS, HEAD_DIM, requires_grad=True) for _ in range(2))
    scores = torch.randn(1, length, KV_HEADS, requires_grad=True)
    start = time.perf_counter()
    layer(query, key, value, scores, budget).sum().backward()
    return time.perf_counter() - start


def slope(lengths: list[int], times: list[float]) -> float:
    """Least-squares exponent of time ~ length^slope."""
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in times]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--budget", type=int, default=256, help="k and w")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    layers = {"sparsek": sparsek_layer, "dense": dense_layer}
    times: dict[tuple[str, int], list[float]] = {}
    for layer in layers.values():  # the first call pays for start-up
        seconds(layer, options.lengths[0], options.budget)
    for round_ in range(options.rounds):
        for length in options.lengths:
            for name in list(layers)[:: 1 if round_ % 2 == 0 else -1]:
                times.setdefault((name, length), []).append(seconds(layers[name], length, options.budget))

    median = {key: statistics.median(values) for key, values in times.items()}
    table = Table(
        title=f"forward + backward of one layer, milliseconds: h{HEADS} g{KV_HEADS} d{HEAD_DIM}, "
        f"k = w = {options.budget}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for heading in ("", *(f"{length:,}" for length in options.lengths), "slope"):
        table.add_column(heading, justify="right")
    for name in layers:
        row = [median[name, length] for length in options.lengths]
        table.add_row(name, *(f"{1000 * t:.0f}" for t in row), f"{slope(options.lengths, row):.2f}")
    ratios = [median["dense", length] / median["sparsek", length] for length in options.lengths]
    table.add_row("dense / sparsek", *(f"{ratio:.2f}x" for ratio in ratios), "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
