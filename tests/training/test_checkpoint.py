"""Checkpoints: a resumed run equals an uninterrupted one bit for bit, and a damaged one is never loaded."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsek_dist.config import AttentionConfig
from sparsek_dist.errors import CheckpointError
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from sparsek_dist.training import checkpoint as checkpoint_module
from sparsek_dist.training.checkpoint import Checkpoints, Position
from sparsek_dist.training.checkpoint_names import newest_model
from tests.distributed import run_distributed
from tests.training.toys import ToyLoader, seeded_model, toy_config

STAGES = (0, 1, 2, 3)
STEPS = 6


def _export(state: dict, folder: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")


# Resuming, with DeepSpeed on two ranks


def _train(config, folder: Path, mesh, *, until: int = STEPS) -> tuple[list[dict], dict]:
    """A whole run through `fit`: its lines of metrics and its last weights, on rank 0."""
    from sparsek_dist.training.engine import build_engine, gather_weights
    from sparsek_dist.training.loop import Run, fit
    from sparsek_dist.training.metrics import MetricsLog
    from sparsek_dist.training.progress import Progress

    config = replace(config, train=replace(config.train, steps=until))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", config, mesh, _export)
    found = checkpoints.find()
    engine = build_engine(seeded_model(dropout=0.1), config, mesh)
    # A stream of its own on every rank: one rank's state for all would show.
    torch.manual_seed(100 + mesh.world.rank)
    start = checkpoints.restore(engine, found) if found else Position()
    log = MetricsLog(folder, start_step=start.step, enabled=mesh.is_main)
    held_out = {"loss": 1.0, "bits_per_byte": 1.0}
    fit(
        Run(
            config=config,
            mesh=mesh,
            engine=engine,
            loader=ToyLoader(config),
            log=log,
            progress=Progress(until, 1),
            checkpoints=checkpoints,
            evaluate=lambda: held_out,
        ),
        start,
    )
    log.close()
    weights = gather_weights(engine, mesh)
    engine.destroy()
    if not mesh.is_main:
        return [], weights
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], weights


def _resume_on_ranks(rank: int, world_size: int, folder: str) -> list:
    mesh = build_mesh(2, timeout=timedelta(seconds=60))
    results = []
    for stage in STAGES:
        root = Path(folder) / f"stage-{stage}"
        # One learning rate for both: the cosine must not know where the first attempt stopped.
        config = toy_config(
            zero_stage=stage, sequence_degree=2, save_every=2, keep_checkpoints=9, accumulation_steps=2, steps=STEPS
        )
        config = replace(config, optimizer=replace(config.optimizer, final_ratio=1.0))
        golden = _train(config, root / "golden", mesh)
        _train(config, root / "resumed", mesh, until=4)
        resumed = _train(config, root / "resumed", mesh)
        results.append((golden, resumed))
        if rank == 0:
            # A later step that was never committed must not survive as a line of the resumed run.
            with (root / "resumed" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 7, "loss": 0}\n{"step": 8, "lo')
        _train(config, root / "resumed", mesh)
        results[-1] += ((root / "resumed" / "metrics.jsonl").read_text(),)
    flipped = Path(folder) / "stage-3" / "golden" / "checkpoints" / f"step-{STEPS:08d}"
    if rank == 0:
        _flip(next((flipped / "engine").glob("*optim_states.pt")), 0.5)
    torch.distributed.barrier()
    auto = Checkpoints(flipped.parent, config, mesh, _export)
    must = Checkpoints(flipped.parent, replace(config, train=replace(config.train, resume="must")), mesh, _export)
    results.append(auto.find().name)
    try:
        must.find()
    except CheckpointError as error:
        results.append(str(error))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, run_distributed(_resume_on_ranks, 2, str(folder), timeout=150)


def _numbers(lines: list[dict]) -> list[tuple]:
    names = ("loss", "grad_norm", "lr")
    return [(line["step"], line["tokens"], *(line[name].hex() for name in names)) for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(runs, stage) -> None:
    (golden_lines, golden_weights), (lines, weights), after = runs[1][0][stage]
    assert [line["step"] for line in golden_lines] == list(range(1, STEPS + 1))
    assert _numbers(lines) == _numbers(golden_lines)
    assert len({line["loss"] for line in lines}) == STEPS
    for name, value in golden_weights.items():
        assert torch.equal(weights[name], value), name
    assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", STAGES)
def test_exported_weights_are_whole(runs, stage) -> None:
    folder, results = runs
    weights = results[0][stage][0][1]
    if stage != 3:  # that one was damaged on purpose, but not its model
        assert newest_model(folder / f"stage-{stage}" / "golden").name == "model"
    saved = load_file(newest_model(folder / f"stage-{stage}" / "golden") / "model.safetensors")
    assert saved.keys() == seeded_model().state_dict().keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_ranks_agree_on_damage(runs) -> None:
    for results in runs[1]:
        assert results[-2] == f"step-{STEPS - 2:08d}"
        assert "optim_states.pt has other content" in results[-1]


# Damage and half-written checkpoints, without DeepSpeed


class FakeEngine:
    """Saves and loads by pickle like DeepSpeed, in a world of one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.module = seeded_model()

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "states.pt").write_bytes(pickle.dumps(self.module.state_dict()))

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple:
        self.module.load_state_dict(pickle.loads((Path(folder) / tag / "states.pt").read_bytes()))
        return folder, {}


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def _config(**train):
    return toy_config(**({"steps": 50, "keep_checkpoints": 3} | train))


