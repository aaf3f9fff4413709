"""Selective recall: facts stand once in the first half of a context of noise, and are asked for ever after.

A fact is two tokens: a marker, then one that stands for a key and its value together. A question is two tokens: another
marker, then the key; its label is the value, which is never an input. So one layer can solve it (find the fact of this
key, tell its value), which a tiny model learns in minutes. Facts are fewer than k: who keeps them, and nothing
else, can answer everything. The only targets are the answers. After MQAR (Arora et al. 2023, arXiv 2312.04927) [ours].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.scales import Task
from sparsek_dist.data.loader import Batch
from sparsek_dist.data.packing import IGNORED
from sparsek_dist.models.families import attention_modules
from sparsek_kernels import Budget, select

SLOT = 4
"""Tokens from one fact or question to the next."""
VALUES, NOISE = 8, 32


@dataclass(frozen=True)
class Questions:
    """Contexts with, at each question, where its fact stands: int64 [b, n], -1 elsewhere."""

    batch: Batch
    source: Tensor

    @property
    def distances(self) -> Tensor:
        """[questions] tokens from the fact to the question, in the order of `labels[labels >= 0]`."""
        asked = self.source >= 0
        index = torch.arange(self.source.shape[1]).expand_as(self.source)
        return (index - self.source)[asked]


def num_facts(task: Task) -> int:
    return 3 * task.window // 4


def vocab_size(task: Task) -> int:
    keys = 2 * num_facts(task)
    return 2 + keys + NOISE + keys * VALUES


def questions(task: Task, *, size: int, seed: tuple[int, ...]) -> Questions:
    """`size` contexts, the same for the same seed. A fact is asked for only once it has left the window."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((size, task.length), dtype=np.int64)
    labels, source = np.full_like(ids, IGNORED), np.full_like(ids, -1)
    for row in range(size):
        ids[row], labels[row], source[row] = _context(task, draw)
    positions = np.arange(task.length)[None].repeat(size, axis=0)
    batch = Batch(*(torch.from_numpy(x) for x in (ids, labels, positions)))
    return Questions(batch, torch.from_numpy(source))


def _context(task: Task, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels and source [n] of one context. Tokens: 2 markers, keys, noise, facts."""
    facts = num_facts(task)
    first_noise = 2 + 2 * facts
    ids = first_noise + draw.integers(NOISE, size=task.length)
    labels, source = np.full(task.length, IGNORED), np.full(task.length, -1)
    # An answer is a value alone: the first VALUES noise tokens serve as the values' names.
    keys, values = draw.permutation(2 * facts)[:facts], draw.integers(VALUES, size=facts)
    slots = np.arange(0, task.length - SLOT + 1, SLOT)
    told = np.sort(draw.permutation(len(slots) // 2)[:facts])
    places = slots[told] + 1
    ids[places - 1], ids[places] = 0, first_noise + NOISE + keys * VALUES + values
    for slot in np.delete(slots, told):
        known = np.flatnonzero(places + task.window <= slot + 1)
        if len(known) > 0:
            fact = draw.choice(known)
            ids[slot], ids[slot + 1] = 1, 2 + keys[fact]
            labels[slot + 1], source[slot + 1] = first_noise + values[fact], places[fact]
    return ids, labels, source


@torch.no_grad()
def score(model: Any, test: Questions, task: Task) -> dict[str, Any]:
    """What became of the questions, overall and by distance; all numbers are means over questions.

    `accuracy`; `loss` in nats; and per layer, except for dense attention, `kept`: whether some KV head still sees the
    asked fact, and `support`: pairs with a gate above 0, as a multiple of k.

    Args:
        model: in evaluation mode.
        test: all in one batch.
    """
    batch, source = test.batch.to(model.device), test.source.to(model.device)
    logits, scores = _run(model, batch)
    asked = source >= 0
    answers, labels = logits[asked].float(), batch.labels[asked]
    measures = {"accuracy": (answers.argmax(-1) == labels).double()}
    measures["loss"] = torch.nn.functional.cross_entropy(answers, labels, reduction="none").double()
    for layer, (budget, values) in enumerate(scores):
        measures |= {f"{name}_{layer}": value for name, value in _selection(values, budget, source).items()}
    # The bin of a distance: the largest of 1x, 2x, .. 16x the window that it reaches.
    edges = torch.tensor(task.distances)
    bins = (torch.bucketize(test.distances, edges, right=True) - 1).to(model.device)
    means: dict[str, Any] = {name: float(value.mean()) for name, value in measures.items()}
    for name, value in measures.items():
        means[f"{name}_by_distance"] = [float(value[bins == i].mean()) for i in range(len(edges))]
    return means


def _run(model: Any, batch: Batch) -> tuple[Tensor, list[tuple[Budget, Tensor]]]:
    """Logits [b, n, v], and each layer's budget and scores [b, n, g]; no scores of dense layers."""
    scores: list[tuple[Budget, Tensor]] = []
    hooks = [
        module.scorer.register_forward_hook(
            lambda *call, budget=module.parallel_attention.budget: scores.append((budget, call[-1]))
        )
        for module in attention_modules(model)
        if hasattr(module, "scorer")
    ]
    try:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, scores


def _selection(scores: Tensor, budget: Budget, source: Tensor) -> dict[str, Tensor]:
    """For each question whether its fact is visible to some head, and how large the support is: float64 [questions]."""
    b, n, heads = scores.shape
    chosen = select(
        scores.transpose(1, 2),
        num_selected=budget.num_selected,
        window=budget.window,
        support=budget.support,
        document_start=torch.zeros_like(source),
    )
    until = chosen.visible_until[..., -n:]
    index = torch.arange(n, device=source.device)
    seen = until.gather(-1, source.clamp_min(0).unsqueeze(1).expand(b, heads, n)) > index
    asked = source >= 0
    sizes = chosen.support_size.double().mean(dim=1) / max(budget.num_selected, 1)
    return {"kept": seen.any(dim=1).double()[asked], "support": sizes[asked]}
