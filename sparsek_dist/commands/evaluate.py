"""`sparsek eval`: how well a run or a model folder predicts text, and whether it finds needles in it.

Every rank that was started runs it and shares each sequence; rank 0 alone prints and writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rich.console import Console
from tqdm import tqdm

from sparsek_dist.commands.evaluation_ranks import opened
from sparsek_dist.commands.evaluation_report import print_context_use, retrieval_table, write_results
from sparsek_dist.commands.evaluation_target import Target, check_length, check_shards, documents, hay
from sparsek_dist.data.corpus import prepare
from sparsek_dist.data.loader import evaluation_batches
from sparsek_dist.data.packing import Contexts
from sparsek_dist.errors import ConfigError
from sparsek_dist.evaluation.context import as_row, measure
from sparsek_dist.evaluation.haystack import Haystacks, Task
from sparsek_dist.evaluation.perplexity import byte_counter, label_bytes
from sparsek_dist.evaluation.plots import plot_context_use, plot_retrieval
from sparsek_dist.evaluation.retrieval import retrieve
from sparsek_dist.evaluation.text import store_of
from sparsek_dist.evaluation.trigram import trigram_bits_per_byte


def evaluate_text(target: Target, *, max_sequences: int) -> None:
    """Prints and writes bits per byte and perplexity: overall, by context length, and by position in the context.

    Args:
        max_sequences: contexts to use; 0 for all.

    Raises:
        ConfigError: if the target is no run and has no text.
    """
    length, eos = target.data.sequence_length, target.tokenizer.eos_token_id
    check_shards(target, length, "--length")
    train = None
    if target.given_data:
        store = store_of(documents(target), target.tokenizer, tokens=length * max_sequences)
    elif target.run is None and not target.data.path:
        raise ConfigError(f"{target.name} is a model, not a run, and has held no text out: give one with --data PATH")
    else:
        corpus = prepare(target.data, target.tokenizer, seed=target.seed, progress=target.is_main)
        store, train = corpus.held_out, corpus.train
    contexts = Contexts(store, length, pad=True)
    size = target.batch_size
    batches = list(evaluation_batches(contexts, batch_size=size, limit=max_sequences, data_rank=0, data_degree=1))
    of_each = label_bytes(target.tokenizer_name, store)
    with opened(target, store.fingerprint, text=_name_of_text(target)) as (model, sharing):
        bar = tqdm(batches, unit="batch", disable=_no_bar(target))
        use = measure(model, bar, label_bytes=of_each, device=model.device, sharing=sharing)
    if not target.is_main:
        return
    trigram = None
    if train is not None:
        count = byte_counter(target.tokenizer_name, store)
        trigram = trigram_bits_per_byte(train.tokens, batches, len(target.tokenizer), eos=eos, count_bytes=count)
    print_context_use(use, trigram, "held-out text" if train is not None else target.data.path)
    result = {
        "overall": as_row(use.overall),
        "trigram_bits_per_byte": trigram,
        "by_length": [as_row(row) for row in use.by_length],
        "by_position": [as_row(row) for row in use.by_position],
    }
    settings = {"length": length, "max_sequences": max_sequences, "held_out": train is not None}
    numbers = {"bits_per_byte": use.overall.bits_per_byte, "loss": use.overall.loss}
    numbers |= {f"length/{row.length}": row.estimate.bits_per_byte for row in use.by_length}
    numbers |= {f"position/{row.first}": row.estimate.bits_per_byte for row in use.by_position}
    write_results(target, "perplexity", settings | result, numbers, lambda title: plot_context_use(use, title))


def evaluate_retrieval(
    target: Target,
    task: Task,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    needles: int,
    seed: int,
) -> None:
    """Prints and writes how often, and with what likelihood, the model finds a pass key in texts of these lengths.

    The hay is `--data`, or sentences of our own.

    Raises:
        ConfigError: for a number out of range.
    """
    for length in lengths:
        check_length(target.spec, length, "--lengths")
        check_shards(target, length, "--lengths")
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ConfigError(f"--depths = {wrong[0]:g} must be from 0, the beginning of the text, to 1, its end")
    if samples < 1:
        raise ConfigError(f"--samples = {samples} must be at least 1")
    tokenizer = target.tokenizer
    haystacks = Haystacks(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        task=task,
        num_needles=needles,
        seed=seed,
        text=hay(target) if target.given_data else None,
    )
    # Too short a length is told before the first long one is computed.
    firsts = [haystacks.sample(length, 0, 0) for length in lengths]
    fingerprint = hashlib.sha256(repr(firsts).encode()).hexdigest()
    with (
        opened(target, fingerprint, text=_name_of_text(target) if target.given_data else "the hay") as (model, sharing),
        tqdm(total=len(lengths) * len(depths), unit="cell", disable=_no_bar(target)) as bar,
    ):
        cells = retrieve(
            model,
            haystacks,
            lengths=lengths,
            depths=depths,
            samples=samples,
            sharing=sharing,
            told=lambda _: bar.update(),
        )
    if not target.is_main:
        return
    Console(highlight=False, soft_wrap=True).print(retrieval_table(task, cells, samples))
    settings = {"seed": seed, "needles": 1 if task == "passkey" else needles, "cells": [as_row(cell) for cell in cells]}
    numbers: dict[str, float] = {}
    for cell in cells:
        place = f"{cell.length}/depth_{cell.depth:g}"
        numbers |= {f"found/{place}": cell.accuracy, f"log_likelihood/{place}": cell.log_likelihood}
    write_results(target, task, settings, numbers, lambda title: plot_retrieval(cells, title))


def _name_of_text(target: Target) -> str:
    return f"{'--data' if target.given_data else 'data.path'} = {target.data.path!r}"


def _no_bar(target: Target) -> bool | None:
    """For tqdm: a bar on rank 0, if that has a terminal."""
    return None if target.is_main else True
