"""Runs the cells that are not done yet, the most telling first, or makes the report of those that are.

    OMP_NUM_THREADS=1 python -m benchmarks.quality --scale cpu --out quality --tasks recall
    python -m benchmarks.quality --scale gpu --out quality --seconds 540
    python -m benchmarks.quality --scale gpu --out quality --report

Every finished cell is one line of OUT/SCALE.jsonl. The same command, started again, goes on with the next one; started
several times at once (CUDA_VISIBLE_DEVICES=1 ... for a second GPU), each takes cells that no other has taken. `text`
needs a model of `short`, which all would wait for: run that first. The task `time`, which is run only when it is named,
needs a device for itself.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.quality.cells import TASKS, Cell, grid
from benchmarks.quality.claims import claimed
from benchmarks.quality.log import Log
from benchmarks.quality.report import report
from benchmarks.quality.run import Study, prepare, run_cell
from benchmarks.quality.scales import SCALES


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    logging.getLogger("sparsek_kernels").setLevel(logging.INFO)
    log = Log(options.out / f"{options.scale}.jsonl")
    if options.report:
        report(log.rows(), options.out, options.name or options.scale)
        return
    scale = SCALES[options.scale]
    scale = replace(scale, seeds=options.seeds or scale.seeds)
    if scale.on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"--scale {scale.name} needs a CUDA device, and there is none: use --scale cpu")
    study = Study(scale, options.out, torch.device("cuda" if scale.on_gpu else "cpu"))
    cells = [cell for cell in grid(scale) if cell.task in options.tasks]
    cells = [cell for cell in cells if not options.only or any(word in cell.name for word in options.only)]
    print(f"{len(cells)} cells, {len(_not_done(cells, log))} to do", flush=True)
    end = time.perf_counter() + options.seconds
    # Again, as what another process had taken may be left by it, or have been taken as a start for others only.
    while (todo := _not_done(cells, log)) and _run_free(todo, study, log, end):
        pass
    if left := _not_done(cells, log):
        print(f"{len(left)} cells are not done, such as {left[0].name}: start again for those", flush=True)


def _not_done(cells: Sequence[Cell], log: Log) -> list[Cell]:
    done = log.done()
    return [cell for cell in cells if cell.name not in done]


def _run_free(cells: Sequence[Cell], study: Study, log: Log, end: float) -> bool:
    """Runs the cells that no other process has, until time is up; whether there were any, and time for all."""
    ran = False
    for cell in cells:
        with claimed(study.lock(cell), wait=False) as mine:
            if not mine or cell.name in log.done():
                continue
            if not _fits(cell, study, log, end):
                return False
            # That may take time of its own, or wait for somebody else's.
            prepare(cell, study)
            if not _fits(cell, study, log, end):
                return False
            started = time.perf_counter()
            row = run_cell(cell, study)
            seconds = time.perf_counter() - started
            log.add(cell, row, study.scale.name, study.device, seconds=seconds)
            print(f"{cell.name}: {seconds:.0f} s", flush=True)
            ran = True
    return ran


def _fits(cell: Cell, study: Study, log: Log, end: float) -> bool:
    left = end - time.perf_counter()
    expected = log.expected_seconds(cell, study.scale.task(cell.base).guess_seconds)
    if expected > left:
        print(f"stopped before {cell.name}: it may take {expected:.0f} s, {left:.0f} s are left", flush=True)
    return expected <= left


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[x for x in TASKS if x != "time"])
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: the scale's)")
    parser.add_argument("--only", nargs="+", default=[], help="only cells whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell that would not fit")
    parser.add_argument("--report", action="store_true", help="tables and plots of the cells that are done")
    parser.add_argument("--name", help="of the report's files; default: the scale")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
