"""`sparsek sparsify`: a pretrained dense model in, the same weights with SPARSEK attention out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sparsek_dist.config import load
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.export import check_new, export_folder, tokenizer_beside
from sparsek_dist.models.families import attention_modules
from sparsek_dist.models.pretrained import fetch, load_dense, sparsify


def sparsify_folder(
    name: str, out: Path, overrides: Sequence[str], *, seed: int, attention_dropout_off: bool, dtype: str
) -> None:
    """Writes a converted model into a new folder.

    Args:
        name: folder or hub id of the dense model.
        out: a folder that does not exist, or is empty.
        overrides: `attention.key=value`.
        dtype: of the weights; `auto` is as they are.
    """
    other = [word for word in overrides if not word.startswith("attention.")]
    if other:
        raise ConfigError(f"{other[0]!r} is not about the attention: for instance attention.num_selected=256")
    settings = asdict(load(None, overrides).attention)
    check_new(out)
    folder = fetch(name)
    model = load_dense(folder, dtype=dtype)
    before = sum(parameter.numel() for parameter in model.parameters())
    sparsify(model, seed=seed, attention_dropout="off" if attention_dropout_off else "refuse", **settings)
    tokenizer = tokenizer_beside(folder)
    export_folder(model, tokenizer, out)

    kinds = [module.layer_kind for module in attention_modules(model)]
    added = sum(parameter.numel() for parameter in model.parameters()) - before
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{out}: {model.config.model_type}, {before:,} parameters as they were, {added:,} added for scores")
    console.print("layers: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
    if tokenizer is None:
        console.print("no tokenizer: the model's folder has none")
    console.print("The scores are random until they are trained: fine-tune next, with model.source set to this folder")
