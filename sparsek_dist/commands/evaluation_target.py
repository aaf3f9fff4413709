"""What `sparsek eval` evaluates: a run with the text it has held out, or a model's folder with a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from sparsek_dist.attention.exchange import Exchange
from sparsek_dist.commands.trained import read_run
from sparsek_dist.config import AttentionConfig, DataConfig, ParallelConfig
from sparsek_dist.data.sources import load_documents, texts
from sparsek_dist.errors import CheckpointError, ConfigError
from sparsek_dist.evaluation.perplexity import BYTES
from sparsek_dist.models.export import tokenizer_beside
from sparsek_dist.models.positions import trained_length
from sparsek_dist.models.pretrained import is_sparsek, read_spec, saved_attention
from sparsek_dist.models.sharing import least_shard
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.rendezvous import Ranks, discover
from sparsek_dist.relations import short_shards
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
    weights: Path
    """Folder of the model, which is loaded when all else is known to be right."""
    spec: Any
    """transformers' config of it."""
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
    backend: str = "auto"
    ranks: Ranks = field(default_factory=Ranks)
    """Who this process is; all ranks share each sequence."""
    least_shard: int = 1
    """Tokens of a sequence that a rank must hold at least."""
    exchange: Exchange = "auto"
    timeout: timedelta = timedelta(minutes=ParallelConfig().timeout_minutes)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.ranks.rank == 0


def open_target(folder: Path, *, data: str | None, length: int | None, out: Path | None) -> Target:
    """A run with the text it has held out or with `data`; or a model's folder, with `data`.

    No weight is read and no process group made: what cannot work is told before ranks wait for each other.

    Raises:
        CheckpointError: if the folder holds neither.
        ConfigError: for a length that the model has no positions for, or a model that so many ranks cannot share.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give that of a run or of a model")
    ranks = discover()
    if ranks.rank > 0:
        # Rank 0 says it for all.
        logger.setLevel(logging.ERROR)
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        return _open_model(folder, ranks, data=data, length=length, out=out or folder)
    run = read_run(folder)
    config = run.config
    settings = _with(config.data, path=data, sequence_length=length)
    check_length(run.spec, settings.sequence_length, "--length")
    return Target(
        name=folder.name,
        weights=run.weights,
        spec=run.spec,
        tokenizer=run.tokenizer,
        tokenizer_name=config.data.tokenizer,
        data=settings,
        out=out or folder,
        given_data=data is not None,
        run=folder if out is None else None,
        seed=config.run.seed,
        step=int(newest_model(folder).parent.name.removeprefix("step-")),
        batch_size=config.train.micro_batch_size,
        backend=config.attention.backend,
        ranks=ranks,
        least_shard=_least_shard(run.spec, run.weights, ranks),
        exchange=config.parallel.exchange,
        timeout=timedelta(minutes=config.parallel.timeout_minutes),
    )


def _open_model(folder: Path, ranks: Ranks, *, data: str | None, length: int | None, out: Path) -> Target:
    spec = read_spec(folder)
    if tokenizer_beside(folder) is None:
        raise CheckpointError(f"{folder} holds no tokenizer: put that of the model beside it")
    tokenizer = load_tokenizer(str(folder))
    is_bytes = tokenizer.get_vocab() == load_tokenizer(BYTES).get_vocab()
    length = length or min(LONGEST_DEFAULT, trained_length(spec))
    check_length(spec, length, "--length")
    return Target(
        name=folder.name,
        weights=folder,
        spec=spec,
        tokenizer=load_tokenizer(BYTES) if is_bytes else tokenizer,
        tokenizer_name=BYTES if is_bytes else str(folder),
        data=_with(DataConfig(), path=data or "", sequence_length=length),
        out=out,
        given_data=data is not None,
        ranks=ranks,
        least_shard=_least_shard(spec, folder, ranks),
    )


def _least_shard(spec: Any, folder: Path, ranks: Ranks) -> int:
    attention = AttentionConfig(kind="full")
    if is_sparsek(spec):
        attention, _ = saved_attention(spec, source=f"{folder}/config.json")
    return least_shard(spec, attention, degree=ranks.world_size, told="the number of processes")


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


def check_length(spec: Any, length: int, option: str) -> None:
    """Rotary positions go on beyond what was trained, if badly; learned ones do not exist."""
    known, trained = spec.max_position_embeddings, trained_length(spec)
    if length <= known:
        if length > trained:
            logger.warning("%s = %d exceeds the %d tokens of the contexts it was trained on", option, length, trained)
        return
    if getattr(spec, "rope_parameters", None) is None:
        raise ConfigError(f"{option} = {length} exceeds the {known} positions that the model has learned: use fewer")
    logger.warning("%s = %d exceeds the %d positions that the model was made for", option, length, known)


def check_shards(target: Target, length: int, option: str) -> None:
    """Raises ConfigError if the ranks would hold shards shorter than the model's window."""
    degree = target.ranks.world_size
    told = f"{option} = {length} over {degree} processes, the sequence-parallel degree,"
    if problem := short_shards(length, degree, target.least_shard, told=told):
        raise ConfigError(problem)
