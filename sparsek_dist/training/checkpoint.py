"""Checkpoints that are either complete and intact, or not chosen.

A checkpoint is written beside the others under a hidden name, listed in a manifest, flushed, and only then given its
name; the file `latest` follows last. Reading goes the other way: the manifest is compared before anything is loaded.

    checkpoints/latest                          name of the newest
    checkpoints/step-00000300/manifest.json     every file with size and SHA-256
                              state.json        step, tokens, world size, settings
                              engine/           DeepSpeed: weights and optimizer, per rank
                              rng/              random generators, per rank
                              model/            weights and tokenizer for eval and generate, without pickle
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsek_dist.config import Config
from sparsek_dist.errors import CheckpointError
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.training.checkpoint_names import (
    LATEST,
    MODEL,
    PARTIAL,
    candidates,
    check_space,
    remove_partials,
    rotate,
)
from sparsek_dist.training.compatibility import check_compatible, read_state, write_state
from sparsek_dist.training.engine import gather_weights
from sparsek_dist.training.manifest import (
    find_damage,
    flush_folder,
    hash_files,
    write_durably,
    write_manifest,
)
from sparsek_dist.training.resize import load_resized
from sparsek_dist.training.rng import load_random_state, save_random_state, seed_random_state
from sparsek_dist.training.together import barrier, gather_objects, together

logger = logging.getLogger(__name__)

ENGINE = "engine"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens read, over all ranks."""

    def after(self, tokens: int) -> Position:
        """One step later."""
        return Position(self.step + 1, self.tokens + tokens)


