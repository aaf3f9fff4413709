"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, injected into the model and merged when it is saved.

Injected, not wrapped: the model stays the transformers model it is, so nothing else needs to know. A saved model has
plain weights with the adapters merged in, so nobody needs peft to load it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsek_dist.config import TuneConfig
from sparsek_dist.errors import ConfigError

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""In the names that peft gives to a layer's own weights and to its two low-rank factors."""


def inject_lora(model: PreTrainedModel, tune: TuneConfig) -> None:
    """Gives linear layers a low-rank update, zero at first, that learns while the weights stay.

    Raises:
        ConfigError: if peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "tune.parameters = lora needs peft: pip install 'sparsek-dist[lora]', or tune the scorers alone"
        ) from error
    named = tune.lora_layers != "all"
    targets: Any = tune.lora_layers.split(",") if named else _linear_layers(model)
    # GPT-2's layers hold their weights transposed.
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    settings = LoraConfig(
        r=tune.lora_rank, lora_alpha=tune.lora_alpha, target_modules=targets, fan_in_fan_out=transposed
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in _linear_layers(model)}))
        raise ConfigError(
            f"tune.lora_layers = {tune.lora_layers} fits no layer: use all, or some of {names}"
        ) from error


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model without updates that computes the same: W + alpha / r * B A, under the plain names."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if DOWN in name or UP in name:
            continue
        layer_name, found, rest = name.partition(BASE)
        plain[f"{layer_name}.{rest}" if found else name] = tensor
        if found and rest == "weight":
            layer = model.get_submodule(layer_name)
            update = layer.scaling["default"] * (state[layer_name + UP].double() @ state[layer_name + DOWN].double())
            update = update.T if layer.fan_in_fan_out else update
            plain[f"{layer_name}.{rest}"] = (tensor.double() + update).to(tensor.dtype)
    return plain


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers of the blocks, scorers and the output projection left out."""
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]
