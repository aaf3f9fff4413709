"""The checkpoints folder as names: which to try and in which order, and which to delete."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from sparsek_dist.errors import CheckpointError
from sparsek_dist.training.manifest import MANIFEST, list_files

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial-"
"""Begins the names of what is not, or no longer, a checkpoint."""
LATEST = "latest"
MODEL = "model"
SPARE_FACTOR = 1.2
"""Free space asked for before writing, as a multiple of the previous checkpoint."""


def newest_model(run_folder: Path) -> Path:
    """The folder with the weights of a run's newest checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    names = candidates(run_folder / "checkpoints")
    if not names:
        raise CheckpointError(f"{run_folder} holds no checkpoint: train it first with `sparsek train`")
    return run_folder / "checkpoints" / names[0] / MODEL


def candidates(folder: Path) -> list[str]:
    """Names of checkpoints in the order to try them: what `latest` says, then the others, newest first."""
    names = sorted(_steps(folder), key=_step_of, reverse=True)
    try:
        said = (folder / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        said = None
    except (OSError, UnicodeDecodeError) as error:
        said = f"({error})"
    if said in names:
        later = names.index(said)
        # Whatever is later was never committed: try it only when the rest has failed.
        return names[later:] + names[:later]
    if said is not None or names:
        reason = "is missing" if said is None else f"says {said[:80]!r}, which is not a checkpoint here"
        taken = f"taking the newest, {names[0]}" if names else "there is none to take"
        logger.warning(f"{folder / LATEST} {reason}: {taken}")
    return names


def _steps(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    # Links are never followed: neither loaded nor deleted.
    return [path.name for path in folder.iterdir() if STEP_NAME.fullmatch(path.name) and not path.is_symlink()]


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def rotate(folder: Path, *, newest: str, keep: int) -> None:
    """Deletes all but the `keep` newest complete checkpoints up to `newest`; later ones are of an abandoned attempt."""
    complete = sorted((name for name in _steps(folder) if (folder / name / MANIFEST).is_file()), key=_step_of)
    earlier = [name for name in complete if _step_of(name) < _step_of(newest)]
    keep_names = {newest, *earlier[len(earlier) - (keep - 1) :]}
    for name in _steps(folder):
        if name not in keep_names:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under its name.
            (folder / name).rename(folder / f"{PARTIAL}deleted-{name}")
    remove_partials(folder)


def remove_partials(folder: Path) -> None:
    """Deletes what an interrupted save or deletion left behind."""
    for path in folder.glob(PARTIAL + "*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def check_space(folder: Path) -> None:
    """Raises CheckpointError if the disk has no room for a checkpoint like the largest one here."""
    previous = [folder / name for name in _steps(folder)]
    sizes = [sum((path / file).stat().st_size for file in list_files(path)) for path in previous]
    needed, free = int(SPARE_FACTOR * max(sizes, default=0)), shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint needs about {needed:,} bytes, but only {free:,} are free: make room or lower "
            "train.keep_checkpoints; earlier checkpoints are untouched"
        )
