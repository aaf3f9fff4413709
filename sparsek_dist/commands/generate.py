"""`sparsek generate`: a trained run or a converted model continues a text, in constant memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsek_dist.commands.trained import load_run
from sparsek_dist.errors import CheckpointError
from sparsek_dist.generation.generate import generate
from sparsek_dist.generation.kept import kept_by_layer, mark_characters, write_page
from sparsek_dist.models.export import tokenizer_beside
from sparsek_dist.models.pretrained import fetch, load_pretrained
from sparsek_dist.training.run_folder import CONFIG_FILE


def generate_text(
    name: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    show_kept: bool = False,
    kept_page: Path | None = None,
) -> None:
    """Prints the prompt and its continuation as it is written.

    Args:
        name: folder of a run, folder of a converted model, or its hub id.
        show_kept: print the prompt with the tokens highlighted that the model still holds at its end.
        kept_page: file to write the same to, as a web page.
    """
    model, tokenizer = _open(name)
    console = Console(highlight=False, soft_wrap=True)
    if show_kept or kept_page is not None:
        kept = kept_by_layer(model, tokenizer, prompt)
        if kept_page is not None:
            write_page(kept_page, kept, prompt, tokenizer)
        if show_kept:
            console.print(mark_characters(kept, prompt, tokenizer))
            console.rule()

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write(prompt)
    generate(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, write=write)
    write("\n")


def _open(name: str) -> tuple[Any, Any]:
    if (Path(name) / CONFIG_FILE).is_file() or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        _, model, tokenizer = load_run(Path(name))
        return model, tokenizer
    folder = fetch(name)
    tokenizer = tokenizer_beside(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder} holds no tokenizer: put that of the model beside it")
    return load_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
