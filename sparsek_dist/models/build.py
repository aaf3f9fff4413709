"""A model from the settings: a transformers architecture from its config, or a pretrained one, with its attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparsek_dist.attention.awareness import refuse_unaware_layers
from sparsek_dist.config import Config, TuneConfig
from sparsek_dist.models.adapter import install
from sparsek_dist.models.families import num_kv_heads
from sparsek_dist.models.lora import inject_lora
from sparsek_dist.models.positions import ENTRY
from sparsek_dist.models.pretrained import SCORER, fetch, is_sparsek, load_dense, load_scorers
from sparsek_dist.models.source import source_spec
from sparsek_dist.models.ulysses import install_ulysses
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.parallel.recompute import keep_received


def build_model(config: Config, mesh: Mesh, *, vocab_size: int) -> PreTrainedModel:
    """In float32, the same weights on every rank: random for the same `run.seed`, or those of `model.source`.

    The model is called with input_ids and position_ids [b, s]: positions in the document, which restart where a packed
    document begins. With a sequence-parallel mesh, s is the shard's length.

    Raises:
        ConfigError: for a model or attention that is not supported, or that does not fit `model.source`.
        CheckpointError: if `model.source` cannot be read.
    """
    spec = model_spec(config, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        # On one rank, dense attention stays transformers' own.
        if config.model.source is None:
            model = AutoModelForCausalLM.from_config(spec, attn_implementation="sdpa")
        else:
            model = load_dense(fetch(config.model.source), spec=spec, dtype=torch.float32).train()
        _adapt(model, config, mesh)
        if config.model.source is not None and is_sparsek(spec):
            load_scorers(model, fetch(config.model.source))
        choose_parameters(model, config.tune)
    if mesh.sequence.size > 1:
        refuse_unaware_layers(model)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_received})
    return model


def _adapt(model: PreTrainedModel, config: Config, mesh: Mesh) -> None:
    if config.attention.kind != "full":
        install(model, config.attention, mesh.sequence, seed=config.run.seed, exchange=config.parallel.exchange)
    elif mesh.sequence.size > 1:
        install_ulysses(model, mesh.sequence)


def choose_parameters(model: PreTrainedModel, tune: TuneConfig) -> None:
    """Freezes what is not to learn, and adds low-rank updates where they are wanted.

    Raises:
        ConfigError: if peft is wanted but missing, or `tune.lora_layers` fits no layer.
    """
    if tune.parameters == "lora":
        inject_lora(model, tune)
    if tune.parameters != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(SCORER in name or (tune.parameters == "lora" and ".lora_" in name))


def model_spec(config: Config, *, vocab_size: int) -> PreTrainedConfig:
    """transformers' config of the architecture that `config.model` describes, or names."""
    m = config.model
    if m.source is not None:
        return source_spec(config, vocab_size=vocab_size)
    return AutoConfig.for_model(
        m.type,
        vocab_size=vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_query_heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=m.max_positions or config.data.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        initializer_range=m.init_std,
        tie_word_embeddings=m.tie_embeddings,
        use_cache=False,
        **{ENTRY: config.data.sequence_length},
    )


def count_parameters(config: Config, *, vocab_size: int) -> int:
    """Trainable parameters, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_spec(config, vocab_size=vocab_size), attn_implementation="sdpa")
        _adapt(model, config, Mesh())
        choose_parameters(model, config.tune)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_shape(config: Config, *, vocab_size: int) -> Config:
    """The settings with the shape of `model.source` filled in, for those who only want to know sizes."""
    if config.model.source is None:
        return config
    spec = model_spec(config, vocab_size=vocab_size)
    head_dim = getattr(spec, "head_dim", None) or spec.hidden_size // spec.num_attention_heads
    shape = replace(
        config.model,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_hidden_layers,
        num_query_heads=spec.num_attention_heads,
        num_kv_heads=num_kv_heads(spec),
        head_dim=head_dim,
    )
    return replace(config, model=shape)
