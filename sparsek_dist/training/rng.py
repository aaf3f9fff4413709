"""The state of every random generator of one process, as a file of plain tensors.

DeepSpeed saves none of it, and hands every rank the client state of rank 0 on three of its four ZeRO stages; so each
rank writes a file of its own.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsek_dist.errors import CheckpointError


def save_random_state(path: Path, device: torch.device) -> None:
    """Writes the states of torch (CPU, and this process's GPU), Python and NumPy."""
    _, words, gauss = random.getstate()
    numpy_state = numpy.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    state: dict[str, Tensor] = {
        "torch_cpu": torch.get_rng_state(),
        "python_words": torch.tensor(words, dtype=torch.int64),
        # Empty where the generator holds no second normal number back.
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy_keys": torch.from_numpy(numpy_state["state"]["key"].astype(numpy.int64)),
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["torch_cuda"] = torch.cuda.get_rng_state(device)
    save_file(state, str(path))


def load_random_state(path: Path, device: torch.device) -> None:
    """Restores what `save_random_state` wrote.

    Raises:
        CheckpointError: if the file holds no state for this kind of device.
    """
    state = load_file(str(path))
    if ("torch_cuda" in state) != (device.type == "cuda"):
        made_on, now = ("a CPU", "a GPU") if device.type == "cuda" else ("a GPU", "a CPU")
        raise CheckpointError(f"{path} was written on {made_on}, but this process uses {now}: resume on {made_on}")
    torch.set_rng_state(state["torch_cpu"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python_words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy_keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["torch_cuda"], device)


def seed_random_state(seed: int, rank: int, step: int) -> None:
    """New streams for every rank, of which none is that of another rank or step."""
    mixed = int(numpy.random.SeedSequence((seed, rank, step)).generate_state(1)[0])
    random.seed(mixed)
    numpy.random.seed(mixed)
    torch.manual_seed(mixed)
