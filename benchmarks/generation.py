"""Times one generated token, and counts the cache's bytes, after a past of 1k, 10k and 100k tokens.

    python benchmarks/generation_cpu.py                     # k = w = 64
    python benchmarks/generation_cpu.py --lengths 1000 8000 --dense

A random Llama of 4 layers reads that many tokens in pieces; then one more token is timed many times, the lengths taking
turns. `--dense` times the model before its conversion as well, with transformers' growing cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from sparsek_dist import sparsify
from sparsek_dist.models.cache import cache_bytes

PIECE = 4096
SIZES = {
    "vocab_size": 257,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 20,
}


def build(*, budget: int | None) -> Any:
    """The model: dense, or with k = w = budget."""
    torch.manual_seed(0)
    spec = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(spec, attn_implementation="sdpa").eval()
    return model if budget is None else sparsify(model, num_selected=budget, window=budget)


def read(model: Any, length: int) -> DynamicCache:
    """The cache after `length` random tokens."""
    cache, generator = DynamicCache(config=model.config), torch.Generator().manual_seed(1)
    for start in range(0, length, PIECE):
        tokens = torch.randint(0, 257, (1, min(PIECE, length - start)), generator=generator)
        model.model(tokens, past_key_values=cache)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--budget", type=int, default=64, help="k and w")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()

    title = f"one token of one text: Llama of 4 layers, h8 g2 d32, {torch.get_num_threads()} threads"
    table = Table(title=f"{title}, torch {torch.__version__}")
    for heading in ("", "past", "ms per token", "cache, bytes"):
        table.add_column(heading, justify="right")
    with torch.no_grad():
        for name, budget in [("sparsek", options.budget), *([("dense", None)] if options.dense else [])]:
            model, token = build(budget=budget), torch.zeros(1, 1, dtype=torch.long)
            caches = {length: read(model, length) for length in options.lengths}
            times: dict[int, list[float]] = {length: [] for length in caches}
            for _ in range(options.steps):
                for length, cache in caches.items():
                    start = time.perf_counter()
                    model(token, past_key_values=cache)
                    times[length].append(time.perf_counter() - start)
            for length, cache in caches.items():
                took = 1000 * statistics.median(times[length])
                table.add_row(name, f"{length:,}", f"{took:.2f}", f"{cache_bytes(cache):,}")
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
