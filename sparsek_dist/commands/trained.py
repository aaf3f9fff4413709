"""How a trained run is opened: without DeepSpeed's engine and without pickle, in one process or shared by several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsek_dist.attention.awareness import refuse_unaware_layers
from sparsek_dist.attention.exchange import Exchange
from sparsek_dist.config import Config
from sparsek_dist.errors import CheckpointError
from sparsek_dist.models.pretrained import is_sparsek, load_dense, load_pretrained, read_spec
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.models.ulysses import install_ulysses
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.settings import from_yaml
from sparsek_dist.training.checkpoint_names import newest_model
from sparsek_dist.training.manifest import find_damage
from sparsek_dist.training.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class Trained:
    """The newest checkpoint of a run; its weights are read by `open_model`."""

    config: Config
    weights: Path
    """Folder of the model."""
    spec: Any
    """transformers' config of it."""
    tokenizer: Any


def read_run(folder: Path) -> Trained:
    """All of a run's newest checkpoint that can be told without loading its weights, which are checked for damage.

    Raises:
        CheckpointError: if the folder holds no run, or the weights do not fit its settings.
    """
    settings = folder / CONFIG_FILE
    if not settings.is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it holds no {CONFIG_FILE}")
    config = from_yaml(settings.read_text(encoding="utf-8"))
    weights = newest_model(folder)
    damage = find_damage(weights.parent, RankGroup(), below=f"{weights.name}/")
    if damage:
        raise CheckpointError(f"{weights.parent} is damaged: {damage[0]}. Delete it to use an older one")
    # The built-in tokenizer is rebuilt; others are read from the checkpoint, so the hub is not needed again.
    tokenizer = load_tokenizer("bytes" if config.data.tokenizer == "bytes" else str(weights))
    spec = read_spec(weights)
    if is_sparsek(spec) != (config.attention.kind != "full"):
        raise CheckpointError(f"{weights} does not fit {settings}: it was written by another version")
    return Trained(config, weights, spec, tokenizer)


def load_run(folder: Path) -> tuple[Config, Any, Any]:
    """Settings, model (evaluation mode, on the GPU if there is one) and tokenizer of a run's newest checkpoint.

    Raises:
        CheckpointError: as `read_run`, and if the weights cannot be loaded.
    """
    run = read_run(folder)
    model = open_model(run.weights, run.spec, backend=run.config.attention.backend)
    return run.config, model.to("cuda" if torch.cuda.is_available() else "cpu"), run.tokenizer


def open_model(
    weights: Path, spec: Any, *, backend: str = "auto", group: RankGroup | None = None, exchange: Exchange = "auto"
) -> Any:
    """A folder's model with the attention its config names, in evaluation mode, on the CPU.

    Args:
        spec: transformers' config of it.
        group: ranks that share every sequence, each giving the model its shard; None for one process.
        exchange: how their summaries travel.

    Raises:
        CheckpointError: if the weights cannot be loaded.
        ConfigError: if the model cannot share a sequence.
    """
    group = group or RankGroup()
    if is_sparsek(spec):
        model: Any = load_pretrained(weights, backend=backend, group=group, exchange=exchange)
    else:
        model = load_dense(weights)
        if group.size > 1:
            install_ulysses(model, group)
    if group.size > 1:
        refuse_unaware_layers(model)
    # Evaluation sees whole contexts; generation asks for its cache.
    model.config.use_cache = False
    return model
