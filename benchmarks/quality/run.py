"""One cell: build the model, train it, measure it; by the project's own model, attention, loss and measures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import recall, text
from benchmarks.quality.cells import Cell
from benchmarks.quality.claims import claimed
from benchmarks.quality.needles import find_keys
from benchmarks.quality.scales import Scale, Task
from benchmarks.quality.train import train
from sparsek_dist.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from sparsek_dist.data.loader import Batch
from sparsek_dist.evaluation.context import as_row, measure
from sparsek_dist.evaluation.perplexity import BYTES, label_bytes
from sparsek_dist.models.build import build_model, count_parameters
from sparsek_dist.models.distill import fit_scorers, start_scorers
from sparsek_dist.models.observe import observe
from sparsek_dist.parallel.mesh import Mesh, RankGroup

DISTILLED_BATCHES = 4
"""Last steps of the dense model's training, which scorers are fitted to."""
TRAINING = "training.json"
"""In the folder of a dense model: what its training was."""
TIMED_STEPS = 15


@dataclass
class Study:
    """What cells share: the scale, the device, the folder, and the text, which is read once."""

    scale: Scale
    out: Path
    device: torch.device
    _corpus: text.Corpus | None = field(default=None, init=False)

    @property
    def corpus(self) -> text.Corpus:
        if self._corpus is None:
            self._corpus = text.corpus(self.scale)
        return self._corpus

    def folder(self, dense: Cell) -> Path:
        """Where a model is kept that others start from."""
        return self.out / f"dense-{self.scale.name}-{dense.task}-{dense.seed}"

    def lock(self, cell: Cell) -> Path:
        """What a process holds while it runs the cell."""
        return self.out / "locks" / self.scale.name / cell.name.replace("/", "-")


def prepare(cell: Cell, study: Study) -> None:
    """Sees to what the cell starts from: the dense model, and if it is distilled a fit of scorers to that.

    Whoever is at it already, for its row or to start from it, is waited for.
    """
    if cell.source is None:
        return
    with claimed(study.lock(cell.source), wait=True):
        _train_dense(cell.source, study)
        if cell.distilled and not (path := _fit_path(cell, study)).is_file():
            _save_fit(_fit(cell, study), path)


def run_cell(cell: Cell, study: Study) -> dict[str, Any]:
    """Trains and measures one model; all there is to know about it, fit for JSON."""
    if cell.task == "time":
        return step_times(cell, study)
    prepare(cell, study)
    model, row = _dense(cell, study) if cell.kind == "full" else trained(cell, study)
    began = time.perf_counter()
    row |= _measure_recall(model, study.scale.recall) if cell.base == "recall" else _measure_text(model, cell, study)
    return row | {"measure_seconds": time.perf_counter() - began}


def _train_dense(cell: Cell, study: Study) -> None:
    """Trains a model that others start from, if its folder is not there."""
    folder = study.folder(cell)
    if folder.is_dir():
        return
    prepare(cell, study)
    model, row = trained(cell, study)
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    (unfinished / TRAINING).write_text(json.dumps(row))
    unfinished.rename(folder)


def _dense(cell: Cell, study: Study) -> tuple[Any, dict[str, Any]]:
    """A model that others start from: the same for its row and for all of them, whichever came first."""
    _train_dense(cell, study)
    folder = study.folder(cell)
    row = json.loads((folder / TRAINING).read_text())
    config = replace(configuration(cell, study), model=ModelConfig(source=str(folder)))
    return _built(config, study, _vocab_size(cell, study)).eval(), row


def trained(cell: Cell, study: Study) -> tuple[Any, dict[str, Any]]:
    """The model of a prepared cell, in evaluation mode, and what its training was; in bfloat16 on a GPU."""
    config = configuration(cell, study)
    model = _built(config, study, _vocab_size(cell, study))
    if cell.distilled:
        weights = load_file(_fit_path(cell, study))
        start_scorers(model, [weights[str(layer)] for layer in range(len(weights))])
    row: dict[str, Any] = {"parameters": count_parameters(config, vocab_size=_vocab_size(cell, study))}
    if config.train.steps > 0:
        row |= train(model, config, _batches(cell, study))
    return model.eval(), row


def _vocab_size(cell: Cell, study: Study) -> int:
    return recall.vocab_size(study.scale.recall) if cell.base == "recall" else text.VOCAB


