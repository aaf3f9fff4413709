"""How a trained run is opened: in one process, without DeepSpeed and without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsek_dist.config import Config, from_yaml
from sparsek_dist.errors import CheckpointError
from sparsek_dist.models.pretrained import is_sparsek, load_dense, load_pretrained, read_spec
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.training.checkpoint_names import newest_model
from sparsek_dist.training.manifest import find_damage
from sparsek_dist.training.run_folder import CONFIG_FILE


def load_run(folder: Path) -> tuple[Config, Any, Any]:
    """Settings, model (evaluation mode, on the GPU if there is one) and tokenizer of a run's newest checkpoint.

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
    model: Any = load_pretrained(weights, backend=config.attention.backend) if is_sparsek(spec) else load_dense(weights)
    # Evaluation sees whole contexts; generation asks for its cache.
    model.config.use_cache = False
    return config, model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
