"""`sparsek train`: from a configuration to a trained model in a run folder."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from sparsek_dist.config import Config
from sparsek_dist.data.corpus import Corpus, prepare
from sparsek_dist.data.growth import GrowingLoader
from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.data.store import TokenStore
from sparsek_dist.evaluation.perplexity import byte_counter, bytes_per_target, evaluate
from sparsek_dist.evaluation.trigram import trigram_bits_per_byte
from sparsek_dist.models import build_model
from sparsek_dist.models.export import export_model
from sparsek_dist.models.observe import observe
from sparsek_dist.models.source import check_tokenizer
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from sparsek_dist.parallel.rendezvous import discover, initialize, shutdown
from sparsek_dist.relations import check_world_size
from sparsek_dist.training.checkpoint import Checkpoints, Position
from sparsek_dist.training.engine import build_engine, deepspeed_config
from sparsek_dist.training.loop import Run, fit
from sparsek_dist.training.metrics import MetricsLog
from sparsek_dist.training.progress import Progress
from sparsek_dist.training.run_folder import describe_run, open_run_folder
from sparsek_dist.training.same_text import require_same_text

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Trains until `train.steps`, from the newest checkpoint of the run if there is one.

    Raises:
        SparsekError: whatever a user can cause or cure.
    """
    ranks = discover()
    check_world_size(config, ranks.world_size)
    # Only to refuse what DeepSpeed would not take, before any work is done.
    deepspeed_config(config, ranks.world_size, precision="float32")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    # Before the process group exists: no collective can time out while a large corpus is tokenised.
    corpus = prepare(config.data, tokenizer, seed=config.run.seed, progress=ranks.rank == 0)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    initialize(ranks, timeout=timeout)
    mesh = build_mesh(config.parallel.sequence_degree, timeout=timeout)
    require_same_text(corpus.fingerprint, mesh.world, source=f"data.path = {config.data.path!r}")
    with open_run_folder(config.run_dir, mesh) as folder:
        held_out = _train_in(folder, config, mesh, tokenizer, corpus)
        if mesh.is_main:
            _summarise(folder, held_out, corpus, len(tokenizer), config)
    # Not reached after an error: ending a group whose other ranks are gone may wait for them.
    shutdown()


def _train_in(folder: Path, config: Config, mesh: Mesh, tokenizer: Any, corpus: Corpus) -> dict[str, float]:
    """Builds what `fit` needs, runs it, and returns the last evaluation."""
    held_out = Contexts(corpus.held_out, config.data.sequence_length, pad=True)
    loader = training_loader(corpus.train, config, mesh.world.size)
    model = build_model(config, mesh, vocab_size=len(tokenizer))
    checkpoints = Checkpoints(folder / "checkpoints", config, mesh, partial(export_model, model, tokenizer))
    found = checkpoints.find()
    describe_run(folder, config, mesh)
    engine = build_engine(model, config, mesh)
    _seed_rank(config.run.seed, mesh.world.rank)
    start = checkpoints.restore(engine, found) if found else Position()
    log = MetricsLog(folder, start_step=start.step, enabled=mesh.is_main)
    try:
        return fit(
            Run(
                config=config,
                mesh=mesh,
                engine=engine,
                loader=loader,
                log=log,
                progress=Progress(config.train.steps, config.train.log_every),
                checkpoints=checkpoints,
                evaluate=_evaluator(engine, held_out, config, mesh),
                observe=lambda batch: observe(engine, batch.input_ids, batch.position_ids, mesh.sequence),
                bytes_per_target=bytes_per_target(corpus.train),
            ),
            start,
        )
    finally:
        log.close()


def training_loader(store: TokenStore, config: Config, world_size: int) -> GrowingLoader:
    """What a run reads, step by step."""
    return GrowingLoader(
        store,
        config.data.sequence_length,
        config.data.first_lengths,
        seed=config.run.seed,
        sequences_per_step=config.sequences_per_step(world_size),
    )


def _evaluator(engine: Any, contexts: Contexts, config: Config, mesh: Mesh) -> Callable[[], dict[str, float]]:
    count_bytes = byte_counter(config.data.tokenizer, contexts.store)

    def run() -> dict[str, float]:
        batches = evaluation_batches(
            contexts,
            batch_size=config.train.micro_batch_size,
            limit=config.train.eval_sequences,
            data_rank=mesh.data_rank,
            data_degree=mesh.data_degree,
        )
        return evaluate(engine, batches, mesh, count_bytes=count_bytes, device=engine.device).as_dict()

    return run


def _seed_rank(seed: int, rank: int) -> None:
    """A stream of its own for every rank, apart from the one that made the weights."""
    mixed = int(numpy.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(mixed)
    numpy.random.seed(mixed)
    torch.manual_seed(mixed)


def _summarise(folder: Path, held_out: dict[str, float], corpus: Corpus, vocab_size: int, config: Config) -> None:
    """The last thing a run says: how good it is against a model that needs no training, and what to do next."""
    store, train = corpus.held_out, config.train
    contexts = Contexts(store, config.data.sequence_length, pad=True)
    batches = evaluation_batches(
        contexts, batch_size=train.micro_batch_size, limit=train.eval_sequences, data_rank=0, data_degree=1
    )
    count_bytes = byte_counter(config.data.tokenizer, store)
    trigram = trigram_bits_per_byte(corpus.train.tokens, batches, vocab_size, eos=store.eos_id, count_bytes=count_bytes)
    against = "has too large a vocabulary" if trigram is None else f"{trigram:.4f}"
    text = f"{train.eval_sequences} held-out contexts" if train.eval_sequences else "all held-out text"
    sparsek = _command("sparsek")
    lines = [
        f"held-out bits per byte   {held_out['bits_per_byte']:.4f}  (on {text})",
        f"trigram model            {against}  (on the same)",
        f"run folder               {folder}",
        "",
        f"curves and pictures      {_command('tensorboard')} --logdir {folder / 'tensorboard'}",
        f"evaluate on all of it    {sparsek} eval {folder}",
        f"let it write             {sparsek} generate {folder} --prompt 'def '",
        "resume, train on         the same command, with a larger train.steps",
    ]
    # Wide enough for every line, whatever the terminal: a wrapped command cannot be copied.
    console = Console(highlight=False, width=max(map(len, lines)) + 4)
    console.print(Panel(escape("\n".join(lines)), title="done", expand=False))


def _command(name: str) -> str:
    """A command of this environment as it can be typed in this folder, even where the environment is not active."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name
