"""Lays the loss curves of runs over each other: Triton against PyTorch, one rank against many.

    python benchmarks/overlay.py runs/a runs/b --out overlay.png

Prints, for every run after the first, the largest relative difference of the training loss over their common steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_losses(run: Path) -> dict[int, float]:
    """Step -> training loss; of a step that was repeated after a resume, the last."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def largest_difference(losses: dict[int, float], others: dict[int, float]) -> tuple[float, int]:
    """Relative, and the step at which it occurs."""
    common = losses.keys() & others.keys()
    if not common:
        raise SystemExit("the runs have no step in common")
    step = max(common, key=lambda i: abs(others[i] - losses[i]) / abs(losses[i]))
    return abs(others[step] - losses[step]) / abs(losses[step]), step


def draw(curves: dict[str, dict[int, float]], top: Any, bottom: Any) -> None:
    """Losses above, relative differences to the first curve below; prints the largest of each."""
    first, *rest = curves
    for index, (name, losses) in enumerate(curves.items()):
        style = "-" if index == 0 else "--"
        top.plot(losses.keys(), losses.values(), f"C{index}", label=name, linewidth=max(3 - index, 1), linestyle=style)
    for index, name in enumerate(rest, start=1):
        difference, step = largest_difference(curves[first], curves[name])
        print(f"{name} against {first}: loss differs by at most {difference:.2e} of its value, at step {step}")
        common = sorted(curves[first].keys() & curves[name].keys())
        relative = [abs(curves[name][i] - curves[first][i]) / abs(curves[first][i]) for i in common]
        bottom.semilogy(common, [max(x, 1e-9) for x in relative], f"C{index}", label=name)
    top.set_ylabel("training loss")
    top.legend()
    bottom.set_ylabel(f"difference to\n{first}, relative")
    bottom.set_xlabel("step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, the first is what the others are held against")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    curves = {run.name: read_losses(run) for run in options.runs}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1])
    draw(curves, top, bottom)
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