def _built(config: Config, study: Study, vocab_size: int) -> Any:
    model: Any = build_model(config, Mesh(), vocab_size=vocab_size).to(study.device)
    return model.to(torch.bfloat16) if study.device.type == "cuda" else model


def _fit_path(cell: Cell, study: Study) -> Path:
    """Of scorers fitted to a dense model, in its folder. One fit serves all gates and slopes."""
    assert cell.source is not None
    window = configuration(cell, study).attention.window
    return study.folder(cell.source) / f"scorers-{window}-{cell.std:g}.safetensors"


def _fit(cell: Cell, study: Study) -> list[Tensor]:
    """To what the dense model attends to out of sight, in the contexts that it was trained on last."""
    source = cell.source
    assert source is not None
    dense, _ = _dense(source, study)
    seen = _batches(source, study)
    steps = study.scale.task(source.base).steps
    batches = [seen(step).input_ids for step in range(max(0, steps - DISTILLED_BATCHES), steps)]
    return fit_scorers(dense, batches, window=configuration(cell, study).attention.window, std=cell.std)


def _save_fit(fitted: list[Tensor], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file({str(layer): weight.contiguous() for layer, weight in enumerate(fitted)}, unfinished)
    unfinished.rename(path)


def configuration(cell: Cell, study: Study) -> Config:
    """The project's settings of a cell."""
    task = study.scale.task(cell.base)
    steps, rate, model = task.steps, task.learning_rate, task.model
    if cell.source:
        model = ModelConfig(source=str(study.folder(cell.source)))
    if cell.converts:
        steps, rate = math.ceil(cell.share * steps), rate * cell.tuning_rate
    return Config(
        run=RunConfig(seed=cell.seed),
        model=model,
        attention=cell.attention(task.window),
        data=DataConfig(sequence_length=task.length),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=steps // 10, scorer_rate=cell.scorer_rate),
        train=TrainConfig(steps=steps, micro_batch_size=task.batch),
    )


def _batches(cell: Cell, study: Study) -> Callable[[int], Batch]:
    """Step -> batch; the same for all kinds of one seed. Tuning goes on where the dense model's training ended."""
    task = study.scale.task(cell.base)
    past = task.steps if cell.converts else 0
    if cell.base == "recall":
        return lambda step: recall.questions(task, size=task.batch, seed=(cell.seed, step + past)).batch
    training = text.TrainingText(study.corpus, task, seed=cell.seed)
    return lambda step: training(step + past)


def step_times(cell: Cell, study: Study) -> dict[str, Any]:
    """Median seconds of a step at every length of context of the task, in tokens; all with as many tokens a step."""
    task = study.scale.task(cell.base)
    config = replace(configuration(cell, study), model=task.model)
    model, batch_at = _built(config, study, text.VOCAB), _batches(cell, study)
    config = replace(config, train=replace(config.train, steps=TIMED_STEPS))
    found = []
    for first, length in task.stages:
        same = [batch_at(first)] * TIMED_STEPS
        row = train(model, config, same.__getitem__)
        found.append([length, row["step_seconds"]])
    return {"step_tokens": task.batch * task.length, "step_seconds_by_length": found}


def _measure_recall(model: Any, task: Task) -> dict[str, Any]:
    # One test for all seeds and kinds, which no training seed draws.
    test = recall.questions(task, size=task.eval_contexts, seed=(10_000, 0))
    return recall.score(model, test, task)


def _measure_text(model: Any, cell: Cell, study: Study) -> dict[str, Any]:
    """Bits per byte on held-out packages, overall and by position; statistics of the selection; pass keys."""
    corpus, task = study.corpus, study.scale.task(cell.base)
    batches = text.test_batches(corpus, task)
    of_each = label_bytes(BYTES, corpus.held_out.store)
    use = measure(model, batches, label_bytes=of_each, device=model.device)
    first = batches[0].to(model.device)
    selection, _ = observe(model, first.input_ids, first.position_ids, RankGroup())
    row = {
        "bits_per_byte": use.overall.bits_per_byte,
        "by_position": [as_row(entry) for entry in use.by_position],
        "by_length": [as_row(entry) for entry in use.by_length],
        "selection": selection,
        "corpus": corpus.told,
    }
    keys = text.test_keys(corpus, study.scale)
    return row | {"passkey": find_keys(model, keys, study.scale, longest=task.length)}
