"""Pretrained models in, tuned models out: plain Hugging Face folders, read without remote code and without pickle.

    model = sparsify(AutoModelForCausalLM.from_pretrained("..."), num_selected=256, window=256)
    model.save_pretrained("folder")
    model = load_pretrained("folder")

A folder is what transformers writes: safetensors, the scorers among them, and a config.json with a `sparsek` entry.
transformers alone loads the dense model from it and reports the scorers as unexpected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from sparsek_dist.attention.exchange import Exchange
from sparsek_dist.config import AttentionConfig
from sparsek_dist.errors import CheckpointError, ConfigError
from sparsek_dist.models.adapter import FORMAT, install
from sparsek_dist.models.families import family_of, turn_dropout_off
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.settings import attention_from

SCORER = ".scorer."
"""In the name of every weight that SPARSEK adds to a model."""
FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]
"""What is fetched from the hub: no pickles, no code."""


def sparsify(
    model: PreTrainedModel, *, seed: int = 0, attention_dropout: Literal["refuse", "off"] = "refuse", **attention: Any
) -> PreTrainedModel:
    """Gives a transformers model SPARSEK attention, in place: every weight stays as it is, scorers are added.

    Where a sequence is not longer than the window the model computes what it computed before.

    Args:
        model: a causal language model of one of models.families.FAMILIES, in any precision, on any device.
        seed: of the scorers' weights, and of the scores of the `random` baseline.
        attention_dropout: `off` sets a dropout on attention weights to 0, as in pretrained GPT-2; `refuse` refuses it.
        attention: fields of config.AttentionConfig, such as num_selected=256, window=256, full_layers="every_other".

    Returns:
        The model itself.

    Raises:
        ConfigError: for a model or a setting that cannot work.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"sparsify takes a transformers model, not {type(model).__name__}: load one first")
    config = attention_from(attention, source="sparsify")
    if config.kind == "full":
        raise ConfigError("attention.kind = full is the dense attention that the model has already: choose another")
    if attention_dropout == "off":
        turn_dropout_off(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        install(model, config, RankGroup(), seed=seed)
    return model


def load_pretrained(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    backend: str = "auto",
    group: RankGroup | None = None,
    exchange: Exchange = "auto",
) -> PreTrainedModel:
    """A model that was saved with SPARSEK attention, bit for bit, in evaluation mode, on the CPU.

    Args:
        name: its folder, or its id on the hub.
        dtype: of the weights; `auto` is as saved.
        backend: of the attention, as in config.AttentionConfig.
        group: ranks that share every sequence, of which each then gives the model its shard; None for one process.
        exchange: how their summaries travel, as in config.ParallelConfig.

    Raises:
        CheckpointError: if it cannot be read, or its weights are not those of its config.json.
        ConfigError: if it is a dense model, was saved by a newer version, or has dense layers whose heads the size of
            `group` does not divide.
    """
    folder = fetch(name)
    spec = read_spec(folder)
    config, seed = saved_attention(spec, source=f"{folder}/config.json")
    model = load_dense(folder, spec=spec, dtype=dtype)
    config = attention_from(asdict(config) | {"backend": backend}, source="backend")
    install(model, config, group or RankGroup(), seed=seed, exchange=exchange)
    load_scorers(model, folder)
    return model


def saved_attention(spec: PreTrainedConfig, *, source: str) -> tuple[AttentionConfig, int]:
    """The attention that a model's config describes, and the seed of its scores.

    Args:
        source: names it in errors.

    Raises:
        ConfigError: if it has no such entry, or one that this version does not understand.
    """
    entry = getattr(spec, "sparsek", None)
    if entry is None:
        raise ConfigError(f"{source} has no `sparsek` entry, so the model is dense: convert it with `sparsek sparsify`")
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise ConfigError(
            f"{source} has a `sparsek` entry of another format than {FORMAT}: use the version that wrote it"
        )
    settings = {key: value for key, value in entry.items() if key not in ("format", "seed", "backend")}
    return attention_from(settings, source=source), int(entry["seed"])


def is_sparsek(spec: PreTrainedConfig) -> bool:
    """Whether a model's config says that it has SPARSEK attention."""
    return getattr(spec, "sparsek", None) is not None


def load_dense(
    folder: Path, *, spec: PreTrainedConfig | None = None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The model of a folder with dense attention, in evaluation mode; scorers are left where they are.

    Args:
        spec: its config, where that is not to be as saved.

    Raises:
        ConfigError: for an architecture that SPARSEK does not fit.
        CheckpointError: if the weights are missing, not safetensors, or not those of the architecture.
    """
    spec = read_spec(folder) if spec is None else spec
    with _quiet():
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                folder,
                config=spec,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    surplus = sorted(key for key in told["unexpected_keys"] if SCORER not in key)
    lacking = sorted(told["missing_keys"]) + sorted(str(key) for key in told["mismatched_keys"])
    if lacking or surplus:
        raise CheckpointError(
            f"{folder}: the weights are not those of its config.json (missing or of another shape: "
            f"{lacking[:3]}, unknown: {surplus[:3]}): fetch the folder again"
        )
    return model.eval()


def load_scorers(model: PreTrainedModel, folder: Path) -> None:
    """Fills the scorers of a model from a folder's safetensors files.

    Raises:
        CheckpointError: if one is missing, left over, or of another shape.
    """
    found = dict(_stored_scorers(folder))
    wanted = {name: tensor for name, tensor in model.state_dict().items() if SCORER in name}
    wrong = sorted(set(found) ^ set(wanted)) or sorted(
        name for name in wanted if found[name].shape != wanted[name].shape
    )
    if wrong:
        raise CheckpointError(f"{folder}: the scorers are not those of its config.json: {wrong[:3]}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def fetch(name: str | Path) -> Path:
    """The local folder of a model: itself, or that of a hub id, without pickles and code.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a model that the hub or its cache has ({type(error).__name__}): "
            "check the name, and HF_HUB_OFFLINE"
        ) from error


def _stored_scorers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if SCORER in name:
                    yield name, file.get_tensor(name)


def read_spec(folder: Path) -> PreTrainedConfig:
    """transformers' config of a folder.

    Raises:
        CheckpointError: if it has none that transformers knows.
        ConfigError: for a family that SPARSEK does not fit.
    """
    try:
        spec = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no model that transformers knows without remote code: {' '.join(str(error).split())[:300]}"
        ) from error
    family_of(spec)
    return spec


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers would report scorers as unexpected weights; what is really wrong becomes an error here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