def _checkpoints(folder: Path, config=None, **train) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", config or _config(**train), Mesh(), _export)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run folder with checkpoints at steps 1 and 2."""
    store = _checkpoints(tmp_path)
    for step in (1, 2):
        store.save(FakeEngine(), Position(step, 100 * step))
    return tmp_path


def _flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)


FILES = ("engine/states.pt", "rng/rank-00000.safetensors", "state.json", "model/model.safetensors")
DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "first_byte": lambda file: _flip(file, 0.0),
    "middle_byte": lambda file: _flip(file, 0.5),
    "last_byte": lambda file: _flip(file, 1.0),
    "extra": lambda file: file.with_name("extra.pt").write_bytes(b"x"),
    "link": lambda file: (file.rename(file.parents[4] / "elsewhere"), file.symlink_to(file.parents[4] / "elsewhere")),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(saved, name, kind, caplog) -> None:
    file = saved / "checkpoints" / "step-00000002" / name
    if name == "state.json" and kind == "link":
        pytest.skip("the same check as for the others, one folder higher")
    DAMAGE[kind](file)
    shown = "extra.pt" if kind == "extra" else name
    with pytest.raises(CheckpointError, match=shown):
        _checkpoints(saved, resume="must").find()
    with caplog.at_level(logging.WARNING):
        assert _checkpoints(saved).find().name == "step-00000001"
    assert shown in caplog.text and "older" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 9, "files": {}}', b"\xff\xfe", None]
)
def test_damaged_manifest(saved, content) -> None:
    manifest = saved / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        _checkpoints(saved, resume="must").find()


def test_all_damaged_never_starts_afresh(saved) -> None:
    for file in saved.glob("checkpoints/step-*/state.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002.*step-00000001"):
        _checkpoints(saved).find()


def test_evil_pickle_does_not_run(saved, tmp_path) -> None:
    marker, file = tmp_path / "marker", saved / "checkpoints" / "step-00000002" / "engine" / "states.pt"
    file.write_bytes(pickle.dumps(Evil(marker)))
    store = _checkpoints(saved)
    store.restore(FakeEngine(), store.find())
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the payload must work, or this shows nothing"


class Killed(BaseException):
    """Not an Exception, so that nothing can tidy up after it."""


