"""How long the contexts are that a model knows: those that it was trained on, where that was written down."""

from __future__ import annotations

from transformers import PreTrainedConfig

ENTRY = "trained_length"
"""Of a model's config.json; ours."""


def trained_length(spec: PreTrainedConfig) -> int:
    """Tokens; all positions of a model that does not say."""
    length, positions = getattr(spec, ENTRY, None), spec.max_position_embeddings
    return min(length, positions) if isinstance(length, int) and length > 0 else positions


def trained_on(spec: PreTrainedConfig, length: int) -> None:
    """Writes down contexts of `length` tokens, unless it knows longer ones, or does not say what it was trained on."""
    if hasattr(spec, ENTRY):
        setattr(spec, ENTRY, max(trained_length(spec), length))
