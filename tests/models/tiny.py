"""Tiny random models of every supported family, made the way a pretrained one would be loaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 29
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS = {
    "gemma": {"type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"type": "gemma3_text", "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 11,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {"type": "gpt2", "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"type": "gpt_neox", "hidden_size": 32, **ROTATED},
    "granite": {"type": "granite", "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "llama": {"type": "llama"},
    "llama, one KV head, biases, llama3 rope": {"type": "llama", "num_key_value_heads": 1, "attention_bias": True,
                                                "rope_parameters": LLAMA3_ROPE},
    "mistral": {"type": "mistral", "head_dim": 10, "sliding_window": None},
    "phi": {"type": "phi", "hidden_size": 32, "qk_layernorm": True, **ROTATED},
    "phi3": {"type": "phi3", "sliding_window": None},
    "qwen2": {"type": "qwen2", "tie_word_embeddings": True},
    "qwen2 with sliding layers": {"type": "qwen2", "use_sliding_window": True, "sliding_window": 9,
                                  "max_window_layers": 1},
    "qwen3": {"type": "qwen3", "head_dim": 8},
    "smollm3": {"type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "starcoder2": {"type": "starcoder2", "sliding_window": None},
}  # fmt: skip
"""By a name for people: `type` is transformers' model_type, the rest goes over COMMON."""


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """In float64 and evaluation mode. The same weights each time; none of them at a special value such as 0 or 1."""
    settings = COMMON | MODELS[name] | changes
    spec = AutoConfig.for_model(settings.pop("type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(spec, attn_implementation="sdpa").double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # As trained weights are: norms and biases too, and logits that differ clearly between tokens.
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(n: int, *, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """[b, n] ids that are none of the special ones."""
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))
