"""Times one generated token of a whole model, and counts the cache's bytes, after pasts of growing length.

    python benchmarks/generation.py                     # CPU: 4 layers, k = w = 64, after 1k, 10k and 100k tokens
    python benchmarks/generation.py --lengths 1000 8000 --dense
    python benchmarks/generation.py --device cuda --dense --out results       # 16 layers, k = w = 512, 4k to 1M tokens

A random Llama reads that many tokens in pieces; then one more token is timed many times, the lengths taking turns, as
`generate` calls the model: no CUDA graph. `--dense` times the model before its conversion as well, with transformers'
growing cache; on a GPU that cache is filled with random numbers, since a dense model would read for minutes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from machine import describe, in_words, save
from report import print_table
from sparsek_dist import sparsify
from sparsek_dist.models.cache import cache_bytes

SIZES = {
    "cpu": {
        "vocab_size": 257,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "cuda": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
PIECES = {"cpu": 4096, "cuda": 1 << 16}
LENGTHS = {"cpu": [1000, 10_000, 100_000], "cuda": [1 << 12, 1 << 15, 1 << 18, 1 << 20]}
BUDGETS = {"cpu": 64, "cuda": 512}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    model: str
    past: int
    milliseconds: float | None
    cache_bytes: int
    seconds_to_read: float | None
    note: str = ""


def build(device: str, *, budget: int | None) -> Any:
    """The model: dense, or with k = w = budget."""
    torch.manual_seed(0)
    spec = AutoConfig.for_model("llama", **SIZES[device], max_position_embeddings=1 << 21)
    model = AutoModelForCausalLM.from_config(spec, attn_implementation="sdpa").eval().to(device, DTYPES[device])
    return model if budget is None else sparsify(model, num_selected=budget, window=budget)


def read(model: Any, length: int) -> DynamicCache:
    """The cache after `length` random tokens."""
    device = model.device.type
    cache, generator = DynamicCache(config=model.config), torch.Generator().manual_seed(1)
    for start in range(0, length, PIECES[device]):
        tokens = torch.randint(0, 257, (1, min(PIECES[device], length - start)), generator=generator)
        model.model(tokens.to(model.device), past_key_values=cache)
    return cache


def invent(model: Any, length: int) -> DynamicCache:
    """A dense model's cache of that size, of random numbers."""
    spec, cache = model.config, DynamicCache(config=model.config)
    shape = (1, spec.num_key_value_heads, length, spec.hidden_size // spec.num_attention_heads)
    for layer in range(spec.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)), layer)
    return cache


def measure(model: Any, name: str, lengths: list[int], steps: int, *, one_by_one: bool) -> list[Row]:
    """The lengths take turns, unless their caches are too large to be held together."""
    groups = [[length] for length in lengths] if one_by_one else [lengths]
    return [row for group in groups for row in _measure(model, name, group, steps)]


def _measure(model: Any, name: str, lengths: list[int], steps: int) -> list[Row]:
    gpu = model.device.type == "cuda"
    invented = gpu and name == "dense"
    caches, took_to_read, times = {}, {}, {length: [] for length in lengths}
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        for length in lengths:
            start = time.perf_counter()
            caches[length] = invent(model, length) if invented else read(model, length)
            _wait(gpu)
            took_to_read[length] = None if invented else time.perf_counter() - start
        for _ in range(steps):
            for length, cache in caches.items():
                start = time.perf_counter()
                model(token, past_key_values=cache)
                _wait(gpu)
                times[length].append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        return [Row(name, length, None, 0, None, f"out of memory: {error}"[:80]) for length in lengths]
    rows = [
        Row(name, n, 1e3 * statistics.median(times[n]), cache_bytes(cache), took_to_read[n])
        for n, cache in caches.items()
    ]
    caches.clear()
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return rows


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def report(rows: list[Row], title: str) -> None:
    cells = [
        (row.model, f"{row.past:,}", "-" if row.milliseconds is None else f"{row.milliseconds:.2f}",
         f"{row.cache_bytes:,}", "-" if row.seconds_to_read is None else f"{row.seconds_to_read:.1f}", row.note)
        for row in rows
    ]  # fmt: skip
    headings = ("", "past", "ms per token", "cache, bytes", "s to read the past", "note")
    print_table(title, headings, cells, left=("", "note"), width=120)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--budget", type=int, help="k and w")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for generation.json")
    parser.add_argument("--commit", help="to be written into the results where there is no git")
    parser.add_argument("--seconds", type=float, default=300, help="after which no further model is begun")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    chosen = options()
    device = chosen.device
    lengths, budget = chosen.lengths or LENGTHS[device], chosen.budget or BUDGETS[device]
    machine, rows, begin = describe(device, chosen.commit), [], time.perf_counter()
    for name in ("sparsek", "dense") if chosen.dense else ("sparsek",):
        if time.perf_counter() - begin > chosen.seconds:
            rows += [Row(name, length, None, 0, None, "not run: out of time") for length in lengths]
            continue
        model = build(device, budget=budget if name == "sparsek" else None)
        million = sum(x.numel() for x in model.parameters()) / 1e6
        rows += measure(model, name, lengths, chosen.steps, one_by_one=device == "cuda" and name == "dense")
        title = (
            f"one token of one text: Llama of {model.config.num_hidden_layers} layers, {million:.0f} M parameters, "
            f"k = w = {budget}, {DTYPES[device]}\n{in_words(machine)}"
        )
        if chosen.out:
            result = {"machine": machine, "sizes": SIZES[device], "budget": budget}
            save(chosen.out / "generation.json", result | {"rows": [asdict(row) for row in rows]})
        del model
    report(rows, title)


if __name__ == "__main__":
    main()
