"""How well a model predicts held-out text: loss, perplexity and bits per byte, summed exactly over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsek_dist.data.loader import Batch
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import DataError
from sparsek_dist.parallel.comm import all_reduce_sum
from sparsek_dist.parallel.head import token_losses
from sparsek_dist.parallel.loss import IGNORE, count_targets
from sparsek_dist.parallel.mesh import Mesh

BYTES = "bytes"
"""The tokenizer whose tokens below 256 are bytes."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluated text; the same on every rank."""

    nats: float
    targets: float
    bytes: float
    """Bytes of text that the targets stand for; see `byte_counter`."""

    @property
    def loss(self) -> float:
        """Mean cross entropy per target, in nats."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the loss."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def bytes_per_target(store: TokenStore) -> float:
    """Bytes of text behind one target, on average over a split; a document's first token is never a target."""
    return store.num_bytes / (store.num_tokens - store.num_documents)


def byte_counter(tokenizer: str, store: TokenStore) -> Callable[[Tensor], Tensor]:
    """Labels [b, s] -> bytes of text that their targets stand for, as a float64 scalar; see `label_bytes`."""
    of_each = label_bytes(tokenizer, store)
    return lambda labels: of_each(labels).sum()


def label_bytes(tokenizer: str, store: TokenStore) -> Callable[[Tensor], Tensor]:
    """Labels [b, s] -> bytes of text behind each target, float64 [b, s]; 0 where there is no target.

    Exact for the built-in byte tokenizer. For others a token's bytes depend on its neighbours, so the split's mean is
    taken for each: exact when the whole split is evaluated.
    """
    if tokenizer == BYTES:
        return lambda labels: ((labels >= 0) & (labels < 256)).double()
    ratio = bytes_per_target(store)
    return lambda labels: (labels != IGNORE).double() * ratio


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    count_bytes: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Evaluation:
    """Evaluates `model` on this rank's share of the batches; every rank must call it, with as many batches.

    Args:
        model: a model or a DeepSpeed engine; left in the mode it was in.
        batches: whole sequences [b, n]; each rank of a sequence-parallel group gives the same and keeps its shard.
        mesh: the ranks.
        count_bytes: from `byte_counter`.
        device: where the model is.

    Raises:
        DataError: if the batches hold no target.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for whole in batches:
            batch = whole.shard(mesh.sequence.rank, mesh.sequence.size).to(device)
            nats = token_losses(model, batch.input_ids, batch.position_ids, batch.labels).double().sum()
            sums += torch.stack([nats, count_targets(batch.labels), count_bytes(batch.labels)])
    finally:
        model.train(was_training)
    nats, targets, num_bytes = all_reduce_sum(sums, mesh.world).tolist()
    if targets == 0 or num_bytes == 0:
        raise DataError("the held-out text holds nothing to predict: raise data.held_out, or use a larger data.path")
    return Evaluation(nats, targets, num_bytes)
