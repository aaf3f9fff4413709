"""Continuing a checkpoint with another number of processes, through DeepSpeed's universal checkpoints.

DeepSpeed's own files are cut for the number of ranks that wrote them. Its converter puts every parameter and its
optimizer state back together, and every rank then takes what it holds now. The copy lies beside the checkpoints under
a hidden name, and goes with the next save.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsek_dist.errors import CheckpointError
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.training.checkpoint_names import PARTIAL, remove_partials
from sparsek_dist.training.together import barrier, together

logger = logging.getLogger(__name__)

CONVERTER = "deepspeed.checkpoint.ds_to_universal"
POLL_SECONDS = 0.5


def load_resized(engine: Any, checkpoint: Path, tag: str, world: RankGroup) -> str | None:
    """Loads the engine's part `checkpoint`/`tag`, written by another number of ranks. Every rank must call it.

    Returns:
        What `engine.load_checkpoint` does: None if there was nothing to load.

    Raises:
        CheckpointError: if DeepSpeed cannot convert it.
    """
    if engine.zero_optimization_stage() == 0:
        # Nothing is partitioned, so nothing needs to be put together.
        return engine.load_checkpoint(str(checkpoint), tag=tag)[0]
    whole = checkpoint.parent / f"{PARTIAL}whole-{checkpoint.name}"
    barrier(world)
    with together(world):
        if world.rank == 0:
            remove_partials(checkpoint.parent)
            whole.mkdir()
    logger.info(f"putting {checkpoint} together for {world.size} processes")
    with together(world):
        if world.rank == 0:
            try:
                _convert(checkpoint / tag, whole / tag)
            finally:
                (whole / "done").touch()
        else:
            # Not in a collective, which a long conversion would let time out.
            while not (whole / "done").exists():
                time.sleep(POLL_SECONDS)
    return _load_universal(engine, whole, tag)


def _convert(source: Path, target: Path) -> None:
    """In a process of its own: the converter starts others, which a process that holds a GPU must not fork."""
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(source), "--output_folder", str(target)]
    # ZeRO 1 and 2 do not write what the converter wants to know about tensor parallelism, of which there is none.
    result = subprocess.run([*command, "--inject_missing_state"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(
            f"{source} cannot be converted for another number of processes ({CONVERTER}: {lines[-1]}): continue it "
            "with as many processes as wrote it"
        )


def _load_universal(engine: Any, folder: Path, tag: str) -> str | None:
    # On ZeRO-3 DeepSpeed gives all groups the settings of the first, so that vectors would be decayed from here on.
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    # A setting of the engine, but it must hold for this one load only.
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, values in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(values)
    # ... and all parts one counter of steps, which each of them would then advance.
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    return loaded
