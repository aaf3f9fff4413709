"""Of two_gpus.py: how long messages, a layer and an optimizer step take at a fixed number of tokens per GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from machine import Heads
from sparsek_dist.attention.parallel import ParallelAttention
from sparsek_dist.attention.ulysses import UlyssesAttention
from sparsek_dist.config import AttentionConfig, Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from sparsek_dist.data.loader import Batch
from sparsek_dist.models import build_model
from sparsek_dist.parallel import links
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.training.engine import build_engine
from sparsek_dist.training.loop import train_step
from sparsek_dist.training.together import gather_objects
from sparsek_kernels import Budget
from two_gpus_lab import Lab, WithoutExchange

TOKENS = (1 << 15, 1 << 17, 1 << 19)
"""Per GPU."""
LONGEST_DENSE = 1 << 18
"""Tokens of a sequence, over all GPUs, above which dense attention is left out."""
LAYER = {"h": 32, "g": 8, "d": 128, "budget": Budget(1024, 1024, 4096, "straight_through")}
TINY_LAYER = {"h": 4, "g": 2, "d": 8, "budget": Budget(6, 5, 16, "straight_through")}
MODEL = ModelConfig(
    hidden_size=1024, intermediate_size=2816, num_layers=4, num_query_heads=8, num_kv_heads=2, head_dim=128
)
TINY_MODEL = ModelConfig(
    hidden_size=16, intermediate_size=32, num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=4
)
VOCABULARY = 512


def measure_links(lab: Lab) -> None:
    """Seconds on the slowest rank, by bytes that every rank has in the end."""
    sizes = [1 << i for i in (range(12, 30, 2) if lab.gpu else (12, 16))]
    for timings in zip(*gather_objects(links.measure_links(lab.device, sizes), lab.mesh(lab.size).world), strict=True):
        exchange = max(seconds for timing in timings for seconds in timing.exchange.values())
        gather = max(timing.all_gather for timing in timings)
        lab.add("links", {"num_bytes": timings[0].num_bytes, "all_gather": gather, "exchange": exchange})


def measure_layer(lab: Lab) -> None:
    for tokens in TOKENS if lab.gpu else (32,):
        if not lab.late():
            lab.add("layer", _layer(lab, tokens, dense=False))
            lab.forget()


def measure_training(lab: Lab) -> None:
    """On many GPUs also data-parallel: what is lost there is lost to the reduction of gradients."""
    for tokens in TOKENS if lab.gpu else (32,):
        for degree in (1, lab.size) if lab.size > 1 else (1,):
            if not lab.late():
                lab.add("training", _training(lab, tokens, degree, "sparsek"))


def measure_dense(lab: Lab) -> None:
    for tokens in TOKENS if lab.gpu else (32,):
        if tokens * lab.size <= LONGEST_DENSE and not lab.late():
            lab.add("layer", _layer(lab, tokens, dense=True))
            lab.forget()
            lab.add("training", _training(lab, tokens, lab.size, "full"))


def _layer(lab: Lab, tokens: int, *, dense: bool) -> dict[str, Any]:
    """Forward and backward; selection and score gradients included."""
    sizes, group = LAYER if lab.gpu else TINY_LAYER, lab.mesh(lab.size).sequence
    h, g, d = sizes["h"], sizes["g"], sizes["d"]
    torch.manual_seed(lab.rank)
    shapes = [(h, d), (g, d), (g, d)]
    leaves = [torch.randn(1, tokens, *x, device=lab.device, dtype=lab.dtype).requires_grad_() for x in shapes]
    positions = torch.arange(tokens, device=lab.device).unsqueeze(0) + lab.rank * tokens
    scale, grad = d**-0.5, torch.randn_like(leaves[0])
    if not dense:
        leaves.append(torch.randn(1, tokens, g, device=lab.device).requires_grad_())
        attention = ParallelAttention(sizes["budget"], group, lab.backend)
        attend = lambda: attention(*leaves, positions, scale=scale)  # noqa: E731
    elif lab.size > 1:
        ulysses = UlyssesAttention(group)
        attend = lambda: ulysses(*leaves, positions, scale=scale)  # noqa: E731
    else:
        attend = lambda: _alone(*leaves, scale=scale)  # noqa: E731
    row = {"kind": "full" if dense else "sparsek", "gpus": lab.size, "degree": lab.size, "tokens": tokens}
    row |= {"heads": Heads(h, g, d).name, "budget": sizes["budget"].num_selected}
    step = lambda: torch.autograd.grad(attend(), leaves, grad)  # noqa: E731
    return row | _times(lab, step, tokens, group.handle if not dense else None)


def _alone(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def _training(lab: Lab, tokens: int, degree: int, kind: str) -> dict[str, Any]:
    """An optimizer step on `tokens` random tokens per GPU."""
    if lab.gpu:
        torch.cuda.reset_peak_memory_stats()
    row = {"kind": kind, "gpus": lab.size, "degree": degree, "tokens": tokens}
    row |= _train(lab, training_config(lab, tokens, degree, kind))
    if lab.gpu:
        row["peak_gigabytes"] = lab.largest(torch.cuda.max_memory_allocated() / 1e9)
    # The engine is gone only now.
    gc.collect()
    lab.forget()
    return row


def _train(lab: Lab, config: Config) -> dict[str, Any]:
    mesh = lab.mesh(config.parallel.sequence_degree)
    model = build_model(config, mesh, vocab_size=VOCABULARY)
    engine = build_engine(model, config, mesh)
    batches = [_random_batch(mesh, config.data.sequence_length).to(lab.device)]
    tokens = config.data.sequence_length // mesh.sequence.size
    shares = config.attention.kind == "sparsek" and mesh.sequence.size > 1
    times = _times(
        lab,
        lambda: train_step(engine, batches, 0, config, mesh),
        tokens,
        mesh.sequence.handle if shares else None,
    )
    engine.destroy()
    return times | {"parameters": sum(x.numel() for x in model.parameters())}


def training_config(lab: Lab, tokens: int, degree: int, kind: str) -> Config:
    budget = 1024 if lab.gpu else 8
    return Config(
        model=MODEL if lab.gpu else TINY_MODEL,
        attention=AttentionConfig(kind=kind, num_selected=budget, window=budget),
        data=DataConfig(sequence_length=tokens * degree),
        parallel=ParallelConfig(sequence_degree=degree, zero_stage=2),
        train=TrainConfig(activation_checkpointing=True),
    )


def _random_batch(mesh: Mesh, n: int) -> Batch:
    """This rank's shard of one document of n tokens."""
    generator = torch.Generator().manual_seed(mesh.data_rank)
    stream = torch.randint(0, VOCABULARY, (1, n + 1), generator=generator)
    whole = Batch(stream[:, :-1], stream[:, 1:], torch.arange(n).unsqueeze(0))
    return whole.shard(mesh.sequence.rank, mesh.sequence.size)


def _times(lab: Lab, step: Callable[[], object], tokens: int, group: Any) -> dict[str, Any]:
    """With the exchange, and without it where there is one: the share of time that it costs."""
    repeats = max(3, min(10, (1 << 20) // tokens)) if lab.gpu else 2
    took = lab.milliseconds(step, repeats)
    row = {"milliseconds": took, "tokens_per_second": 1e3 * tokens / took}
    if group is not None:
        try:
            row["without_exchange"] = lab.milliseconds(_without_exchange(step, group), repeats)
        except AssertionError as error:
            lab.note(f"failed: the share of the exchange: {error}")
    return row


def _without_exchange(step: Callable[[], object], group: Any) -> Callable[[], None]:
    exchange = WithoutExchange(group)
    with exchange.keeping():
        step()

    def again() -> None:
        with exchange.replaying():
            step()

    return again
