"""SIMULATES the time of one attention layer, forward and backward, for 2 to 1024 ranks that share one sequence.

    python benchmarks/scaling.py --sparse-us-per-token 1.5 --dense-ps-per-pair 3 --plot scaling.png

Nothing here is measured: a link model (latency and bandwidth, one pair inside a machine, another between machines) and
two figures of your own, from a benchmark of one rank:

    --sparse-us-per-token   SPARSEK attention, forward + backward, microseconds per token of a shard
    --dense-ps-per-pair     dense attention, forward + backward, picoseconds per visible pair of tokens

Assumed: no exchange is hidden behind work, except in ring attention, where the next block travels behind the current
one; dense attention is perfectly balanced; collectives move one message after another over the slowest link in use.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

DEGREES = [2**i for i in range(1, 11)]
METHODS = ("all_gather", "scan", "ulysses", "ring")


@dataclass(frozen=True, kw_only=True)
class Link:
    latency: float
    """Seconds before a message's first byte."""
    bandwidth: float
    """Bytes per second that a rank receives."""

    def seconds(self, num_bytes: float, messages: int = 1) -> float:
        """Of `messages` messages one after another, with `num_bytes` in all."""
        return messages * self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Layer:
    length: int
    """n: tokens of the sequence, over all ranks."""
    query_heads: int
    kv_heads: int
    head_dim: int
    num_selected: int
    window: int
    support: int
    pair_bytes: int
    """Per number of a key or value."""
    sparse_seconds_per_token: float
    dense_seconds_per_pair: float

    @property
    def summary_bytes(self) -> int:
        """What a shard leaves behind: k pairs; S scores and positions of 4 bytes each."""
        return self.kv_heads * (2 * self.head_dim * self.num_selected * self.pair_bytes + 8 * self.support)

    @property
    def halo_bytes(self) -> int:
        return self.kv_heads * (self.window - 1) * (2 * self.head_dim * self.pair_bytes + 4)


def seconds(method: str, p: int, layer: Layer, near: Link, far: Link, per_host: int) -> float:
    """One layer, forward and backward, on the slowest rank; NaN where the method cannot run.

    Backward passes receive what forward passes do (positions, a small part of a summary, are counted too).
    """
    link = near if p <= per_host else far
    shard = layer.length / p
    if method in ("all_gather", "scan"):
        if shard < layer.window:
            return math.nan
        rounds = p - 1 if method == "all_gather" else math.ceil(math.log2(p))
        exchange = link.seconds(layer.halo_bytes) + link.seconds(rounds * layer.summary_bytes, rounds)
        return shard * layer.sparse_seconds_per_token + 2 * exchange
    dense = layer.length**2 / 2 / p * layer.dense_seconds_per_pair
    token_bytes = layer.head_dim * layer.pair_bytes
    if method == "ulysses":
        if layer.kv_heads % p:
            return math.nan
        heads = 2 * layer.query_heads + 2 * layer.kv_heads
        return dense + 2 * link.seconds(heads * token_bytes * shard * (p - 1) / p, 4 * (p - 1))
    # Ring: p - 1 blocks of keys and values forward; backward their gradients travel, too.
    block = 2 * layer.kv_heads * token_bytes * shard
    return sum(
        dense * share / p + (p - 1) * max(dense * share / p, link.seconds(factor * block))
        for share, factor in ((1 / 3, 1), (2 / 3, 2))
    )


def plot(times: dict[tuple[str, int], float], title: str) -> Figure:
    """Seconds over degree, both logarithmic."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        axes.plot(DEGREES, [1000 * times[method, p] for p in DEGREES], marker="o", label=method)
    ideal = 1000 * times["scan", DEGREES[0]] * DEGREES[0]
    axes.plot(DEGREES, [ideal / p for p in DEGREES], linestyle=":", color="grey", label="scan, if exchange were free")
    axes.set(xscale="log", yscale="log", xlabel="ranks that share the sequence", ylabel="milliseconds per layer")
    axes.set_xscale("log", base=2)
    axes.set_title(f"SIMULATION, not measured\n{title}", fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse-us-per-token", type=float, required=True)
    parser.add_argument("--dense-ps-per-pair", type=float, required=True)
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens of the sequence")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--budget", type=int, default=1024, help="k and w; S = 4 k")
    parser.add_argument("--pair-bytes", type=int, default=2)
    parser.add_argument("--per-host", type=int, default=8, help="ranks of one machine")
    parser.add_argument("--near", type=float, nargs=2, default=(30e-6, 250e9), help="seconds, bytes/s in a machine")
    parser.add_argument("--far", type=float, nargs=2, default=(40e-6, 25e9), help="seconds, bytes/s between machines")
    parser.add_argument("--plot", help="file to write the picture to")
    return parser.parse_args()


def main() -> None:
    options = _options()
    layer = Layer(
        length=options.length,
        query_heads=options.query_heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        num_selected=options.budget,
        window=options.budget,
        support=4 * options.budget,
        pair_bytes=options.pair_bytes,
        sparse_seconds_per_token=1e-6 * options.sparse_us_per_token,
        dense_seconds_per_pair=1e-12 * options.dense_ps_per_pair,
    )
    near, far = (Link(latency=values[0], bandwidth=values[1]) for values in (options.near, options.far))
    times = {(m, p): seconds(m, p, layer, near, far, options.per_host) for m in METHODS for p in DEGREES}
    title = (
        f"{layer.length:,} tokens, h{layer.query_heads} g{layer.kv_heads} d{layer.head_dim}, k = w = {options.budget}, "
        f"{options.per_host} ranks per machine, {options.sparse_us_per_token:g} us per token, "
        f"{options.dense_ps_per_pair:g} ps per pair"
    )
    table = Table(title=f"SIMULATION, not measured: milliseconds per layer, forward + backward\n{title}")
    for heading in ("ranks", *METHODS, "share of exchange in scan"):
        table.add_column(heading, justify="right")
    for p in DEGREES:
        cells = ["-" if math.isnan(times[m, p]) else f"{1000 * times[m, p]:,.2f}" for m in METHODS]
        work = layer.length / p * layer.sparse_seconds_per_token
        table.add_row(f"{p:,}", *cells, f"{100 * (1 - work / times['scan', p]):.0f} %")
    Console(width=100).print(table)
    if options.plot:
        plot(times, title).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
