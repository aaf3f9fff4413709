"""SIMULATES the time of one attention layer, forward and backward, for 2 to 1024 ranks that share one sequence.

    python benchmarks/scaling.py --sparse-us-per-token 1.5 --dense-ps-per-pair 3 --plot scaling.png
    python benchmarks/scaling.py --measured results/two_gpus.json results/attention.json

A link model (latency and bandwidth, one pair inside a machine, another between machines) and two figures of one rank:

    --sparse-us-per-token   SPARSEK attention, forward + backward, microseconds per token of a shard
    --dense-ps-per-pair     dense attention, forward + backward, picoseconds per visible pair of tokens

Give them by hand, or take them, and the link inside a machine, from what benchmarks/two_gpus.py and attention.py wrote
(what is given by hand wins). Where a file holds times of several GPUs, they are printed beside the simulation's.

Assumed: no exchange is hidden behind work, except in ring attention, where the next block travels behind the current
one; dense attention is perfectly balanced; collectives move one message after another over the slowest link in use.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from machine import Heads
from report import print_table
from scaling_measured import Measured, read
from sparsek_dist.attention.exchange import resolve_exchange

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

    def returned_bytes(self, method: str) -> int:
        """Gradients of a summary, without positions. A gather's are summed, and so travel, in float32 at least."""
        width = max(self.pair_bytes, 4) if method == "all_gather" else self.pair_bytes
        return self.kv_heads * (2 * self.head_dim * self.num_selected * width + 4 * self.support)

    @property
    def halo_bytes(self) -> int:
        return self.kv_heads * (self.window - 1) * (2 * self.head_dim * self.pair_bytes + 4)


def seconds(method: str, p: int, layer: Layer, near: Link, far: Link, per_host: int) -> float:
    """One layer, forward and backward, on the slowest rank; NaN where the method cannot run."""
    link = near if p <= per_host else far
    shard = layer.length / p
    if method in ("all_gather", "scan"):
        if shard < layer.window:
            return math.nan
        rounds = p - 1 if method == "all_gather" else math.ceil(math.log2(p))
        summaries = (layer.summary_bytes, layer.returned_bytes(method))
        # Scores and pairs are messages of their own. What hides behind the selection is not taken off.
        exchange = sum(link.seconds(layer.halo_bytes) + link.seconds(rounds * x, 2 * rounds) for x in summaries)
        return shard * layer.sparse_seconds_per_token + exchange
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
        # Ulysses lies under ring attention while neither waits for its exchange.
        style = {"linewidth": 5, "alpha": 0.4} if method == "ulysses" else {}
        axes.plot(DEGREES, [1000 * times[method, p] for p in DEGREES], marker="o", label=method, **style)
    ideal = 1000 * times["scan", DEGREES[0]] * DEGREES[0]
    axes.plot(DEGREES, [ideal / p for p in DEGREES], linestyle=":", color="grey", label="scan, if exchange were free")
    axes.set(xscale="log", yscale="log", xlabel="ranks that share the sequence", ylabel="milliseconds per layer")
    axes.set_xscale("log", base=2)
    axes.set_title(f"SIMULATION, not measured\n{title}", fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def simulate(layer: Layer, near: Link, far: Link, per_host: int) -> dict[tuple[str, int], float]:
    return {(m, p): seconds(m, p, layer, near, far, per_host) for m in METHODS for p in DEGREES}


def report(times: dict[tuple[str, int], float], layer: Layer, title: str) -> None:
    rows = []
    for p in DEGREES:
        cells = ["-" if math.isnan(times[m, p]) else f"{1000 * times[m, p]:,.2f}" for m in METHODS]
        work = layer.length / p * layer.sparse_seconds_per_token
        rows.append((f"{p:,}", *cells, f"{100 * (1 - work / times['scan', p]):.0f} %"))
    heading = f"SIMULATION, not measured: milliseconds per layer, forward + backward\n{title}"
    print_table(heading, ("ranks", *METHODS, "share of exchange in scan"), rows, width=100)


def check(measured: Measured, layer: Layer, near: Link) -> None:
    """The simulation beside what was measured on the GPUs of one machine."""
    rows = []
    for kind, tokens, p, milliseconds in measured.shared:
        method = "ulysses" if kind == "full" else resolve_exchange("auto", p)
        expected = 1000 * seconds(method, p, replace(layer, length=tokens * p), near, near, p)
        rows.append((f"{p}", method, f"{tokens:,}", f"{milliseconds:.2f}", f"{expected:.2f}",
                     f"{expected / milliseconds:.2f}"))  # fmt: skip
    if rows:
        headings = ("ranks", "method", "tokens per rank", "measured, ms", "simulated, ms", "simulated / measured")
        print_table(f"the simulation against {measured.where}", headings, rows, width=100)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", type=Path, nargs="+", default=[], metavar="FILE", help="results to take them from"
    )
    parser.add_argument("--sparse-us-per-token", type=float)
    parser.add_argument("--dense-ps-per-pair", type=float)
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens of the sequence")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--budget", type=int, default=1024, help="k and w; S = 4 k")
    parser.add_argument("--pair-bytes", type=int, default=2)
    parser.add_argument("--per-host", type=int, default=8, help="ranks of one machine")
    parser.add_argument("--near", type=float, nargs=2, help="seconds, bytes/s in a machine (30e-6 250e9)")
    parser.add_argument("--far", type=float, nargs=2, default=(40e-6, 25e9), help="seconds, bytes/s between machines")
    parser.add_argument("--plot", help="file to write the picture to")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    heads = Heads(chosen.query_heads, chosen.kv_heads, chosen.head_dim)
    measured = read(chosen.measured, heads, chosen.budget)
    sparse = chosen.sparse_us_per_token or measured.sparse_us_per_token
    dense = chosen.dense_ps_per_pair or measured.dense_ps_per_pair
    if sparse is None or dense is None:
        sys.exit(f"give --sparse-us-per-token and --dense-ps-per-pair, or --measured with {heads.name} in it")
    layer = Layer(
        length=chosen.length,
        query_heads=heads.h,
        kv_heads=heads.g,
        head_dim=heads.d,
        num_selected=chosen.budget,
        window=chosen.budget,
        support=4 * chosen.budget,
        pair_bytes=chosen.pair_bytes,
        sparse_seconds_per_token=1e-6 * sparse,
        dense_seconds_per_pair=1e-12 * dense,
    )
    latency, bandwidth = chosen.near or measured.near or (30e-6, 250e9)
    near, far = Link(latency=latency, bandwidth=bandwidth), Link(latency=chosen.far[0], bandwidth=chosen.far[1])
    times = simulate(layer, near, far, chosen.per_host)
    title = (
        f"{layer.length:,} tokens, {heads.name}, k = w = {chosen.budget}, {chosen.per_host} ranks per machine\n"
        f"{sparse:.3g} us per token, {dense:.3g} ps per pair; in a machine {1e6 * latency:.0f} us, "
        f"{bandwidth / 1e9:.0f} GB/s, between machines {1e6 * far.latency:.0f} us, {far.bandwidth / 1e9:.0f} GB/s"
    )
    report(times, layer, title)
    check(measured, layer, near)
    if chosen.plot:
        plot(times, title).savefig(chosen.plot, dpi=150)


if __name__ == "__main__":
    main()
