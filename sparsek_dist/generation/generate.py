"""Continues a prompt, token by token, and hands each piece of text on as soon as it is known.

transformers' generate() does the work. Its cache is of constant size for a model with SPARSEK attention, so a token
costs the same however long the text is; see models/cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsek_dist.errors import ConfigError


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    write: Callable[[str], None],
) -> str:
    """The continuation of `prompt`, until the model ends the document or `max_new_tokens` are reached.

    Args:
        model: a transformers model in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the beginning of a document; empty to let the model begin one.
        max_new_tokens: at least 1.
        temperature: 0 always takes the likeliest token; larger values vary more.
        seed: of the draws.
        write: called with every new piece of text.

    Raises:
        ConfigError: for numbers out of range.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens = {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ConfigError(f"--temperature = {temperature} must not be negative: 0 takes the likeliest token")
    tokens = prompt_tokens(tokenizer, prompt)
    streamer = _Streamer(tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(devices=_gpus(model.device)):
        torch.manual_seed(seed)
        model.generate(
            torch.tensor([tokens], device=model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
            streamer=streamer,
            **sampling,
        )
    return streamer.text


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt, after the token that every document began with in training."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [first, *tokenizer.encode(prompt, add_special_tokens=False)]


class _Streamer:
    """transformers' streamer interface: `put` with the prompt first, then with each token; `end`."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        self._tell(final=False)

    def end(self) -> None:
        self._tell(final=True)

    def _tell(self, *, final: bool) -> None:
        text = self._tokenizer.decode(self._tokens or [], skip_special_tokens=True)
        # A character of several bytes shows as U+FFFD until its last byte is there.
        known = text if final else text.rstrip("\N{REPLACEMENT CHARACTER}")
        if len(known) > len(self.text):
            self._write(known[len(self.text) :])
            self.text = known


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
