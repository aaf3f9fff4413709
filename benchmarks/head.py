"""Memory and time of one training step with a large vocabulary: logits whole, and in tiles.

    python benchmarks/head.py           # two layers of width 2,048, 32,768 tokens, a vocabulary of 131,072, bfloat16
    python benchmarks/head.py --tiny    # no GPU: does it run?

Memory is the most that the step takes beyond the weights. The last columns hold the gradients against those of whole
logits in float32, by the norm of the difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig
from sparsek_dist.models.build import build_model
from sparsek_dist.parallel import head
from sparsek_dist.parallel.loss import IGNORE
from sparsek_dist.parallel.mesh import Mesh

REPEATS = 3


def whole(model: Any, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """As torch users write it: a float32 copy of all logits."""
    logits = model(input_ids=ids, position_ids=positions).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")


def step(model: Any, losses: Callable[..., Tensor], ids: Tensor) -> tuple[float, float]:
    """Milliseconds of the last of some steps, and GiB beyond the weights; gradients are left in the model."""
    labels = ids.roll(-1, 1).index_fill(1, torch.tensor(ids.shape[1] - 1, device=ids.device), IGNORE)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    on_gpu = ids.device.type == "cuda"
    for _ in range(REPEATS):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        before, began = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
        (losses(model, ids, positions, labels).sum() / ids.numel()).backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return 1e3 * seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0.0


def gradients(model: Any) -> list[Tensor]:
    """Of the head and of the embedding."""
    modules = (model.get_output_embeddings(), model.get_input_embeddings())
    return [module.weight.grad.float() for module in modules]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = "cpu" if tiny else "cuda"
    n, vocabulary, width, k, tile = (128, 500, 32, 32, 1 << 13) if tiny else (32768, 131072, 2048, 512, 1 << 28)
    shape = ModelConfig(
        hidden_size=width, intermediate_size=2 * width, num_layers=2, num_query_heads=width // 32 if tiny else 16,
        num_kv_heads=1 if tiny else 4, head_dim=32 if tiny else 128,
    )  # fmt: skip
    config = Config(
        model=shape, attention=AttentionConfig(num_selected=k, window=k), data=DataConfig(sequence_length=n)
    )
    torch.manual_seed(0)
    model: Any = build_model(config, Mesh(), vocab_size=vocabulary).to(device)
    model.to(torch.float32 if tiny else torch.bfloat16)
    ids = torch.randint(vocabulary, (1, n), device=device)
    print("logits                    ms      GiB   head  embedding", flush=True)
    exact: list[Tensor] = []
    for name, losses, at_once in (
        ("whole, float32 copy", whole, tile),
        ("whole, no copy", head.token_losses, n * vocabulary),
        ("tiles", head.token_losses, tile),
        ("tiles, four times", head.token_losses, 4 * tile),
    ):
        with mock.patch.object(head, "NUMBERS_AT_ONCE", at_once):
            milliseconds, memory = step(model, losses, ids)
        exact = exact or gradients(model)
        apart = [float((x - y).norm() / y.norm()) for x, y in zip(gradients(model), exact, strict=True)]
        print(f"{name:20} {milliseconds:7.0f} {memory:8.2f} {apart[0]:6.1e} {apart[1]:8.1e}", flush=True)


if __name__ == "__main__":
    main()
