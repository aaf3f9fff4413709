"""What a run takes over from the pretrained model it starts from, and what must agree with it."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from sparsek_dist.config import Config
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.export import tokenizer_beside
from sparsek_dist.models.positions import trained_on
from sparsek_dist.models.pretrained import fetch, is_sparsek, read_spec, saved_attention
from sparsek_dist.models.sharing import least_shard
from sparsek_dist.relations import short_shards, shortest_context


def source_spec(config: Config, *, vocab_size: int) -> PreTrainedConfig:
    """transformers' config of `model.source`, with rotary positions for the run's length.

    Raises:
        ConfigError: if the vocabulary, the length or the attention of the run do not fit.
        CheckpointError: if it cannot be read.
    """
    source = config.model.source
    assert source is not None
    spec = read_spec(fetch(source))
    spec.use_cache = False
    if vocab_size > spec.vocab_size:
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer} has {vocab_size} tokens, but model.source = {source} embeds "
            f"{spec.vocab_size}: use its own tokenizer"
        )
    _stretch(spec, config)
    trained_on(spec, config.data.sequence_length)
    if is_sparsek(spec):
        _check_attention(spec, config)
    _check_sharing(spec, config)
    return spec


def check_tokenizer(config: Config, tokenizer: Any) -> None:
    """Raises ConfigError if the run's tokenizer is not that of `model.source`: ids would mean other words."""
    if config.model.source is None:
        return
    own = tokenizer_beside(fetch(config.model.source))
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer} is not the tokenizer that model.source = {config.model.source} "
            f"was trained with: set data.tokenizer={config.model.source}"
        )


def _check_sharing(spec: PreTrainedConfig, config: Config) -> None:
    """What relations.sharding asks of a model from scratch."""
    degree = config.parallel.sequence_degree
    window = least_shard(spec, config.attention, degree=degree, told="parallel.sequence_degree")
    length, told = shortest_context(config)
    if problem := short_shards(length, degree, window, told=told):
        raise ConfigError(problem)


def _stretch(spec: PreTrainedConfig, config: Config) -> None:
    """Position interpolation (arXiv 2306.15595) or YaRN (arXiv 2309.00071), by transformers' own code."""
    length, known, rope = config.data.sequence_length, spec.max_position_embeddings, config.model.rope
    if length <= known and rope == "keep":
        return
    parameters = getattr(spec, "rope_parameters", None)
    if not isinstance(parameters, dict) or parameters.get("rope_type") != "default":
        raise ConfigError(
            f"data.sequence_length = {length} with model.rope = {rope}: model.source = {config.model.source} knows "
            f"{known} positions, and they cannot be stretched (learned, or stretched already): use at most {known} "
            "and model.rope=keep"
        )
    if rope == "keep":
        raise ConfigError(
            f"data.sequence_length = {length} exceeds the {known} positions that model.source = {config.model.source} "
            "knows: set model.rope=yarn (or linear), or use shorter contexts"
        )
    if length <= known:
        raise ConfigError(
            f"model.rope = {rope} has nothing to stretch: data.sequence_length = {length}, and model.source = "
            f"{config.model.source} knows {known} positions: use model.rope=keep"
        )
    factor = float(math.ceil(length / known))
    scaled = parameters | {"rope_type": rope, "factor": factor}
    spec.rope_parameters = scaled | ({"original_max_position_embeddings": known} if rope == "yarn" else {})
    spec.max_position_embeddings = int(known * factor)


def _check_attention(spec: PreTrainedConfig, config: Config) -> None:
    """A converted model keeps the attention it has: its scorers were trained for it."""
    saved, _ = saved_attention(spec, source=f"model.source = {config.model.source}")
    wrong = [f"attention.{key}={value}" for key, value in saved.apart(config.attention).items() if key != "backend"]
    if wrong:
        raise ConfigError(
            f"attention.kind = {config.attention.kind} ... differs from that of model.source = {config.model.source}: "
            f"set {' '.join(wrong)}, or start from the dense model"
        )
