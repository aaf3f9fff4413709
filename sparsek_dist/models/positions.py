"""How long the contexts are that a model knows: those of the runs that made it, where that was written down."""

from __future__ import annotations

from transformers import PreTrainedConfig

ENTRY = "trained_length"
"""Of a model's config.json; ours."""


def trained_length(spec: PreTrainedConfig) -> int:
    """Tokens; all positions of a model that does not say."""
    positions = spec.max_position_embeddings
    return min(getattr(spec, ENTRY, positions), positions)


def trained_on(spec: PreTrainedConfig, length: int) -> None:
    """Writes down a run's contexts of `length` tokens, unless it knows longer ones, or does not say what it knows."""
    if hasattr(spec, ENTRY):
        setattr(spec, ENTRY, max(trained_length(spec), length))
