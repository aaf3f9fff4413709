"""Writes a model the way transformers does, so that it loads without DeepSpeed and without pickle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sparsek_dist.errors import CheckpointError
from sparsek_dist.models.lora import merged

ONE_FILE = "1000GB"
"""As `max_shard_size`: the weights stay one file."""

CARD = """# A model with {kind} attention

    from sparsek_dist import load_pretrained
    model = load_pretrained("{name}")

loads it as it is; `model.generate` then keeps a cache of constant size. transformers' own `from_pretrained` loads the
same weights with dense attention, and reports the scorers as unexpected. The settings are the `sparsek` entry of
config.json.
"""


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, state: dict[str, Tensor] | None, folder: Path
) -> None:
    """config.json, model.safetensors and the tokenizer, into an existing folder.

    Args:
        state: the whole model's state on the CPU, where `model` itself may hold only a part of it (ZeRO-3), or has
            low-rank updates, which are merged into the weights.
    """
    state = None if state is None else merged(model, state)
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _with_cache(model):
            model.save_pretrained(folder, state_dict=state, max_shard_size=ONE_FILE)
    finally:
        if was_enabled:
            logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """A new folder with a model, its tokenizer and a few words on how to load it: complete, or not there.

    Raises:
        CheckpointError: if the folder holds something already, or cannot be written.
    """
    check_new(folder)
    partial = folder.parent / f".partial-{folder.name}"
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        export_model(model, tokenizer, None, partial)
        entry = getattr(model.config, "sparsek", None)
        if entry is not None:
            (partial / "README.md").write_text(CARD.format(kind=entry["kind"], name=folder.name), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}): choose another --out") from error


def check_new(folder: Path) -> None:
    """Raises CheckpointError if a folder to be written holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: choose another --out, or remove it")


def tokenizer_beside(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's folder, whatever its kind; None where there is none."""
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from error


@contextmanager
def _with_cache(model: PreTrainedModel) -> Iterator[None]:
    """Training goes without a cache, but who loads the model wants one."""
    places = [place for place in (model.config, model.generation_config) if place is not None]
    before = [place.use_cache for place in places]
    for place in places:
        place.use_cache = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.use_cache = value
