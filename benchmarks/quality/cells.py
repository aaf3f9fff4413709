"""What is compared: one cell per task, attention and seed, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from benchmarks.quality.scales import Scale
from sparsek_dist.config import AttentionConfig, AttentionKind, Gate

TASKS = ("recall", "short", "text", "convert-recall", "convert-text", "time")
"""`text` goes on from the model of `short`, and a task `convert-..` from the dense model of the task after its name.
`time` is what a step of `text` takes, which only a process with a device for itself can tell."""
BASELINES: tuple[AttentionKind, ...] = ("full", "window", "sink_window", "random")
GATES: tuple[Gate, ...] = get_args(Gate)
STDS = (1.0, 3.0)
"""Of the scores at initialisation: at 3, the support is hardly more than k."""
SLOPES = (4.0, 0.0)
"""The default, and none."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: trained from scratch, or for `convert-..` tuned from the dense one of the same seed."""

    task: str
    kind: AttentionKind = "sparsek"
    gate: Gate = "value"
    std: float = 1.0
    slope: float = 4.0
    """Score that a pair loses against a new one while 16 windows pass, in the first KV head."""
    slope_ratio: float = 1.0
    """Slope of the last KV head over that of the first."""
    support: int = 4
    """S / k."""
    selected: float = 0.5
    """k / (k + w)."""
    distilled: bool = False
    """Whether the scorers start from what the dense model attends to, rather than at random."""
    scorer_rate: float = 1.0
    """Learning rate of the scorers, as a multiple of that of all other weights."""
    share: float = 0.0
    """For `convert-..`: tuning, as a share of the dense model's training."""
    tuning_rate: float = 0.3
    """For `convert-..`: peak learning rate, as a share of that of training."""
    seed: int = 0

    @property
    def converts(self) -> bool:
        return self.task.startswith("convert-")

    @property
    def base(self) -> str:
        """The task whose sizes and data it has: `recall`, `short` or `text`."""
        return "text" if self.task == "time" else self.task.removeprefix("convert-")

    @property
    def source(self) -> Cell | None:
        """The model whose weights it starts from, always a dense one of the same seed; None: it starts from none."""
        task = {"text": "short", "convert-text": "text", "convert-recall": "recall"}.get(self.task)
        return Cell(task=task, kind="full", seed=self.seed) if task else None

    @property
    def variant(self) -> str:
        """What all seeds share; names the rows of a report."""
        tuned = [f"tuned at {self.tuning_rate:g}"] if self.tuning_rate != 0.3 else []
        if self.kind != "sparsek":
            return ", ".join([self.kind, *tuned])
        words = ["sparsek", self.gate, f"std {self.std:g}"]
        to = f" to {self.slope * self.slope_ratio:g}" if self.slope_ratio != 1 else ""
        words += [f"slope {self.slope:g}{to}"] if self.slope else []
        words += [f"S {self.support} k"] if self.support != 4 else []
        words += [f"k {self.selected:.0%}"] if self.selected != 0.5 else []
        words += ["distilled"] if self.distilled else []
        words += [f"scorer rate {self.scorer_rate:g}"] if self.scorer_rate != 1 else []
        return ", ".join([*words, *tuned])

    @property
    def name(self) -> str:
        """Unique, and the same in every session."""
        share = f"/{self.share:g}" if self.converts else ""
        return f"{self.task}/{self.variant}{share}/seed {self.seed}"

    def attention(self, window: int) -> AttentionConfig:
        """Of the same budget for every kind: w + k pairs, k = w where nothing else is said."""
        num_selected = round(self.selected * 2 * window)
        return AttentionConfig(
            kind=self.kind,
            num_selected=num_selected,
            window=2 * window - num_selected,
            support=self.support * num_selected,
            gate=self.gate,
            score_std=self.std,
            slope=self.slope / (16 * window),
            slope_ratio=self.slope_ratio,
        )

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"variant": self.variant, "name": self.name}


