"""Sequence parallelism over all GPUs of this machine, against one of them, through NCCL.

    python benchmarks/two_gpus.py --out results                          # everything
    python benchmarks/two_gpus.py --out results --parts errors,bytes     # some parts
    python benchmarks/two_gpus.py --out results --data corpus --seconds 60
    python benchmarks/two_gpus.py --out results --parts curves,dense --onto two_gpus.json   # what time did not allow

Starts its own processes: first one, whose times are the baseline, then one per GPU. Without a GPU it runs two processes
through gloo at tiny sizes, which shows that it works and measures nothing. Parts:

    errors     output and gradients of a shared sequence against float64, beside the errors of one GPU
    bytes      received bytes at n and 8 n against the formulas
    links      all-gather and neighbour exchange by size of message
    layer      one attention layer, forward + backward, at a fixed number of tokens per GPU
    training   an optimizer step of a small model through DeepSpeed (ZeRO 2), likewise
    curves     training losses of 200 steps of the quickstart, the same data in the same order
    dense      dense attention in place of SPARSEK in `layer` and `training`: over all GPUs it is DeepSpeed-Ulysses

Writes two_gpus.json after every cell, so that what was measured outlives a process that does not, and two_gpus.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from machine import add_options, describe, save
from two_gpus_plan import RESULT, Plan
from two_gpus_report import plot, problems, report

SHARED_ONLY = ("errors", "bytes", "links")
PARTS = (*SHARED_ONLY, "layer", "training", "curves", "dense")
"""In the order in which they run. The last could run out of memory, and a rank that dies takes the others with it."""


def work(rank: int, world_size: int, meeting: str, plan: Plan) -> None:
    """One process. What it imports takes seconds, which the process that only starts others need not wait for."""
    from sparsek_dist.parallel.rendezvous import Ranks, initialize, shutdown
    from two_gpus_curves import measure_curves
    from two_gpus_exact import measure_bytes, measure_errors
    from two_gpus_lab import Lab
    from two_gpus_speed import measure_dense, measure_layer, measure_links, measure_training

    measures = (
        measure_errors, measure_bytes, measure_links, measure_layer, measure_training, measure_curves, measure_dense,
    )  # fmt: skip
    torch.set_num_threads(1)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, local_size=world_size)
    device = initialize(ranks, timeout=timedelta(seconds=120), init_method=f"file://{meeting}")
    lab = Lab(plan, device, rank, world_size)
    for name, measure in zip(PARTS, measures, strict=True):
        if name not in plan.parts or (world_size == 1 and name in SHARED_ONLY):
            continue
        if lab.late():
            lab.note(f"{name} on {world_size}: not run, out of time")
            continue
        begin = time.time()
        lab.attempt(name, measure)
        lab.say(f"{name} on {world_size}: {time.time() - begin:.0f} s")
    shutdown()


def launch(world_size: int, plan: Plan) -> bool:
    """Runs the parts on as many processes; whether all ended well."""
    context = multiprocessing.get_context("spawn")
    meeting = str(Path(plan.scratch) / f"meeting-{world_size}")
    processes = [
        context.Process(target=work, args=(rank, world_size, meeting, plan), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    # A rank that died leaves the others waiting, and the time is better spent on the report.
    while any(x.is_alive() for x in processes) and not any(x.exitcode for x in processes):
        time.sleep(0.1)
        if time.time() > plan.deadline + plan.patience:
            break
    for process in processes:
        process.kill()
        process.join()
    return all(process.exitcode == 0 for process in processes)


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"choose from {','.join(PARTS)}")
    return chosen


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=480)
    parser.add_argument("--parts", type=names, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--data", default="python-stdlib", help="corpus of the curves, as in data.path")
    parser.add_argument("--steps", type=int, help="of the curves")
    parser.add_argument("--onto", type=Path, help="a result of the same GPUs that has the baseline: is added to")
    return parser.parse_args()


def begun(chosen: argparse.Namespace, empty: dict[str, Any]) -> dict[str, Any]:
    """What the result begins with: nothing, or an earlier one, which then says what was added when."""
    if chosen.onto is None:
        return empty
    earlier, machine = json.loads(chosen.onto.read_text()), empty["machine"]
    if (earlier["gpus"], earlier["machine"]["name"]) != (empty["gpus"], machine["name"]):
        sys.exit(f"{chosen.onto} is of {earlier['gpus']} x {earlier['machine']['name']}: only the same GPUs compare")
    parts, size = ", ".join(chosen.parts), empty["gpus"]
    again = tuple(f"{part} on {size}" for part in chosen.parts)
    notes = [x for x in earlier["notes"] if not x.removeprefix("failed: ").startswith(again)]
    # What is measured again, replaces what was.
    kept = {part: [x for x in earlier.get(part, []) if x.get("gpus") == 1] for part in chosen.parts if part != "dense"}
    return earlier | kept | {"notes": [*notes, f"{parts} on {size}: added at commit {machine['commit']}"]}


def main() -> None:
    chosen = options()
    gpus = torch.cuda.device_count()
    if gpus == 1:
        sys.exit("this machine has one GPU: nothing can be shared (without any, two processes run on the CPU)")
    most, device = gpus or 2, "cuda" if gpus else "cpu"
    with tempfile.TemporaryDirectory(prefix="two-gpus-") as scratch:
        plan = Plan(
            out=chosen.out,
            scratch=scratch,
            deadline=time.time() + chosen.seconds,
            parts=chosen.parts,
            data=chosen.data,
            steps=chosen.steps or (200 if gpus else 3),
        )
        save(plan.out / RESULT, begun(chosen, {"machine": describe(device, chosen.commit), "gpus": most, "notes": []}))
        alone = chosen.onto is None and not set(plan.parts) <= set(SHARED_ONLY)
        for world_size in (1, most) if alone else (most,):
            # The baseline must leave time for what it is the baseline of.
            end = time.time() + 0.4 * chosen.seconds if world_size == 1 else plan.deadline
            if not launch(world_size, replace(plan, deadline=end)):
                result = json.loads((plan.out / RESULT).read_text())
                result["notes"].append(f"failed: a process of {world_size} ended early; its traceback is in the log")
                save(plan.out / RESULT, result)
    result = json.loads((plan.out / RESULT).read_text())
    report(result)
    plot(result, plan.out / "two_gpus.png")
    found = problems(result)
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