@pytest.mark.parametrize(
    "point", ["save_random_state", "write_state", "hash_files", "write_manifest", "_commit", "latest"]
)
def test_killed_before_commit(saved, monkeypatch, point) -> None:
    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if point == "_commit":
            patch.setattr(Checkpoints, "_commit", kill)
        elif point == "latest":
            patch.setattr(Path, "replace", kill)
        else:
            patch.setattr(checkpoint_module, point, kill)
        with pytest.raises(Killed):
            _checkpoints(saved).save(FakeEngine(), Position(3, 300))
    assert _checkpoints(saved, resume="must").find().name == "step-00000002"
    _checkpoints(saved).save(FakeEngine(), Position(3, 300))
    assert _checkpoints(saved, resume="must").find().name == "step-00000003"
    left = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert left == ["latest", "step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("content", [None, "", "step-00000009", "../../etc", "step-00000001/..", "\0", b"\xff\xff"])
def test_unusable_latest(saved, content, caplog) -> None:
    latest = saved / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        assert _checkpoints(saved).find().name == "step-00000002"
    assert "taking the newest" in caplog.text


def test_latest_is_followed(saved) -> None:
    (saved / "checkpoints" / "latest").write_text("step-00000001\n")
    store = _checkpoints(saved)
    assert store.find().name == "step-00000001"
    assert store.restore(FakeEngine(), store.find()) == Position(1, 100)


def test_resume_modes(saved, tmp_path) -> None:
    empty = tmp_path / "other"
    assert _checkpoints(empty).find() is None
    assert _checkpoints(empty, resume="never").find() is None
    with pytest.raises(CheckpointError, match="resume=auto"):
        _checkpoints(empty, resume="must").find()
    with pytest.raises(CheckpointError, match=r"run\.name"):
        _checkpoints(saved, resume="never").find()


def test_rotation(saved) -> None:
    store, folder = _checkpoints(saved, keep_checkpoints=2), saved / "checkpoints"
    outside = saved / "precious"
    outside.mkdir()
    (folder / "step-00000000").symlink_to(outside)
    (folder / "notes").mkdir()
    (folder / ".partial-step-00000007").mkdir()
    store.save(FakeEngine(), Position(3, 300))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "notes", "step-00000000", "step-00000002", "step-00000003"]
    assert outside.is_dir()


def test_rotation_keeps_one(saved) -> None:
    _checkpoints(saved, keep_checkpoints=1).save(FakeEngine(), Position(3, 300))
    assert [path.name for path in (saved / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_abandoned_attempt_is_replaced(saved) -> None:
    """Back at step 1 because step 2 was damaged: step 2 is written anew, and counts as the newest."""
    _flip(saved / "checkpoints" / "step-00000002" / "state.json", 0.5)
    store = _checkpoints(saved)
    position = store.restore(FakeEngine(), store.find())
    store.save(FakeEngine(), position.after(7))
    assert store.find().name == "step-00000002"
    assert json.loads((store.find() / "state.json").read_text())["tokens"] == 107


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("model", {"hidden_size": 256}, "model.hidden_size: 128 -> 256"),
        ("data", {"sequence_length": 32}, "data.sequence_length: 16 -> 32"),
        ("optimizer", {"betas": (0.9, 0.99)}, r"optimizer.betas: \[0.9, 0.95\] -> \[0.9, 0.99\]"),
        ("optimizer", {"scorer_rate": 10.0}, "optimizer.scorer_rate: 1.0 -> 10.0"),
        ("run", {"seed": 1}, "run.seed: 0 -> 1"),
        ("parallel", {"zero_stage": 1}, "parallel.zero_stage: 0 -> 1"),
    ],
)
def test_other_settings_are_refused(saved, section, change, told) -> None:
    config = _config()
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(CheckpointError, match=told):
        _checkpoints(saved, config).find()


def test_free_settings_may_change(saved) -> None:
    config = _config(steps=99, log_every=3, save_every=7, keep_checkpoints=5)
    config = replace(config, run=replace(config.run, name="renamed"), data=replace(config.data, cache="elsewhere"))
    assert _checkpoints(saved, config).find().name == "step-00000002"


