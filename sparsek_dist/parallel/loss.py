"""The training and evaluation loss: the mean over ALL targets of an optimizer step, wherever they are.

A mean of per-rank means would weigh a rank with few targets like one with many. So each rank gives the sum over its
own targets, and the divisor is counted once over all ranks and micro-batches. A rank without targets gives exactly 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import Tensor

from sparsek_dist.parallel.comm import all_reduce_sum
from sparsek_dist.parallel.mesh import RankGroup

IGNORE = -100
"""Label of a position without a target: padding, and the last token of a document."""


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies [b, s] in nats and float32 (float64 for float64 logits); 0 where there is no target.

    Of logits in half precision no copy in float32 is made, but for some rows at a time: with a vocabulary of 128,000
    the three that torch would hold at once were most of the memory of a long shard. On CUDA DeepSpeed's Triton kernels
    read them once.

    Args:
        logits: [b, s, v].
        labels: [b, s], already shifted: labels[i] is the token after token i, or IGNORE.
    """
    rows, targets = logits.flatten(0, 1), labels.flatten()
    if rows.dtype in (torch.float16, torch.bfloat16):
        each = chunked_cross_entropy(rows, targets, ignore_index=IGNORE, reduction="none")
    else:
        each = F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="none")
    return each.view(labels.shape)


def count_targets(labels: Tensor) -> Tensor:
    """Number of targets, as a float64 scalar (exact up to 2^53, and every backend can sum it)."""
    return (labels != IGNORE).sum().double()


def step_targets(labels: list[Tensor], world: RankGroup) -> Tensor:
    """Targets of one optimizer step over all its micro-batches and all ranks; at least 1."""
    mine = torch.stack([count_targets(batch) for batch in labels]).sum()
    return all_reduce_sum(mine, world).clamp_min(1)


def engine_loss(nats: Tensor, targets: Tensor, *, world_size: int, accumulation_steps: int) -> Tensor:
    """What to give `engine.backward` so that the gradient is that of sum(nats) / targets.

    DeepSpeed divides gradients by the number of ranks and by the accumulation steps on every ZeRO stage, provided
    that it knows the sequence-parallel degree only by its number (training/engine.py); this multiplies both back.
    """
    return nats * (world_size * accumulation_steps / targets).to(nats.dtype)
