"""Runs the cells that are not done yet, the most telling first, or makes the report of those that are.

    OMP_NUM_THREADS=1 python -m benchmarks.quality --scale cpu --out quality --tasks recall
    python -m benchmarks.quality --scale gpu --out quality --seconds 540
    python -m benchmarks.quality --scale gpu --out quality --report

Every finished cell is one line of OUT/SCALE.jsonl. The same command, started again, goes on with the next one; started
several times at once (CUDA_VISIBLE_DEVICES=1 ... for a second GPU), each takes cells that no other has taken. Cells of
the task `time` need a device for themselves, and `text` a model of `short`, which all would wait for: run that first.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.quality.cells import TASKS, grid
from benchmarks.quality.claims import claimed
from benchmarks.quality.log import Log
from benchmarks.quality.report import report
from benchmarks.quality.run import Study, run_cell
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
    on_gpu = scale.name.startswith("gpu")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"--scale {scale.name} needs a CUDA device, and there is none: use --scale cpu")
    study = Study(scale, options.out, torch.device("cuda" if on_gpu else "cpu"))
    began = time.perf_counter()
    cells = [cell for cell in grid(scale) if cell.task in options.tasks]
    cells = [cell for cell in cells if not options.only or any(word in cell.name for word in options.only)]
    todo = [cell for cell in cells if cell.name not in log.done()]
    print(f"{len(cells)} cells, {len(todo)} to do", flush=True)
    for cell in todo:
        left = options.seconds - (time.perf_counter() - began)
        expected = log.expected_seconds(cell, scale.task(cell.base).guess_seconds)
        if expected > left:
            print(f"stopped before {cell.name}: it may take {expected:.0f} s, {left:.0f} s are left", flush=True)
            return
        with claimed(study.lock(cell), wait=False) as mine:
            if not mine or cell.name in log.done():
                continue
            started = time.perf_counter()
            row = run_cell(cell, study)
            log.add(cell, row, scale.name, study.device, seconds=time.perf_counter() - started)
            print(f"{cell.name}: {time.perf_counter() - started:.0f} s", flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: the scale's)")
    parser.add_argument("--only", nargs="+", default=[], help="only cells whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell that would not fit")
    parser.add_argument("--report", action="store_true", help="tables and plots of the cells that are done")
    parser.add_argument("--name", help="of the report's files; default: the scale")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
