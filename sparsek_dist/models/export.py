"""Writes a model the way transformers does, so that it loads without DeepSpeed and without pickle."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

ONE_FILE = "1000GB"
"""As `max_shard_size`: the weights stay one file."""


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor], folder: Path
) -> None:
    """config.json, model.safetensors and the tokenizer, into an existing folder.

    Args:
        state: the whole model's state on the CPU; `model` itself may hold only a part of it (ZeRO-3).
    """
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=ONE_FILE)
    finally:
        if was_enabled:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
