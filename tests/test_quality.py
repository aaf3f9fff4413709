"""The study of quality: its data mean what they say, its cells are at equal budget, it resumes, and it reports."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import __main__ as command
from benchmarks.quality import recall, run, text
from benchmarks.quality.cells import BASELINES, GATES, TASKS, Cell, grid
from benchmarks.quality.claims import claimed
from benchmarks.quality.log import Log
from benchmarks.quality.needles import write_keys
from benchmarks.quality.plots import FIRST_POSITION, plot_convert, plot_text
from benchmarks.quality.report import report
from benchmarks.quality.run import Study, configuration, prepare, run_cell, trained
from benchmarks.quality.scales import CPU, GPU, SCALES
from benchmarks.quality.summary import less_dense, mean_error, paired, with_dense
from benchmarks.quality.train import MasterWeights
from sparsek_dist.config import AttentionConfig, Config, ModelConfig, OptimizerConfig
from sparsek_dist.data.loader import Batch
from sparsek_dist.models.build import build_model
from sparsek_dist.parallel.mesh import Mesh

_SHAPE = ModelConfig(hidden_size=16, intermediate_size=16, num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=16)
_TEXT = replace(
    CPU.text,
    length=512,
    window=64,
    batch=1,
    steps=2,
    growth=((256, 1),),
    eval_contexts=2,
    model=replace(_SHAPE, max_positions=512),
)
TINY = replace(
    CPU,
    name="tiny",
    recall=replace(CPU.recall, batch=2, steps=2, eval_contexts=8, model=_SHAPE),
    short=replace(_TEXT, length=128, batch=2, growth=()),
    text=_TEXT,
    package_bytes=20_000,
    passkey_samples=1,
    shares=(0.0, 0.5),
    seeds=2,
)


_EMPTY = Batch(*(torch.zeros(1, 1, dtype=torch.int64) for _ in range(3)))


@pytest.mark.parametrize("task", [CPU.recall, GPU.recall], ids=["cpu", "gpu"])
def test_every_question_has_one_answer_that_only_its_fact_tells(task):
    made = recall.questions(task, size=4, seed=(0, 1))
    ids, labels, source = made.batch.input_ids, made.batch.labels, made.source
    first_noise = 2 + 2 * recall.num_facts(task)
    rows, places = (source >= 0).nonzero(as_tuple=True)
    assert len(rows) > 4 * recall.num_facts(task)
    facts = ids[rows, source[rows, places]] - first_noise - recall.NOISE
    assert (facts >= 0).all()
    assert (facts // recall.VALUES == ids[rows, places] - 2).all()
    assert (facts % recall.VALUES == labels[rows, places] - first_noise).all()
    # Marked, out of the window, told once, and nothing else is to be predicted.
    assert (ids[rows, source[rows, places] - 1] == 0).all()
    assert (ids[rows, places - 1] == 1).all()
    assert (made.distances >= task.window).all()
    assert made.distances.max() >= 16 * task.window
    assert ((ids >= first_noise + recall.NOISE).sum(dim=1) == recall.num_facts(task)).all()
    assert ((labels >= 0) == (source >= 0)).all()
    assert int(ids.max()) < recall.vocab_size(task)
    again = recall.questions(task, size=4, seed=(0, 1))
    assert torch.equal(again.batch.input_ids, ids)


def test_what_is_kept_is_what_the_attention_sees():
    task = TINY.recall
    model = build_model(
        Config(model=_SHAPE, attention=Cell(task="recall", kind="window").attention(task.window)),
        Mesh(),
        vocab_size=recall.vocab_size(task),
    )
    test = recall.questions(task, size=8, seed=(3,))
    result = recall.score(model.eval(), test, task)
    # k + w newest tokens and no others.
    assert result["kept_0"] == pytest.approx(float((test.distances < 2 * task.window).double().mean()))
    assert result["kept_0_by_distance"][:2] == [1.0, 0.0]
    assert 0 < result["loss"] < 10


def test_text_is_long_and_held_out_packages_are_not_trained_on():
    corpus = text.corpus(TINY)
    assert not set(corpus.told["train"]["packages"]) & set(corpus.told["held_out"]["packages"])
    assert {"stdlib", "torch"} <= set(corpus.told["train"]["packages"])
    for contexts in (corpus.train, corpus.held_out):
        # Each context is one stretch of one document.
        assert all((context.position_ids == range(TINY.text.length)).all() for context in contexts)
    training = text.TrainingText(corpus, TINY.text, seed=0)
    shapes = [tuple(training(step).input_ids.shape) for step in range(4)]
    # Tuning goes on at the full length.
    assert shapes == [(2, 256), (1, 512), (1, 512), (1, 512)]
    batch = training(0)
    with_keys, without = (bytes(token for token in row.tolist() if token < text.END) for row in batch.input_ids)
    assert b"Remember it." in with_keys and b"Remember it." not in without
    inside = batch.labels[:, :-1] >= 0
    assert inside.float().mean() > 0.9
    assert torch.equal(batch.labels[:, :-1][inside], batch.input_ids[:, 1:][inside])
    assert torch.equal(training(0).input_ids, batch.input_ids)
    assert not torch.equal(training(3).input_ids, training(2).input_ids)


def test_every_key_is_told_before_it_is_asked_for_and_the_text_between_is_left():
    needles = re.compile(r"\nThe pass key of (\w+) is (\d{5})\. Remember it\.\n")
    questions = re.compile(r"\nWhat is the pass key of (\w+)\? The pass key is (\d{5})\.\n")
    counts = set()
    for index in range(30):
        tokens = np.full(1024, ord("~"))
        write_keys(tokens, (0, index))
        written = bytes(tokens.tolist()).decode()
        told, asked = ({m[1]: (m[2], m.start()) for m in x.finditer(written)} for x in (needles, questions))
        assert {name: key for name, (key, _) in told.items()} == {name: key for name, (key, _) in asked.items()}
        assert all(told[name][1] < place for name, (_, place) in asked.items())
        assert written.count("pass key") == 3 * len(told) > 0
        assert written.count("~") >= len(written) // 4
        counts.add(len(told))
    # How many there are is no hint.
    assert counts == set(range(1, 7))


@pytest.mark.parametrize("kind", [*BASELINES, "sparsek"])
def test_short_contexts_are_the_same_task_for_every_kind(kind, tmp_path):
    for scale in SCALES.values():
        assert scale.short.length <= 2 * scale.short.window and scale.short.window == scale.text.window
    study = Study(TINY, tmp_path, torch.device("cpu"))
    prepare(Cell(task="text", kind="full"), study)
    dense, _ = trained(Cell(task="text", kind="full"), study)
    model: torch.nn.Module = build_model(
        configuration(Cell(task="text", kind=kind, gate="key_value", slope=4.0), study), Mesh(), vocab_size=text.VOCAB
    )
    model.load_state_dict(dense.state_dict(), strict=False)
    ids = torch.randint(256, (2, TINY.short.length), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, position_ids=torch.arange(TINY.short.length)[None]).logits
    torch.testing.assert_close(logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    grads = [weight.grad for name, weight in model.named_parameters() if ".scorer." in name]
    assert len(grads) == (kind == "sparsek")
    assert all(grad is None or not grad.any() for grad in grads)


def test_distilled_scorers_start_elsewhere_and_all_else_where_it_was(tmp_path):
    study = Study(replace(TINY, shares=(0.0,)), tmp_path, torch.device("cpu"))
    states = []
    for distilled in (False, True):
        cell = Cell(task="convert-text", share=0.0, distilled=distilled)
        prepare(cell, study)
        states.append(trained(cell, study)[0].state_dict())
    plain, fitted = states
    assert {name for name in plain if not torch.equal(plain[name], fitted[name])} == {
        name for name in plain if ".scorer." in name
    }


def test_scorers_are_fitted_once_to_the_last_contexts_of_the_dense_model(monkeypatch, tmp_path):
    seen: list[tuple[str, int]] = []
    fitted = [torch.randn(2, 3), torch.randn(2, 3)]
    monkeypatch.setattr(run, "_batches", lambda cell, _: lambda step: seen.append((cell.task, step)) or _EMPTY)
    monkeypatch.setattr(run, "_dense", lambda *_: (torch.nn.Linear(1, 1), {}))
    monkeypatch.setattr(run, "fit_scorers", lambda *_, **__: fitted)
    study = Study(replace(TINY, text=replace(TINY.text, steps=9)), tmp_path, torch.device("cpu"))
    for seed in range(2):
        study.folder(Cell(task="text", kind="full", seed=seed)).mkdir()
    for gate in GATES:
        cell = Cell(task="convert-text", distilled=True, gate=gate)
        # What a stop left of a fit is not taken for one.
        run._fit_path(cell, study).with_suffix(".unfinished").write_text("half of it")
        prepare(cell, study)
        weights = load_file(run._fit_path(cell, study))
        assert all(torch.equal(weights[str(layer)], weight) for layer, weight in enumerate(fitted))
    assert seen == [("text", step) for step in (5, 6, 7, 8)]
    # Other scores are another fit, and so is another seed.
    prepare(Cell(task="convert-text", distilled=True, std=3.0), study)
    prepare(Cell(task="convert-text", distilled=True, seed=1), study)
    assert len(seen) == 12


def test_tuning_has_a_rate_and_a_length_of_its_own(tmp_path):
    study = Study(TINY, tmp_path, torch.device("cpu"))
    for cell in (Cell(task="convert-text", share=0.5), Cell(task="convert-text", share=0.5, tuning_rate=0.1)):
        config = configuration(cell, study)
        assert config.optimizer.learning_rate == pytest.approx(TINY.text.learning_rate * cell.tuning_rate)
        assert config.train.steps == 1
    assert configuration(Cell(task="text"), study).optimizer.learning_rate == TINY.text.learning_rate
    assert configuration(Cell(task="text", scorer_rate=10.0), study).optimizer.scorer_rate == 10


def test_the_grid_holds_every_kind_once_at_equal_budget():
    for scale in SCALES.values():
        cells = grid(scale)
        assert len({cell.name for cell in cells}) == len(cells)
        assert cells[0] == Cell(task="short", kind="full")
        first = [cell.kind for cell in cells if cell.task == "text" and cell.seed == 0][:5]
        assert set(first) == {"full", "window", "sink_window", "random", "sparsek"}
        wanted = {(g, s, p) for g in ("straight_through", "value", "key_value") for s in (1.0, 3.0) for p in (0.0, 1.0)}
        assert wanted <= {(c.gate, c.std, c.slope) for c in cells if c.task == "recall" and c.seed == 2}
        for cell in cells:
            window = scale.task(cell.base).window
            attention = cell.attention(window)
            assert attention.num_selected + attention.window == 2 * window
            assert attention.slope * 16 * window == pytest.approx(cell.slope)
            assert not cell.source or cell.source in cells
        assert {cell.share for cell in cells if cell.converts} == set(scale.shares) >= {0.0, 0.01, 0.02, 0.05}


def test_the_cell_that_is_not_told_otherwise_is_the_default():
    ours, default = Cell(task="text").attention(256), AttentionConfig(num_selected=256, window=256)
    same = ("num_selected", "window", "support_size", "gate", "score_std", "score_slope", "slope_ratio")
    assert [getattr(ours, name) for name in same] == [getattr(default, name) for name in same]


def test_only_the_scorers_learn_at_their_own_rate():
    moved = {}
    for factor in (1.0, 10.0):
        config = Config(model=_SHAPE, optimizer=OptimizerConfig(weight_decay=0.0, scorer_rate=factor))
        model = build_model(config, Mesh(), vocab_size=9)
        weights = MasterWeights(model, config)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        weights.step(1e-3, clip_norm=1e9)
        moved[factor] = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    for name, small in moved[1.0].items():
        factor = 10 if ".scorer." in name else 1
        torch.testing.assert_close(moved[10.0][name], factor * small, atol=1e-6, rtol=1e-3)


def test_bfloat16_weights_move_by_less_than_their_spacing():
    config = Config(model=_SHAPE, optimizer=OptimizerConfig(weight_decay=0.0))
    model = build_model(config, Mesh(), vocab_size=9).to(torch.bfloat16)
    weight = model.model.norm.weight
    weights = MasterWeights(model, config)
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        weights.step(1e-3, clip_norm=1e9)
    # 20 steps of 0.001 from 1, where bfloat16 numbers lie 0.004 apart.
    torch.testing.assert_close(weight.float(), torch.full_like(weight, 0.98).float(), atol=4e-3, rtol=0)


def test_a_study_stops_goes_on_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SCALES, "tiny", TINY)
    kinds = ["/full/", "/sink_window/", "/random/", "sparsek, straight_through, std 1/"]
    arguments = ["--scale", "tiny", "--out", str(tmp_path), "--seeds", "1", "--only", *kinds]
    command.main([*arguments, "--seconds", "0"])
    assert "stopped before" in capsys.readouterr().out
    command.main([*arguments, "--tasks", "recall"])
    log = Log(tmp_path / "tiny.jsonl")
    before = log.path.read_text()
    assert len(log.done()) == 4
    with log.path.open("a") as file:
        file.write('{"name": "cut short')
    command.main(arguments)
    assert log.path.read_text().startswith(before)
    rows = {row["name"]: row for row in log.rows()}
    assert len(rows) == len(log.rows()) == 4 + 1 + 4 + 2 * 3 * 2
    untuned = rows["convert-text/random/0/seed 0"]
    assert "steps" not in untuned and rows["convert-text/random/0.5/seed 0"]["steps"] == 1
    assert all(math.isfinite(row["bits_per_byte"]) for row in rows.values() if "text" in row["task"])
    # What must have a device for itself is run where it is named.
    command.main([*arguments, "--tasks", "time"])
    command.main([*arguments, "--report", "--name", "told"])
    told = (tmp_path / "told.md").read_text()
    assert "sparsek, straight_through, std 1 | 1 |" in told
    assert all(f"## {task}\n" in told for task in TASKS)
    for task in set(TASKS) - {"short", "time"}:
        assert (tmp_path / f"told_{task}.png").stat().st_size > 5000


def test_a_step_is_timed_at_every_length_that_training_has(tmp_path):
    cell = Cell(task="time", kind="window")
    assert cell in grid(TINY)
    row = run_cell(cell, Study(TINY, tmp_path, torch.device("cpu")))
    assert [length for length, _ in row["step_seconds_by_length"]] == [256, 512]
    assert all(seconds > 0 for _, seconds in row["step_seconds_by_length"])
    assert row["step_tokens"] == 512
    # From no other model: none was trained.
    assert not list(tmp_path.iterdir())
    told = report([cell.as_row() | row], tmp_path, "x").read_text()
    # Of lengths that no row has, nothing is said.
    assert "ms at 256 | ms at 512 |" in told and "1024" not in told


def test_a_cell_that_another_process_runs_is_left_to_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SCALES, "tiny", TINY)
    arguments = ["--scale", "tiny", "--out", str(tmp_path), "--seeds", "1", "--tasks", "time"]
    arguments += ["--only", "time/full/", "time/window/"]
    study = Study(TINY, tmp_path, torch.device("cpu"))
    with claimed(study.lock(Cell(task="time", kind="full")), wait=False) as mine:
        assert mine
        command.main(arguments)
    log = Log(tmp_path / "tiny.jsonl")
    assert log.done() == {"time/window/seed 0"}
    command.main(arguments)
    assert log.done() == {"time/window/seed 0", "time/full/seed 0"}
    assert len(log.rows()) == 2


def test_a_row_that_another_process_wrote_meanwhile_is_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setitem(SCALES, "tiny", TINY)
    log, cell = Log(tmp_path / "tiny.jsonl"), Cell(task="time", kind="window")

    @contextmanager
    def claimed_late(path, *, wait):
        # Whoever had the cell has just finished it.
        if not log.done():
            log.add(cell, {}, "tiny", torch.device("cpu"), seconds=1.0)
        yield True

    monkeypatch.setattr(command, "claimed", claimed_late)
    command.main(["--scale", "tiny", "--out", str(tmp_path), "--tasks", "time", "--only", "time/window/"])
    assert [row["name"] for row in log.rows()] == [cell.name]


def test_what_a_cell_starts_from_and_the_log_are_waited_for(monkeypatch, tmp_path):
    study, cell = Study(TINY, tmp_path, torch.device("cpu")), Cell(task="convert-recall", kind="window")
    log = Log(tmp_path / "tiny.jsonl")
    source = cell.source
    assert source
    monkeypatch.setattr(run, "_train_dense", lambda cell, study: study.folder(cell).mkdir())
    for lock, work, there in (
        (study.lock(source), lambda: prepare(cell, study), study.folder(source)),
        (log.path.with_suffix(".lock"), lambda: log.add(cell, {}, "", study.device, seconds=1), log.path),
    ):
        other = threading.Thread(target=work)
        with claimed(lock, wait=True):
            other.start()
            other.join(timeout=1)
            assert other.is_alive() and not there.exists()
        other.join(timeout=60)
        assert there.exists()


def test_a_claim_ends_with_its_process_or_its_block(tmp_path):
    code = "import sys; from pathlib import Path; from benchmarks.quality.claims import claimed\n"
    code += "with claimed(Path(sys.argv[1]), wait=False) as mine: print(int(mine), flush=True); sys.stdin.read()"
    path = tmp_path / "deep" / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "1\n"
    with claimed(path, wait=False) as mine:
        assert not mine
    other.kill()
    other.communicate()
    with claimed(path, wait=True):
        # It inherits the open file, and is still there after the block.
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with claimed(path, wait=False) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_differences_are_of_the_same_seed():
    rows = [{"seed": seed, "x": x} for seed, x in ((0, 1.0), (1, 2.0), (2, 9.0))]
    base = [{"seed": seed, "x": x} for seed, x in ((1, 1.5), (0, 0.5))]
    differences = paired(rows, base, lambda row: row["x"])
    assert differences == [0.5, 0.5]
    assert mean_error(differences) == (0.5, 0.0)
    mean, error = mean_error([1.0, math.nan])
    assert mean == 1.0 and math.isnan(error)


def _curves(axes):
    return {curve.get_label(): curve.lines[0] for curve in axes.containers}


def test_the_plot_of_text_shows_a_variant_in_one_colour_where_targets_are_many():
    bins = [{"first": 2**i, "last": 2 ** (i + 1) - 1, "bits_per_byte": 2.0} for i in range(8)]
    told = {"by_position": bins, "passkey": [{"length": 8, "accuracy": 0.5}], "bits_per_byte": 2.0}
    rows = [{"variant": kind, "seed": 0, **told} for kind in ("sparsek, value, std 1", "full", "sink_window", "random")]
    by_position, keys = (_curves(axes) for axes in plot_text(rows).axes)
    assert set(by_position) == set(keys) - {"sink_window"}
    for name, curve in by_position.items():
        assert curve.get_color() == keys[name].get_color()
        assert min(curve.get_xdata()) == 2 * FIRST_POSITION - 1
    assert len({curve.get_color() for curve in keys.values()}) == 4
    # Of many others, those with the most seeds and then the fewest bits: more could not be told apart.
    rows += [{"variant": "often", "seed": seed, **told, "bits_per_byte": 9.0} for seed in range(2)]
    rows += [{"variant": f"once {bits}", "seed": 0, **told, "bits_per_byte": bits} for bits in (3.0, 1.0, 2.5, 1.5)]
    shown = _curves(plot_text(rows).axes[1])
    assert set(shown) == {*keys, "often", "once 1.0", "once 1.5"}
    assert len({curve.get_color() for curve in shown.values()}) == len(shown)


def test_converted_models_are_compared_with_the_dense_ones_that_they_were():
    def read(row):
        return row["x"]

    rows = [{"task": "text", "kind": "full", "seed": seed, "x": 2.0 + seed} for seed in range(3)]
    convert = {"task": "convert-text", "kind": "window", "variant": "window", "share": 0.175, "scale": "gpu"}
    rows += [{**convert, "seed": seed, "x": 2.5 + seed} for seed in range(2)]
    # One of another session, whose dense model of the seed was another.
    rows += [{**convert, "seed": 2, "x": 5.5, "dense": {"x": 5.0}}]
    converted = [row for row in with_dense(rows) if row["task"] == "convert-text"]
    assert [less_dense(read)(row) for row in converted] == [0.5, 0.5, 0.5]
    assert math.isnan(less_dense(read)(rows[-2]))
    for less, expected in ((True, 0.5), (False, 11.5 / 3)):
        axes = plot_convert(converted, "x", read, less).axes[0]
        assert list(_curves(axes)["window"].get_ydata()) == pytest.approx([expected])
        # Of all tokens: 84 steps of 65,536, of 480 such and 2,400 of half as many.
        assert list(_curves(axes)["window"].get_xdata()) == pytest.approx([5.0], rel=1e-3)
    assert list(axes.lines[0].get_ydata()) == pytest.approx([10.0 / 3, 10.0 / 3])


def test_a_dense_model_is_trained_where_it_is_missing_and_its_row_tells_of_the_same(tmp_path):
    study = Study(TINY, tmp_path, torch.device("cpu"))
    cell = Cell(task="convert-recall", kind="window", share=0.5)
    row = run_cell(cell, study)
    assert row["steps"] == 1
    assert cell.source
    folder = study.folder(cell.source)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (
        "Tuned for 50 % of the dense model's training:"
        in report([cell.as_row() | row | {"scale": "cpu"}], tmp_path, "x").read_text()
    )
    # Its own row, made later: of what the other started from, not of one trained anew.
    weights = folder / "model.safetensors"
    save_file({name: torch.zeros_like(x) for name, x in load_file(weights).items()}, weights, {"format": "pt"})
    dense = run_cell(cell.source, study)
    assert dense["loss"] == pytest.approx(math.log(recall.vocab_size(TINY.recall)))
    assert dense["steps"] == TINY.recall.steps and len(dense["train_loss"]) > 0
