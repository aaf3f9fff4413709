"""Of two_gpus.py: losses of the quickstart on one GPU and on all, over the same data in the same order."""

from __future__ import annotations

import gc
from pathlib import Path

from sparsek_dist.config import Config
from sparsek_dist.data.corpus import Corpus, prepare
from sparsek_dist.data.loader import Loader
from sparsek_dist.data.packing import Contexts
from sparsek_dist.models import build_model
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.settings import load
from sparsek_dist.training.engine import build_engine
from sparsek_dist.training.loop import micro_batches, train_step
from two_gpus_lab import Lab

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TINY = ("data.sequence_length=128", "attention.num_selected=8", "attention.window=8", "model.num_layers=2")


def measure_curves(lab: Lab) -> None:
    for precision in ("float32", "bfloat16") if lab.gpu else ("float32",):
        if lab.late():
            return
        overrides = (
            f"train.steps={lab.plan.steps}",
            f"train.precision={precision}",
            f"parallel.sequence_degree={lab.size}",
            f"data.path={lab.plan.data}",
            f"data.cache={lab.plan.scratch}/tokens",
            *(() if lab.gpu else TINY),
        )
        config = load(QUICKSTART, overrides)
        tokenizer = load_tokenizer(config.data.tokenizer)
        corpus = prepare(config.data, tokenizer, seed=config.run.seed)
        losses = train(lab, config, corpus, len(tokenizer))
        lab.add("curves", {"precision": precision, "gpus": lab.size, "losses": losses})


def train(lab: Lab, config: Config, corpus: Corpus, vocab_size: int) -> list[float]:
    """The loss of every step."""
    mesh = lab.mesh(lab.size)
    contexts = Contexts(corpus.train, config.data.sequence_length)
    loader = Loader(contexts, seed=config.run.seed, sequences_per_step=config.sequences_per_step(lab.size))
    engine = build_engine(build_model(config, mesh, vocab_size=vocab_size), config, mesh)
    losses = []
    for step in range(config.train.steps):
        batches = micro_batches(loader, step, config, mesh, engine.device)
        losses.append(train_step(engine, batches, step, config, mesh).loss)
    engine.destroy()
    gc.collect()
    lab.forget()
    return losses
