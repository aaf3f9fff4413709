"""Times the selection on the GPU, stage by stage, and holds it against the selection in torch.

    python benchmarks/selection.py                          # n = 131072 and 1048576, g = 8, k = w = 1024, S = 4096
    python benchmarks/selection.py --n 131072 --scores slope

Needs a CUDA device. Times are medians of CUDA events around each stage; with several groups of rows (long sequences)
a stage is the sum over the groups. `whole` is the call from outside: it holds the gaps between the stages too.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from sparsek_kernels.gpu import selection as gpu
from sparsek_kernels.gpu.selection import select_gpu
from sparsek_kernels.selection import Selection, select

STAGES = {
    "build_wavelet": "sort and tree",
    "_find_thresholds": "thresholds",
    "_find_intervals": "intervals",
    "_list_alive": "alive lists",
}


def make_scores(kind: str, heads: int, n: int) -> Tensor:
    """[1, g, n]: standard normal; or drifting by 1e-3 per token; or rising by 1 per token, so that all are evicted."""
    ramp = torch.arange(n, device="cuda", dtype=torch.float32)
    slope = {"random": 0.0, "drift": 1e-3, "slope": 1.0}[kind]
    return torch.randn(1, heads, n, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) + slope * ramp


def run(scores: Tensor, args: argparse.Namespace) -> Selection:
    """One document, nothing carried."""
    start = torch.zeros(1, scores.shape[-1], dtype=torch.int64, device="cuda")
    nothing = scores.new_empty(*scores.shape[:2], 0)
    return select_gpu(
        scores, start, nothing, nothing.long(), num_selected=args.k, window=args.window, support=args.support,
    )  # fmt: skip


class Stopwatch:
    """Wraps functions of a module and adds up the milliseconds that each takes on the device."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self.pairs[name].append((begin, end))
            return result

        return timed

    def read(self) -> dict[str, float]:
        torch.cuda.synchronize()
        times = {name: sum(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in self.pairs.items()}
        self.pairs.clear()
        return times


def measure(scores: Tensor, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Median milliseconds of each stage and of the whole; peak memory beyond the scores in bytes."""
    watch = Stopwatch()
    originals = {name: getattr(gpu, name) for name in STAGES}
    for _ in range(3):
        run(scores, args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(scores, args)
    peak = torch.cuda.max_memory_allocated() - before
    samples: dict[str, list[float]] = defaultdict(list)
    whole = watch.around("whole", run)
    for _ in range(args.rounds):
        whole(scores, args)
        samples["whole"].append(watch.read()["whole"])
    for name, function in originals.items():
        setattr(gpu, name, watch.around(name, function))
    for _ in range(args.rounds):
        run(scores, args)
        for name, milliseconds in watch.read().items():
            samples[name].append(milliseconds)
    for name, function in originals.items():
        setattr(gpu, name, function)
    return {name: statistics.median(values) for name, values in samples.items()}, peak


def check(args: argparse.Namespace, n: int = 8192) -> None:
    """Entries that differ from torch's, and the largest difference of tau; two runs must agree to the bit."""
    k, window = min(args.k, n // 16), min(args.window, n // 16)
    settings = argparse.Namespace(**{**vars(args), "k": k, "window": window, "support": 4 * k})
    scores = make_scores(args.scores, args.heads, n)
    found, again = run(scores, settings), run(scores, settings)
    expected = select(scores, num_selected=k, window=window, support=4 * k, chunk_size=128)
    alive = expected.alive - (4 * k + window - 1)
    print(f"against torch at n = {n}, k = w = {k}, S = {4 * k}, scores {args.scores}:")
    for name, field in vars(found).items():
        assert torch.equal(field, getattr(again, name)), f"{name}: two runs differ"
        other = getattr(expected, name)[..., -field.shape[-1] :]
        if name == "alive":
            field, other = field.sort(-1).values, alive.clamp_min(-1).sort(-1).values
        error = (field.double() - other.double()).nan_to_num(0, posinf=0, neginf=0).abs().max().item()
        print(f"  {name:18s} {int((field != other).sum())} of {field.numel()} differ, by at most {error:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--support", type=int, help="default: 4 k")
    parser.add_argument("--heads", type=int, default=8, help="KV heads g")
    parser.add_argument("--scores", choices=["random", "drift", "slope"], default="random")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    args.support = 4 * args.k if args.support is None else args.support
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    check(args)
    for n in args.n:
        times, peak = measure(make_scores(args.scores, args.heads, n), args)
        print(f"n = {n}, g = {args.heads}, k = {args.k}, w = {args.window}, S = {args.support}, scores {args.scores}")
        for name, label in {**STAGES, "whole": "whole"}.items():
            print(f"  {label:14s} {times[name]:8.3f} ms")
        print(f"  peak memory beyond the inputs {peak / 2**20:.0f} MiB, {peak / (n * args.heads):.0f} bytes per score")


if __name__ == "__main__":
    main()
