"""metrics.jsonl, TensorBoard, progress lines, and the run folder with its lock."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal

import matplotlib.figure
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsek_dist.errors import ConfigError
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.training.metrics import MetricsLog
from sparsek_dist.training.progress import Progress
from sparsek_dist.training.run_folder import describe_run, open_run_folder
from tests.training.toys import toy_config


def _lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write(folder, steps, *, start_step: int = 0, offset: float = 0.0) -> None:
    log = MetricsLog(folder, start_step=start_step)
    for step in steps:
        log.step(step, {"loss": step + offset})
    log.close()


def test_one_line_per_step(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    log.step(1, {"loss": 2.5, "tokens": 7})
    # Readable at once: a run that is killed leaves what it has done.
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.5, "tokens": 7}]
    log.step(2, {"loss": float("nan")})
    assert _lines(tmp_path)[1] == {"step": 2, "loss": None}
    log.close()


def test_resume_drops_later_lines(tmp_path) -> None:
    _write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    _write(tmp_path, [3, 4, 5], start_step=2, offset=0.5)
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 1), (2, 2), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert not (tmp_path / "metrics.jsonl.new").exists()


def test_tensorboard_shows_each_step_once(tmp_path) -> None:
    _write(tmp_path, [1, 2, 3, 4])
    _write(tmp_path, [3, 4], start_step=2, offset=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]


def test_figure(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    log.figure("selection", matplotlib.figure.Figure(figsize=(1, 1)), 3)
    log.close()
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("selection")[0].step == 3


def test_other_ranks_write_nothing(tmp_path) -> None:
    log = MetricsLog(tmp_path, enabled=False)
    log.step(1, {"loss": 1.0})
    log.figure("selection", None, 1)
    log.close()
    assert not list(tmp_path.iterdir())


def test_progress(caplog) -> None:
    now = iter([0.0, 10.0, 30.0])
    progress = Progress(100, 10, clock=lambda: next(now))
    record = {"loss": 2.0, "bits_per_byte": 2.9, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.5}
    with caplog.at_level(logging.INFO):
        progress.start(40)
        for step in range(41, 51):
            progress.step(step, record)
        progress.step(51, record | {"held_out/loss": 3.0, "held_out/bits_per_byte": 4.0})
    assert [line.split(":")[0] for line in caplog.messages] == ["step 41/100", "step 50/100", "step 51"]
    assert "learning rate 1.00e-03, gradient norm" in caplog.messages[0]
    # Ten steps took 30 s, fifty remain.
    assert caplog.messages[1].endswith("1,234 tokens/s, 0:02:30 to go")


def test_progress_tells_the_rate_of_scorers_where_it_is_another(caplog) -> None:
    record = {
        "loss": 2.0,
        "bits_per_byte": 2.9,
        "lr": 1e-3,
        "scorer_lr": 1e-2,
        "grad_norm": 0.5,
        "tokens_per_second": 1,
    }
    with caplog.at_level(logging.INFO):
        Progress(9, 1).step(1, record)
    assert "learning rate 1.00e-03 (1.00e-02 of the scorers), gradient norm" in caplog.text


def test_run_folder_explains_itself(tmp_path, capsys) -> None:
    logger = logging.getLogger("sparsek_dist.test")
    with open_run_folder(tmp_path / "runs" / "x", Mesh()) as folder:
        describe_run(folder, toy_config(), Mesh())
        logger.info("hello")
        logging.getLogger("other").info("chatter")
    logger.info("afterwards")
    assert capsys.readouterr().out == "hello\n"
    text = (folder / "logs" / "rank-00000.log").read_text()
    assert "hello" in text and "chatter" in text and "afterwards" not in text
    assert "sequence_length: 16" in (folder / "config.yaml").read_text()
    about = json.loads((folder / "environment.json").read_text())
    assert about["processes"] == about["hosts"] == 1 and about["packages"]["torch"]


def _hold(folder, pipe) -> None:
    with open_run_folder(folder, Mesh()):
        pipe.send("held")
        pipe.recv()


def test_lock(tmp_path, caplog) -> None:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path, its), daemon=True)
    holder.start()
    try:
        assert mine.poll(60) and mine.recv() == "held"
        told = rf"process {holder.pid} on host .*another run\.name"
        with pytest.raises(ConfigError, match=told), open_run_folder(tmp_path, Mesh()):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.join(10)
        with caplog.at_level(logging.WARNING), open_run_folder(tmp_path, Mesh()):
            assert f"process {holder.pid} on host" in caplog.text
        caplog.clear()
        with open_run_folder(tmp_path, Mesh()):
            assert not caplog.text
    finally:
        holder.kill()
        holder.join()


def test_unusable_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root"), open_run_folder(tmp_path / "file" / "run", Mesh()):
        pass
