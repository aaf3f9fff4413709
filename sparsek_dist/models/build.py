"""A model from the settings: a transformers architecture from its config, with SPARSEK attention installed."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparsek_dist.attention.awareness import refuse_unaware_layers
from sparsek_dist.config import Config
from sparsek_dist.models.adapter import install
from sparsek_dist.models.ulysses import install_ulysses
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.parallel.recompute import keep_received


def build_model(config: Config, mesh: Mesh, *, vocab_size: int) -> PreTrainedModel:
    """Randomly initialised, in float32, the same weights on every rank for the same `run.seed`.

    The model is called with input_ids and position_ids [b, s]: positions in the document, which restart where a packed
    document begins. With a sequence-parallel mesh, s is the shard's length.

    Raises:
        ConfigError: for a model or attention that is not supported.
    """
    spec = model_spec(config, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        # On one rank, dense attention stays transformers' own.
        model = AutoModelForCausalLM.from_config(spec, attn_implementation="sdpa")
        if config.attention.kind != "full":
            install(model, config.attention, mesh.sequence, seed=config.run.seed, exchange=config.parallel.exchange)
        elif mesh.sequence.size > 1:
            install_ulysses(model, mesh.sequence)
    if mesh.sequence.size > 1:
        refuse_unaware_layers(model)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_received})
    return model


def model_spec(config: Config, *, vocab_size: int) -> PreTrainedConfig:
    """transformers' config of the architecture that `config.model` describes."""
    m = config.model
    return AutoConfig.for_model(
        m.type,
        vocab_size=vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_query_heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=config.data.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        initializer_range=m.init_std,
        tie_word_embeddings=m.tie_embeddings,
        use_cache=False,
    )


def count_parameters(config: Config, *, vocab_size: int) -> int:
    """Trainable parameters, without allocating them."""
    with torch.device("meta"):
        model = build_model(config, Mesh(), vocab_size=vocab_size)
    return sum(p.numel() for p in model.parameters())