def grid(scale: Scale) -> list[Cell]:
    """All cells: the five kinds in every task and seed, then SPARSEK's settings, then targeted questions."""
    cells: dict[str, Cell] = {}
    for cell in (*_kinds(scale), *_settings(scale), *_questions(scale), *_times()):
        cells.setdefault(cell.name, cell)
    return list(cells.values())


def _kinds(scale: Scale) -> Iterator[Cell]:
    for seed in range(scale.seeds):
        yield Cell(task="short", kind="full", seed=seed)
        for task in ("recall", "text"):
            for kind in (*BASELINES, "sparsek"):
                yield Cell(task=task, kind=kind, seed=seed)
        for task in ("convert-recall", "convert-text"):
            for share in scale.shares:
                for kind in (*BASELINES[1:], "sparsek"):
                    yield Cell(task=task, kind=kind, share=share, seed=seed)


def _settings(scale: Scale) -> Iterator[Cell]:
    """Every gate at both score scales, with and without slope; and for converted models, with fitted scorers or not."""
    for seed in range(scale.seeds):
        for task in ("convert-recall", "convert-text"):
            for share in scale.shares:
                for gate in GATES:
                    for slope in SLOPES:
                        yield Cell(task=task, gate=gate, slope=slope, share=share, seed=seed)
        for share in scale.shares:
            for gate in GATES:
                for slope in SLOPES:
                    yield Cell(task="convert-text", gate=gate, slope=slope, distilled=True, share=share, seed=seed)
        for share in scale.shares[1:]:
            # A lower rate, as 0.3 made models worse that had nothing to learn; and scorers that learn faster.
            tuned: dict[str, Any] = {"task": "convert-text", "tuning_rate": 0.1, "share": share, "seed": seed}
            yield Cell(kind="sink_window", **tuned)
            yield Cell(distilled=True, **tuned)
            yield Cell(distilled=True, scorer_rate=10.0, **tuned)
        for task in ("recall", "text"):
            for slope in (*SLOPES, 1.0):
                for std in STDS:
                    for gate in GATES:
                        yield Cell(task=task, gate=gate, std=std, slope=slope, seed=seed)


def _questions(scale: Scale) -> Iterator[Cell]:
    """One setting changed at a time: score scale, slope, the scorers' learning rate and start, support, and k of w."""
    for seed in range(scale.seeds):
        for task in ("recall", "text"):
            yield Cell(task=task, std=0.3, seed=seed)
            yield Cell(task=task, slope=16.0, seed=seed)
            yield Cell(task=task, scorer_rate=0.1, seed=seed)
            yield Cell(task=task, scorer_rate=10.0, seed=seed)
            yield Cell(task=task, support=2, seed=seed)
            yield Cell(task=task, support=8, seed=seed)
        # As they were asked of the default of then.
        before = Cell(task="recall", gate="straight_through", slope=0.0, seed=seed)
        yield replace(before, std=0.3)
        yield replace(before, support=2)
        yield replace(before, support=8)
        yield replace(before, scorer_rate=0.1)
        yield replace(before, scorer_rate=10.0)
        for gate in GATES:
            for selected in (0.5, 0.25):
                for slope, ratio in ((4.0, 1.0), (0.0, 1.0), (16.0, 1.0), (4.0, 1 / 64), (16.0, 1 / 64)):
                    slopes = {"slope": slope, "slope_ratio": ratio}
                    yield Cell(task="text", gate=gate, distilled=True, selected=selected, seed=seed, **slopes)
        for slope, ratio in ((4.0, 1.0), (16.0, 1 / 64)):
            slopes = {"slope": slope, "slope_ratio": ratio}
            yield Cell(task="text", distilled=True, scorer_rate=10.0, seed=seed, **slopes)


def _times() -> Iterator[Cell]:
    """What the same weights take with every kind, gate and slope."""
    yield from (Cell(task="time", kind=kind) for kind in BASELINES)
    yield from (Cell(task="time", gate=gate, slope=slope) for slope in SLOPES for gate in GATES)
