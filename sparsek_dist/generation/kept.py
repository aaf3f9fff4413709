"""Which tokens of a text a SPARSEK model still holds at its end: for the terminal, and as a page for the browser."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from sparsek_dist.errors import ConfigError
from sparsek_dist.generation.generate import prompt_tokens
from sparsek_dist.models.cache import KeptLayer, SparsekCache
from sparsek_dist.models.families import attention_modules

WINDOW = 2.0
"""Marks a token that every head sees because it is among the newest."""


@torch.no_grad()
def kept_by_layer(model: Any, tokenizer: Any, prompt: str) -> dict[int, Tensor]:
    """Per SPARSEK layer the share of KV heads [n] that hold each token of the prompt; WINDOW for the newest.

    Raises:
        ConfigError: for a model without a selection, or a prompt without tokens.
    """
    layers = [i for i, m in enumerate(attention_modules(model)) if getattr(m, "layer_kind", "full") == "sparsek"]
    tokens = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
    n = tokens.shape[1]
    if not layers or not prompt:
        raise ConfigError("--show-kept needs a prompt, and a model with a selection: it has nothing to show")
    cache = SparsekCache(model)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    shares = {}
    for index in layers:
        layer = cache.layers[index]
        assert isinstance(layer, KeptLayer) and layer.state is not None
        chosen = layer.state.selected_positions[0]
        heads = len(chosen)
        share = torch.zeros(n)
        share.scatter_add_(0, chosen[chosen >= 0].cpu(), torch.full((int((chosen >= 0).sum()),), 1 / heads))
        share[max(0, n - layer.state.window) :] = WINDOW
        # The first token is the one that begins a document, which is not in the text.
        shares[index] = share[1:]
    return shares


def by_character(share: Tensor, prompt: str, tokenizer: Any) -> list[float]:
    """Shares of tokens as shares of characters: of a character of several tokens, the largest."""
    spans = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    marks = [0.0] * len(prompt)
    for (start, end), value in zip(spans, share.tolist(), strict=True):
        for place in range(start, min(max(end, start + 1), len(prompt))):
            marks[place] = max(marks[place], value)
    return marks


def mark_characters(kept: dict[int, Tensor], prompt: str, tokenizer: Any) -> Text:
    """The prompt for a terminal: darker red for tokens that more heads of more layers hold, blue for the window."""
    text = Text()
    for letter, mark in zip(prompt, by_character(_mean(kept), prompt, tokenizer), strict=True):
        if mark >= WINDOW:
            text.append(letter, style="black on #b6d4f5")
        elif mark > 0:
            fade = round(225 * (1 - mark))
            text.append(letter, style=f"{'black' if fade > 110 else 'white'} on #f0{fade:02x}{fade:02x}")
        else:
            text.append(letter, style="grey50")
    return text


def write_page(path: Path, kept: dict[int, Tensor], prompt: str, tokenizer: Any) -> None:
    """A page that needs nothing else: the prompt, its kept tokens, and a choice of layers.

    Raises:
        ConfigError: if the file cannot be written.
    """
    views = {"all layers": _mean(kept)} | {f"layer {index}": share for index, share in kept.items()}
    marks = {name: [round(mark, 3) for mark in by_character(share, prompt, tokenizer)] for name, share in views.items()}
    letters = "".join(f"<i>{html.escape(letter)}</i>" for letter in prompt)
    options = "".join(f"<option>{name}</option>" for name in marks)
    counts = {name: int(((share > 0) & (share < WINDOW)).sum()) for name, share in views.items()}
    data = json.dumps({"marks": marks, "counts": counts, "tokens": len(next(iter(kept.values())))})
    try:
        path.write_text(PAGE.format(letters=letters, options=options, data=data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--kept-page = {path} cannot be written ({error}): choose another file") from error


def _mean(kept: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(kept.values())).mean(dim=0)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What is kept</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222; padding: 0 1em }}
#text {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; color: #999 }}
#text i {{ font-style: normal }}
.key {{ padding: 0 .4em; border-radius: .2em }}
</style></head><body>
<h1>What is kept of this text</h1>
<p>Seen from its end, by <select id="view">{options}</select>:
<span class="key" style="background:#f9b3b3">some heads</span>
<span class="key" style="background:#d01010;color:#fff">all heads</span>
<span class="key" style="background:#b6d4f5">window</span>
<span id="count"></span></p>
<div id="text">{letters}</div>
<script>
const data = {data};
const view = document.getElementById("view"), letters = document.querySelectorAll("#text i");
function paint() {{
  const marks = data.marks[view.value];
  letters.forEach((letter, index) => {{
    const mark = marks[index], style = letter.style;
    style.background = mark >= 2 ? "#b6d4f5" : mark > 0 ? `hsl(0 86% ${{90 - 46 * mark}}%)` : "";
    style.color = mark >= 2 ? "#000" : mark > 0.5 ? "#fff" : mark > 0 ? "#000" : "";
    letter.title = mark >= 2 ? "window" : `held by ${{Math.round(100 * mark)}} % of the heads`;
  }});
  document.getElementById("count").textContent =
    `${{data.counts[view.value]}} of ${{data.tokens}} tokens are kept outside the window`;
}}
view.addEventListener("change", paint);
paint();
</script></body></html>
"""
