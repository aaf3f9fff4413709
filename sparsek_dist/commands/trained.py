"""`sparsek eval`, and how a trained run is opened: in one process, without DeepSpeed and without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsek_dist.config import Config, from_yaml
from sparsek_dist.data.corpus import prepare
from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.errors import CheckpointError
from sparsek_dist.evaluation.perplexity import byte_counter, evaluate
from sparsek_dist.evaluation.trigram import trigram_bits_per_byte
from sparsek_dist.models.pretrained import is_sparsek, load_dense, load_pretrained, read_spec
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.mesh import Mesh, RankGroup
from sparsek_dist.training.checkpoint_names import newest_model
from sparsek_dist.training.manifest import find_damage
from sparsek_dist.training.run_folder import CONFIG_FILE


def evaluate_run(folder: Path, *, max_sequences: int) -> None:
    """Prints loss, perplexity and bits per byte of the newest checkpoint on the run's held-out text.

    Args:
        folder: of the run.
        max_sequences: held-out contexts to use; 0 for all.
    """
    config, model, tokenizer = load_run(folder)
    corpus = prepare(config.data, tokenizer, seed=config.run.seed, progress=True)
    contexts = Contexts(corpus.held_out, config.data.sequence_length, pad=True)
    size = config.train.micro_batch_size
    batches = list(evaluation_batches(contexts, batch_size=size, limit=max_sequences, data_rank=0, data_degree=1))
    count_bytes = byte_counter(config.data.tokenizer, corpus.held_out)
    result = evaluate(model, batches, Mesh(), count_bytes=count_bytes, device=model.device)
    eos = corpus.held_out.eos_id
    trigram = trigram_bits_per_byte(corpus.train.tokens, batches, len(tokenizer), eos=eos, count_bytes=count_bytes)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{result.targets:,.0f} targets of held-out text")
    console.print(f"loss           {result.loss:.4f} nats")
    console.print(f"perplexity     {result.perplexity:.4f}")
    console.print(f"bits per byte  {result.bits_per_byte:.4f}")
    if trigram is not None:
        console.print(f"trigram model  {trigram:.4f} bits per byte, on the same text")


def load_run(folder: Path) -> tuple[Config, Any, Any]:
    """Settings, model (evaluation mode, on the GPU if there is one) and tokenizer of a run's newest checkpoint.

    Raises:
        CheckpointError: if the folder holds no run, or the weights do not fit its settings.
    """
    settings = folder / CONFIG_FILE
    if not settings.is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it holds no {CONFIG_FILE}")
    config = from_yaml(settings.read_text(encoding="utf-8"))
    weights = newest_model(folder)
    damage = find_damage(weights.parent, RankGroup(), below=f"{weights.name}/")
    if damage:
        raise CheckpointError(f"{weights.parent} is damaged: {damage[0]}. Delete it to use an older one")
    # The built-in tokenizer is rebuilt; others are read from the checkpoint, so the hub is not needed again.
    tokenizer = load_tokenizer("bytes" if config.data.tokenizer == "bytes" else str(weights))
    spec = read_spec(weights)
    if is_sparsek(spec) != (config.attention.kind != "full"):
        raise CheckpointError(f"{weights} does not fit {settings}: it was written by another version")
    model: Any = load_pretrained(weights, backend=config.attention.backend) if is_sparsek(spec) else load_dense(weights)
    # Evaluation sees whole contexts; generation asks for its cache.
    model.config.use_cache = False
    return config, model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
