"""What `sparsek eval` evaluates: a run with the text it has held out, or a model's folder with a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsek_dist.commands.trained import load_run
from sparsek_dist.config import DataConfig
from sparsek_dist.data.sources import load_documents, texts
from sparsek_dist.errors import CheckpointError, ConfigError
from sparsek_dist.evaluation.perplexity import BYTES
from sparsek_dist.models.export import tokenizer_beside
from sparsek_dist.models.pretrained import is_sparsek, load_dense, load_pretrained, read_spec
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.training.checkpoint_names import newest_model
from sparsek_dist.training.run_folder import CONFIG_FILE

LONGEST_DEFAULT = 2048
"""Tokens of a context where neither a run nor the user says."""
_HAY_CHARACTERS = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What is evaluated, on what, and where the results go."""

    name: str
    model: Any
    tokenizer: Any
    tokenizer_name: str
    data: DataConfig
    out: Path
    given_data: bool
    """All of `data` is read, not the held-out part of a run's corpus."""
    run: Path | None = None
    seed: int = 0
    step: int = 0
    batch_size: int = 1


def open_target(folder: Path, *, data: str | None, length: int | None, out: Path | None) -> Target:
    """A run with the text it has held out or with `data`; or a model's folder, with `data`.

    Raises:
        CheckpointError: if the folder holds neither.
        ConfigError: for a length that the model has no positions for.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give that of a run or of a model")
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        return _open_model(folder, data=data, length=length, out=out or folder)
    config, model, tokenizer = load_run(folder)
    settings = _with(config.data, path=data, sequence_length=length)
    check_length(model, settings.sequence_length, "--length")
    return Target(
        name=folder.name,
        model=model,
        tokenizer=tokenizer,
        tokenizer_name=config.data.tokenizer,
        data=settings,
        out=out or folder,
        given_data=data is not None,
        run=folder if out is None else None,
        seed=config.run.seed,
        step=int(newest_model(folder).parent.name.removeprefix("step-")),
        batch_size=config.train.micro_batch_size,
    )


def _open_model(folder: Path, *, data: str | None, length: int | None, out: Path) -> Target:
    spec = read_spec(folder)
    if tokenizer_beside(folder) is None:
        raise CheckpointError(f"{folder} holds no tokenizer: put that of the model beside it")
    tokenizer = load_tokenizer(str(folder))
    is_bytes = tokenizer.get_vocab() == load_tokenizer(BYTES).get_vocab()
    model: Any = load_pretrained(folder) if is_sparsek(spec) else load_dense(folder)
    model.config.use_cache = False
    length = length or min(LONGEST_DEFAULT, spec.max_position_embeddings)
    check_length(model, length, "--length")
    return Target(
        name=folder.name,
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=load_tokenizer(BYTES) if is_bytes else tokenizer,
        tokenizer_name=BYTES if is_bytes else str(folder),
        data=_with(DataConfig(), path=data or "", sequence_length=length),
        out=out,
        given_data=data is not None,
    )


def documents(target: Target) -> Iterator[str]:
    return texts(load_documents(target.data))


def hay(target: Target) -> str:
    """The first documents, up to a million characters."""
    parts, size = [], 0
    for text in documents(target):
        parts.append(text)
        size += len(text)
        if size >= _HAY_CHARACTERS:
            break
    return "\n".join(parts)[:_HAY_CHARACTERS]


def _with(data: DataConfig, **changes: Any) -> DataConfig:
    return replace(data, **{name: value for name, value in changes.items() if value is not None})


def check_length(model: Any, length: int, option: str) -> None:
    """Rotary positions go on beyond what was trained, if badly; learned ones do not exist."""
    known = model.config.max_position_embeddings
    if length <= known:
        return
    if getattr(model.config, "rope_parameters", None) is None:
        raise ConfigError(f"{option} = {length} exceeds the {known} positions that the model has learned: use fewer")
    logger.warning("%s = %d exceeds the %d positions that the model was made for", option, length, known)
