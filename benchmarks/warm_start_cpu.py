"""What a trained dense model loses when it is converted, by where the scorers come from: nothing is trained here.

    sparsek train configs/quickstart.yaml run.name=dense attention.kind=full parallel.sequence_degree=1
    python benchmarks/warm_start_cpu.py runs/dense --budgets 8 32

Bits per byte on the run's held-out text, for k = w = budget and each gate: new scorers (several seeds), scorers fitted
to the dense model's attention on training text, and the baselines of the same budget.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from sparsek_dist import sparsify
from sparsek_dist.commands.trained import load_run
from sparsek_dist.config import Gate
from sparsek_dist.data.corpus import prepare
from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.evaluation.perplexity import byte_counter, evaluate
from sparsek_dist.models.distill import fit_scorers, start_scorers
from sparsek_dist.parallel.mesh import Mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with attention.kind=full")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--gates", nargs="+", choices=get_args(Gate), default=get_args(Gate))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=32)
    options = parser.parse_args()

    config, dense, tokenizer = load_run(options.run)
    corpus = prepare(config.data, tokenizer, seed=config.run.seed, progress=False)
    length = config.data.sequence_length
    held_out = Contexts(corpus.held_out, length, pad=True)
    batches = list(evaluation_batches(held_out, batch_size=4, limit=options.contexts, data_rank=0, data_degree=1))
    count_bytes = byte_counter(config.data.tokenizer, corpus.held_out)
    text = torch.as_tensor(corpus.train.tokens[: 32 * length].astype("int64")).view(-1, 1, length)

    def measure(model: Any) -> float:
        return evaluate(model, batches, Mesh(), count_bytes=count_bytes, device=model.device).bits_per_byte

    table = Table(
        title=f"bits per byte on {options.contexts} held-out contexts of {length}; dense {measure(dense):.4f}"
    )
    for heading in ("k = w", "gate", "new scorers", "fitted", "sink_window", "random", "window"):
        table.add_column(heading, justify="right")
    for budget in options.budgets:
        sizes = {"num_selected": budget, "window": budget}
        weights = fit_scorers(dense, list(text), window=budget, std=1.0)
        others = [measure(sparsify(copy.deepcopy(dense), kind=k, **sizes)) for k in ("sink_window", "random", "window")]
        for gate in options.gates:
            settings: dict[str, Any] = {**sizes, "gate": gate}
            new = [measure(sparsify(copy.deepcopy(dense), seed=seed, **settings)) for seed in range(options.seeds)]
            fitted = sparsify(copy.deepcopy(dense), **settings)
            start_scorers(fitted, weights)
            spread = f"{statistics.mean(new):.4f} ({min(new):.4f} to {max(new):.4f})"
            table.add_row(str(budget), gate, spread, f"{measure(fitted):.4f}", *(f"{value:.4f}" for value in others))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