def test_contexts_per_step_are_part_of_it(saved) -> None:
    file = saved / "checkpoints" / "step-00000002" / "state.json"
    from sparsek_dist.training.compatibility import check_compatible, read_state

    state = read_state(file.parent)
    assert state.world_size == 1
    with pytest.raises(CheckpointError, match=r"1 contexts per optimizer step, but 2 processes.* make 2: change these"):
        check_compatible(file.parent, state, _config(), 2)
    shared = replace(_config(), parallel=replace(_config().parallel, sequence_degree=2))
    check_compatible(file.parent, state, shared, 2)
    # Of a version that did not have every setting yet: what it did then is what the default does.
    older = replace(state, settings={key: value for key, value in state.settings.items() if key != "data.growth"})
    check_compatible(file.parent, older, _config(), 1)
    grown = replace(_config(), data=replace(_config().data, growth="4x1"))
    with pytest.raises(CheckpointError, match=r'data.growth: "none" -> "4x1"'):
        check_compatible(file.parent, older, grown, 1)
    # Stored is what defaults amount to, so that those of a later version change nothing.
    assert (state.settings["attention.support"], state.settings["attention.slope"]) == (256, 1 / 256)
    # Of before today's defaults, with other ones; what its kind does not use is no difference.
    before = {"attention.gate": "straight_through", "attention.slope": 0.0, "attention.support": None}
    older = replace(state, settings=state.settings | before)
    told = r'\n  attention.gate: "straight_through" -> "value"\n  attention.slope: 0.0 -> 0.00390625\nGive the'
    with pytest.raises(CheckpointError, match=told):
        check_compatible(file.parent, older, _config(), 1)
    was = AttentionConfig(gate="straight_through", slope=0.0)
    check_compatible(file.parent, older, replace(_config(), attention=was), 1)
    older = replace(older, settings=older.settings | {"attention.kind": "full"})
    check_compatible(file.parent, older, replace(_config(), attention=AttentionConfig(kind="full")), 1)
    sgd = replace(shared, optimizer=replace(shared.optimizer, name="sgd"))
    then = replace(state, settings=state.settings | {"optimizer.name": "sgd"})
    check_compatible(file.parent, then, sgd, 2)
    stage_1 = replace(sgd, parallel=replace(sgd.parallel, zero_stage=1))
    then = replace(then, settings=then.settings | {"parallel.zero_stage": 1})
    with pytest.raises(CheckpointError, match=r"optimizer\.name = sgd anew: start 1 processes"):
        check_compatible(file.parent, then, stage_1, 2)
    with pytest.raises(CheckpointError, match=r"raise train\.steps"):
        check_compatible(file.parent, state, _config(steps=1), 1)


def test_full_disk_is_told_before_writing(saved, monkeypatch) -> None:
    usage = shutil.disk_usage(saved)._replace(free=10)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="make room"):
        _checkpoints(saved).save(FakeEngine(), Position(3, 300))
    assert _checkpoints(saved, resume="must").find().name == "step-00000002"


def test_failed_write_is_told(saved, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1856 vs 1750")

    engine = FakeEngine()
    monkeypatch.setattr(engine, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match="bytes are free"):
        _checkpoints(saved).save(engine, Position(3, 300))
    assert _checkpoints(saved, resume="must").find().name == "step-00000002"


def test_random_state_round_trip(tmp_path) -> None:
    import random

    import numpy

    from sparsek_dist.training.rng import load_random_state, save_random_state

    random.gauss(0, 1), numpy.random.randn()  # leaves a second normal number behind in both
    save_random_state(tmp_path / "state", torch.device("cpu"))

    def draw() -> list:
        return [torch.rand(3).tolist(), random.gauss(0, 1), random.random(), numpy.random.randn(3).tolist()]

    first = draw()
    assert draw() != first
    load_random_state(tmp_path / "state", torch.device("cpu"))
    assert draw() == first