class Checkpoints:
    """The checkpoints folder of one run. Every method is called by every rank."""

    def __init__(
        self, folder: Path, config: Config, mesh: Mesh, export: Callable[[dict[str, Tensor], Path], None]
    ) -> None:
        """Args:
        folder: the run's `checkpoints`; all ranks must see the same one.
        config: the settings of this run, compared with those of a checkpoint before it is loaded.
        mesh: the ranks that write and read together.
        export: writes the whole model's state, on rank 0, into a folder from which it can be used without DeepSpeed.
        """
        self.folder, self._config, self._mesh, self._export = folder, config, mesh, export

    def find(self) -> Path | None:
        """The checkpoint to continue from, intact and made by settings that this run may continue; None to start.

        Raises:
            CheckpointError: if there is none and `must` wants one, one and `never` wants none, or if it is damaged
                or was made by other settings.
        """
        mode, world = self._config.train.resume, self._mesh.world
        names: list[str] = []
        with together(world):
            if self._mesh.is_main:
                names = _listed(self.folder)
        # What one rank sees, for all: a shared folder may show a new name earlier on one host than on another.
        names = gather_objects(names, world)[0]
        if mode == "never" and names:
            raise CheckpointError(
                f"{self.folder} holds {names[0]} already, and train.resume = never refuses to touch it: choose another "
                "run.name, or continue with train.resume=auto"
            )
        if mode == "must" and not names:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint, but train.resume = must wants one: check run.root and run.name, "
                "or start afresh with train.resume=auto"
            )
        if not names:
            return None
        chosen = self._first_intact(names)
        with together(world):
            check_compatible(chosen, read_state(chosen), self._config, world.size)
        return chosen

    def restore(self, engine: Any, checkpoint: Path) -> Position:
        """Loads what `find` chose: weights, optimizer, random generators.

        Raises:
            CheckpointError: if this rank's part is not there.
        """
        state, world = read_state(checkpoint), self._mesh.world
        resized = state.world_size != world.size
        if resized:
            loaded = load_resized(engine, checkpoint, ENGINE, world)
        else:
            loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE)
        with together(world):
            if loaded is None:
                raise CheckpointError(f"{checkpoint}: DeepSpeed finds nothing in {ENGINE}/: continue from an older one")
            if resized:
                # There is one random state per rank of then, which cannot be shared out among those of now.
                seed_random_state(self._config.run.seed, world.rank, state.step)
            else:
                load_random_state(self._random_file(checkpoint), engine.device)
        was = f", made by {state.world_size} processes and continued by {world.size}" if resized else ""
        logger.info(f"continuing from {checkpoint} after step {state.step}{was}")
        return Position(state.step, state.tokens)

    def save(self, engine: Any, position: Position) -> Path:
        """Writes a checkpoint, makes it the latest, and deletes those beyond `train.keep_checkpoints`.

        Raises:
            CheckpointError: if it cannot be written; the earlier ones stay as they were.
        """
        world, main = self._mesh.world, self._mesh.is_main
        final = self.folder / f"step-{position.step:08d}"
        partial = self.folder / (PARTIAL + final.name)
        with together(world), _writing(partial):
            if main:
                self._prepare(partial)
        with _writing(partial):
            # Its own `latest` would be written before the other ranks are done.
            engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
        weights = gather_weights(engine, self._mesh)
        with together(world), _writing(partial):
            save_random_state(self._random_file(partial), engine.device)
            if main:
                self._export(weights, partial / MODEL)
                write_state(partial, **asdict(position), world_size=world.size, config=self._config)
        barrier(world)
        with _writing(partial):
            entries = hash_files(partial, world)
        with together(world), _writing(partial):
            if main:
                write_manifest(partial, entries)
                self._commit(partial, final)
                rotate(self.folder, newest=final.name, keep=self._config.train.keep_checkpoints)
        return final

    def _first_intact(self, names: list[str]) -> Path:
        """The first of `names` that its manifest confirms; going on to another is told, and only `auto` may."""
        told = []
        for name in names:
            checkpoint = self.folder / name
            damage = find_damage(checkpoint, self._mesh.world)
            with together(self._mesh.world):
                _check_owner(checkpoint)
            if not damage:
                return checkpoint
            told.append(f"{checkpoint} is damaged: {'; '.join(damage[:3])}")
            if self._config.train.resume == "must":
                break
            logger.warning(f"{told[-1]}. Looking for an older one, because train.resume = auto")
        raise CheckpointError(
            ". ".join(told) + ". Restore the file from a copy, or delete that checkpoint's folder to continue from an "
            "older one or start afresh"
        )

    def _prepare(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self.folder)
        check_space(self.folder)
        for part in (partial, partial / "rng", partial / MODEL):
            part.mkdir()

    def _commit(self, partial: Path, final: Path) -> None:
        if final.exists():
            # From an attempt that was abandoned: this run came here again from an earlier checkpoint.
            final.rename(self.folder / f"{PARTIAL}replaced-{final.name}")
        partial.rename(final)
        flush_folder(self.folder)
        replacement = self.folder / (LATEST + ".new")
        write_durably(replacement, final.name + "\n")
        replacement.replace(self.folder / LATEST)
        flush_folder(self.folder)
        logger.info(f"saved {final}")

    def _random_file(self, checkpoint: Path) -> Path:
        return checkpoint / "rng" / f"rank-{self._mesh.world.rank:05d}.safetensors"


def _listed(folder: Path) -> list[str]:
    try:
        return candidates(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error}): make it readable, or choose another run.name"
        ) from error


def _check_owner(checkpoint: Path) -> None:
    """DeepSpeed's part is pickles: whoever can write them can run code as whoever loads them."""
    owner, me = checkpoint.stat().st_uid, os.geteuid()
    if me != 0 and owner not in (me, 0):
        raise CheckpointError(
            f"{checkpoint} belongs to user id {owner}, not to you, and loading it could run that user's code: copy it "
            "as yourself if you trust it"
        )


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turns a failed write into one clear message. torch reports a full disk without naming it, so it is looked up."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_write = isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
        if not is_write:
            raise
        free = shutil.disk_usage(partial.parent).free if partial.parent.exists() else 0
        raise CheckpointError(
            f"{partial.name} cannot be written in {partial.parent} ({str(error).splitlines()[0]}; {free:,} bytes are "
            "free there): make room or allow writing; earlier checkpoints are untouched"
        ) from error
