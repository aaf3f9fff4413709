"""`sparsek export`: the newest checkpoint of a run as a plain Hugging Face folder, whatever ZeRO stage trained it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from sparsek_dist.commands.trained import load_run
from sparsek_dist.models.export import check_new, export_folder


def export_run(folder: Path, out: Path, *, dtype: str) -> None:
    """Writes weights, config and tokenizer of a run into a new folder.

    Args:
        folder: of the run.
        out: a folder that does not exist, or is empty.
        dtype: of the weights, by its name in torch; `auto` is as they were trained.
    """
    check_new(out)
    config, model, tokenizer = load_run(folder)
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    export_folder(model.cpu(), tokenizer, out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{out}: {config.attention.kind} attention, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
