"""`sparsek sparsify`: a pretrained dense model in, the same weights with SPARSEK attention out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparsek_dist.errors import ConfigError
from sparsek_dist.models.distill import fit_scorers, start_scorers
from sparsek_dist.models.export import check_new, export_folder, tokenizer_beside
from sparsek_dist.models.families import attention_modules
from sparsek_dist.models.positions import trained_length
from sparsek_dist.models.pretrained import fetch, load_dense, sparsify
from sparsek_dist.settings import load

DISTILL_LENGTH, DISTILL_CONTEXTS = 1024, 64
"""Tokens of a context, at least, and contexts at most, that a first fit reads."""


def sparsify_folder(
    name: str,
    out: Path,
    overrides: Sequence[str],
    *,
    seed: int,
    attention_dropout_off: bool,
    dtype: str,
    distill: Path | None = None,
    distill_length: int | None = None,
) -> None:
    """Writes a converted model into a new folder.

    Args:
        name: folder or hub id of the dense model.
        out: a folder that does not exist, or is empty.
        overrides: `attention.key=value`.
        dtype: of the weights; `auto` is as they are.
        distill: a plain-text file; scorers then begin by what the dense model attends to in it.
        distill_length: tokens of the contexts that the model reads it in; more than the window.
    """
    other = [word for word in overrides if not word.startswith("attention.")]
    if other:
        raise ConfigError(f"{other[0]!r} is not about the attention: for instance attention.num_selected=256")
    settings = asdict(load(None, overrides).attention)
    if distill is None and distill_length is not None:
        raise ConfigError(f"--distill-length = {distill_length} fits nothing by itself: give a text with --distill")
    check_new(out)
    folder = fetch(name)
    model = load_dense(folder, dtype=dtype)
    tokenizer = tokenizer_beside(folder)
    before = sum(parameter.numel() for parameter in model.parameters())
    fitted = None if distill is None else _fit(model, tokenizer, distill, settings, distill_length)
    sparsify(model, seed=seed, attention_dropout="off" if attention_dropout_off else "refuse", **settings)
    if fitted is not None:
        start_scorers(model, fitted)
    export_folder(model, tokenizer, out)

    kinds = [module.layer_kind for module in attention_modules(model)]
    added = sum(parameter.numel() for parameter in model.parameters()) - before
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{out}: {model.config.model_type}, {before:,} parameters as they were, {added:,} added for scores")
    console.print("layers: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
    if tokenizer is None:
        console.print("no tokenizer: the model's folder has none")
    begin = "random until they are trained" if fitted is None else "those of a first fit"
    console.print(f"The scores are {begin}: fine-tune next, with model.source set to this folder")


def _fit(model: Any, tokenizer: Any, text: Path, settings: dict[str, Any], length: int | None) -> list[Tensor]:
    if tokenizer is None:
        raise ConfigError("--distill reads text, but the model's folder has no tokenizer: put it there")
    if settings["kind"] != "sparsek":
        raise ConfigError(f"--distill fits scorers, which attention.kind = {settings['kind']} does not have")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--distill = {text} cannot be read ({error}): give a plain-text file") from error
    tokens = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    window, known = settings["window"], model.config.max_position_embeddings
    if length is not None and not window < length <= known:
        raise ConfigError(
            f"--distill-length = {length} must be more than attention.window = {window}, and at most the {known} "
            "positions that the model knows: usually the length it was trained on"
        )
    least = 2 * window if length is None else length
    length = length or min(trained_length(model.config), max(DISTILL_LENGTH, 4 * window))
    if len(tokens) < length or length < least:
        raise ConfigError(
            f"--distill = {text} holds {len(tokens)} tokens, and contexts of {length} are read (attention.window = "
            f"{window}): give a longer text, a shorter window, or --distill-length"
        )
    contexts = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, 1, length)
    return fit_scorers(model, list(contexts[:DISTILL_CONTEXTS]), window=window, std=settings["score_std"])
