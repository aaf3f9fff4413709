"""A toy language model and its batches, for tests of the training side that need no attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsek_dist.attention.scorer import ScoringNetwork
from sparsek_dist.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from sparsek_dist.parallel.layout import shard
from sparsek_dist.parallel.loss import IGNORE

VOCABULARY = 17


@dataclass
class Output:
    logits: Tensor


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def shard(self, rank: int, degree: int) -> Batch:
        return Batch(*(shard(x, rank, degree) for x in (self.input_ids, self.labels, self.position_ids)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device) for x in (self.input_ids, self.labels, self.position_ids)))


class ToyModel(nn.Module):
    """Each token predicts the next from itself and its position: no communication between shards.

    If `scored`, a scorer says how much of the token is seen.
    """

    def __init__(self, *, dropout: float = 0.0, scored: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.position = nn.Parameter(torch.ones(8))
        self.hidden = nn.Linear(8, 12)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(12, VOCABULARY, bias=False)
        self.scorer = ScoringNetwork(8, 2, std=1.0, slope=0.0) if scored else None

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Output:
        x = self.embed(input_ids)
        if self.scorer is not None:
            x = x * self.scorer(x, position_ids).sigmoid().sum(dim=-1, keepdim=True).to(x.dtype)
        phase = torch.sin(position_ids.to(x.dtype) / 3).unsqueeze(-1)
        return Output(self.head(self.dropout(torch.tanh(self.hidden(x + self.position * phase)))))


class ToyLoader:
    """Random tokens, a pure function of (seed, step, micro-batch, data rank); labels very unevenly left out."""

    def __init__(self, config: Config) -> None:
        self.seed, self.length = config.run.seed, config.data.sequence_length

    def micro_batch(self, step: int, micro: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> Batch:
        index = (step * 64 + micro) * data_degree + data_rank
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        tokens = torch.randint(VOCABULARY, (micro_batch_size, self.length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
        # Nearly all of the first half: the first shard of two has few targets, the second many.
        labels[:, 1 : self.length // 2 - index % 3] = IGNORE
        positions = torch.arange(self.length).expand(micro_batch_size, -1)
        return Batch(tokens[:, :-1].contiguous(), labels, positions)


def toy_config(*, zero_stage: int = 0, sequence_degree: int = 1, **train) -> Config:
    config = Config(
        data=DataConfig(sequence_length=16),
        parallel=ParallelConfig(zero_stage=zero_stage, sequence_degree=sequence_degree),
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
    )
    return replace(config, train=TrainConfig(**({"steps": 6} | train)))


def seeded_model(seed: int = 5, *, dropout: float = 0.0, scale: float = 1.0, scored: bool = False) -> ToyModel:
    """The same weights for the same seed; `scale` multiplies those of the head, and so the gradients of the rest."""
    torch.manual_seed(seed)
    model = ToyModel(dropout=dropout, scored=scored)
    with torch.no_grad():
        model.head.weight *= scale
    return model
