"""The study of quality: its data mean what they say, its cells are at equal budget, it resumes, and it reports."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import recall, text
from benchmarks.quality.cells import TASKS, Cell, grid
from benchmarks.quality.log import Log
from benchmarks.quality.plots import FIRST_POSITION, plot_convert, plot_text
from benchmarks.quality.report import report
from benchmarks.quality.run import MasterWeights, Study, run_cell
from benchmarks.quality.scales import CPU, GPU, SCALES
from benchmarks.quality.summary import mean_error, paired
from sparsek_dist.config import Config, ModelConfig, OptimizerConfig
from sparsek_dist.models.build import build_model
from sparsek_dist.parallel.mesh import Mesh

_SHAPE = ModelConfig(hidden_size=16, intermediate_size=16, num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=16)
TINY = replace(
    CPU,
    name="tiny",
    recall=replace(CPU.recall, steps=2, batch=2, eval_contexts=8, model=_SHAPE),
    text=replace(CPU.text, length=256, window=8, steps=2, batch=2, eval_contexts=4, model=_SHAPE),
    package_bytes=20_000,
    passkey_samples=1,
    shares=(0.0, 0.5),
    seeds=2,
)


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
    training = text.TrainingText(corpus, TINY, seed=0)
    batch = training(0)
    written = bytes(token for token in batch.input_ids[0].tolist() if token < text.END)
    assert b"What is the pass key? The pass key is" in written
    assert torch.equal(batch.labels[0, :50], batch.input_ids[0, 1:51])
    assert torch.equal(training(0).input_ids, batch.input_ids)
    assert not torch.equal(training(2).input_ids, batch.input_ids)


def test_the_grid_holds_every_kind_once_at_equal_budget():
    for scale in SCALES.values():
        cells = grid(scale)
        assert len({cell.name for cell in cells}) == len(cells)
        first = [cell.kind for cell in cells if cell.task == "text" and cell.seed == 0][:5]
        assert set(first) == {"full", "window", "sink_window", "random", "sparsek"}
        wanted = {(g, s, p) for g in ("straight_through", "value", "key_value") for s in (1.0, 3.0) for p in (0.0, 1.0)}
        assert wanted <= {(c.gate, c.std, c.slope) for c in cells if c.task == "recall" and c.seed == 2}
        for cell in cells:
            window = scale.task(cell.base).window
            attention = cell.attention(window)
            assert attention.num_selected + attention.window == 2 * window
            assert attention.slope * 16 * window == pytest.approx(cell.slope)
        assert {cell.share for cell in cells if cell.converts} == set(scale.shares) >= {0.0, 0.01, 0.02, 0.05}


def test_only_the_scorers_learn_at_their_own_rate():
    config = Config(model=_SHAPE, optimizer=OptimizerConfig(weight_decay=0.0))
    moved = {}
    for factor in (1.0, 10.0):
        model = build_model(config, Mesh(), vocab_size=9)
        weights = MasterWeights(model, config, scorer_rate=factor)
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
    weights = MasterWeights(model, config, scorer_rate=1.0)
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
    command.main([*arguments, "--tasks", "recall", "text", "convert-recall", "convert-text"])
    assert log.path.read_text().startswith(before)
    rows = {row["name"]: row for row in log.rows()}
    assert len(rows) == len(log.rows()) == 4 + 4 + 2 * 3 * 2
    untuned = rows["convert-text/random/0/seed 0"]
    assert "steps" not in untuned and rows["convert-text/random/0.5/seed 0"]["steps"] == 1
    assert all(math.isfinite(row["bits_per_byte"]) for row in rows.values() if "text" in row["task"])
    command.main([*arguments, "--report", "--name", "told"])
    told = (tmp_path / "told.md").read_text()
    assert "sparsek, straight_through, std 1 | 1 |" in told
    for task in TASKS:
        assert (tmp_path / f"told_{task}.png").stat().st_size > 5000


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
    rows = [
        {"variant": kind, "seed": 0, "by_position": bins, "passkey": [{"length": 8, "log_likelihood": -11.5}]}
        for kind in ("sparsek, value, std 1", "full", "window", "random")
    ]
    by_position, keys = (_curves(axes) for axes in plot_text(rows).axes)
    assert set(by_position) == set(keys) - {"window"}
    for name, curve in by_position.items():
        assert curve.get_color() == keys[name].get_color()
        assert min(curve.get_xdata()) == 2 * FIRST_POSITION - 1
    assert len({curve.get_color() for curve in keys.values()}) == 4


def test_the_plot_of_converted_text_is_paired_with_the_dense_model_of_the_seed():
    dense = [{"seed": seed, "x": 2.0 + seed} for seed in range(2)]
    rows = [{"variant": "window", "seed": seed, "share": 0.0, "x": 2.5 + seed} for seed in range(2)]
    for less_dense, expected in ((True, 0.5), (False, 3.0)):
        figure = plot_convert(rows, dense, "x", lambda row: row["x"], less_dense)
        assert list(_curves(figure.axes[0])["window"].get_ydata()) == [expected]


def test_a_dense_model_is_trained_where_it_is_missing(tmp_path):
    study = Study(TINY, tmp_path, torch.device("cpu"))
    cell = Cell(task="convert-recall", kind="window", share=0.5)
    row = run_cell(cell, study)
    assert row["steps"] == 1
    assert json.loads((study.dense_folder(cell) / "config.json").read_text())["model_type"] == "llama"
    assert report([cell.as_row() | row], tmp_path, "x").is_file()
