"""What the selection does in each layer: statistics and a picture, from one extra forward pass without gradients.

Nothing of this stands on the training path: hooks read the scores of one batch, the ranks of a sequence-parallel group
put them together, and `sparsek_kernels.select` is asked once more, for the whole sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from sparsek_dist.models.families import attention_modules
from sparsek_dist.parallel.comm import gather
from sparsek_dist.parallel.layout import unshard
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_kernels import Budget, Selection, select

PICTURE_SIZE = 512
"""Rows and columns of the picture at most: longer sequences are sampled."""


@torch.no_grad()
def observe(
    model: Any, input_ids: Tensor, position_ids: Tensor, group: RankGroup
) -> tuple[dict[str, float], dict[str, Figure]]:
    """Statistics and pictures of the first sequence of a batch. Every rank of the group must call it.

    Args:
        model: a model with SPARSEK attention, or the engine around it.
        input_ids: [b, s] of this rank's shard; likewise position_ids.

    Returns:
        `selection/layer_00/...` -> number and -> figure; empty for a model without a selection.
    """
    layers = enumerate(attention_modules(getattr(model, "module", model)))
    chosen_layers = {i: module for i, module in layers if getattr(module, "layer_kind", "full") == "sparsek"}
    if not chosen_layers:
        return {}, {}
    modules = list(chosen_layers.values())
    budget: Budget = modules[0].parallel_attention.budget
    if budget.num_selected == 0:
        return {}, {}
    scores = _scores(model, modules, input_ids[:1], position_ids[:1], group)
    positions = unshard(list(gather(position_ids[:1].contiguous(), group, kind="observe"))).long()
    starts = torch.arange(positions.shape[1], device=positions.device) - positions
    numbers: dict[str, float] = {}
    figures: dict[str, Figure] = {}
    for index, layer in zip(chosen_layers, scores, strict=True):
        chosen = select(
            layer.transpose(1, 2),
            num_selected=budget.num_selected,
            window=budget.window,
            support=budget.support,
            document_start=starts,
        )
        name = f"selection/layer_{index:02d}"
        until = chosen.visible_until[0, :, -layer.shape[1] :]
        numbers |= {f"{name}/{key}": value for key, value in _statistics(chosen, until, budget).items()}
        figures[f"{name}/kept"] = _picture(until[0].cpu().numpy(), index, budget)
    return numbers, figures


def _scores(
    model: PreTrainedModel, modules: list[Any], input_ids: Tensor, position_ids: Tensor, group: RankGroup
) -> list[Tensor]:
    """Scores [1, n, g] of every layer, over the whole sequence."""
    caught: list[Tensor] = []
    hooks = [module.scorer.register_forward_hook(lambda *call: caught.append(call[-1])) for module in modules]
    training = model.training
    try:
        model.eval()
        model(input_ids=input_ids, position_ids=position_ids)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [unshard(list(gather(x.contiguous(), group, kind="observe"))) for x in caught]


def _statistics(chosen: Selection, until: Tensor, budget: Budget) -> dict[str, float]:
    """Means over the queries that have more than k candidates, hence soft gates at all.

    Args:
        until: [g, n], the first query that each key of the sequence is not visible to.
    """
    choosy = torch.isfinite(chosen.tau[0])
    if not bool(choosy.any()):
        return {}
    index = torch.arange(until.shape[-1], device=until.device)
    # Key j is selected at the ages w, w + 1, .., last: an arithmetic series.
    last = until - 1 - index
    count = (last - budget.window + 1).clamp_min(0)
    ages = count * (budget.window + last) / 2
    return {
        "support_size": float(chosen.support_size[0][choosy].float().mean()),
        "selected_mass": float(chosen.selected_mass[0][choosy].mean()) / budget.num_selected,
        "mean_age": float(ages.sum() / count.sum().clamp_min(1)),
        "support_reached_limit": float((chosen.support_size[0][choosy] >= budget.support).float().mean()),
    }


def _picture(until: np.ndarray, layer: int, budget: Budget) -> Figure:
    """Which positions are kept over time, for one KV head: row = query, column = key."""
    n = len(until)
    sampled = np.unique(np.linspace(0, n - 1, min(n, PICTURE_SIZE)).astype(int))
    query, key = sampled[:, None], sampled[None, :]
    visible = (key <= query) & (query < until[sampled][None, :])
    shade = np.where(visible, np.where(query - key < budget.window, 0.45, 1.0), 0.0)
    figure = Figure(figsize=(5.4, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shade, cmap="Blues", vmin=0, vmax=1, extent=(0, n, n, 0), interpolation="nearest", aspect="auto")
    axes.set_xlabel("key position (dark: selected, light: window)")
    axes.set_ylabel("query position, later queries below")
    axes.set_title(f"layer {layer}, KV head 0: what is kept over time")
    return figure
