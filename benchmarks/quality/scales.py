"""How large the study is: sizes for CPUs, and for one GPU. Within one, every kind of attention gets the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsek_dist.config import ModelConfig


@dataclass(frozen=True)
class Stage:
    length: int
    """n: tokens of a context."""
    batch: int
    """Contexts per step."""
    steps: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of one task."""

    stages: tuple[Stage, ...]
    """Training, from the shortest contexts to those of the test."""
    window: int
    """w, and k: half of the budget of visible pairs."""
    learning_rate: float
    model: ModelConfig
    eval_contexts: int
    guess_seconds: float
    """What one cell may take, until one was timed; see `--seconds`."""

    @property
    def length(self) -> int:
        return self.stages[-1].length

    @property
    def batch(self) -> int:
        """Of the last stage, of tuning after it, and of tests."""
        return self.stages[-1].batch

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def distances(self) -> list[int]:
        """1x to 16x the window."""
        return [self.window * 2**i for i in range(5)]


@dataclass(frozen=True, kw_only=True)
class Scale:
    name: str
    recall: Task
    short: Task
    """Text, w + k tokens a context, where every kind of attention sees everything: the first part of a training."""
    text: Task
    """Text, from the model of `short` on."""
    package_bytes: int
    """Of each package that is read; the rest is left."""
    needles: int
    """Pass keys in each text that tests for them."""
    passkey_samples: int
    """Per length and depth."""
    shares: tuple[float, ...]
    """Of its training that a converted model is tuned for."""
    seeds: int

    def task(self, base: str) -> Task:
        """Of `recall`, `short` or `text`."""
        return {"recall": self.recall, "short": self.short, "text": self.text}[base]

    @property
    def passkey_lengths(self) -> list[int]:
        """From where every kind sees everything to the whole context, doubling."""
        return [length for i in range(20) if (length := self.short.length * 2**i) <= self.text.length]


_CPU_TEXT = Task(
    stages=(Stage(256, 16, 60), Stage(512, 8, 50), Stage(1024, 4, 40)),
    window=64,
    learning_rate=1e-3,
    # 0.9 million parameters, which find no pass keys after so little.
    model=ModelConfig(num_layers=4, init_std=0.08, max_positions=1024),
    eval_contexts=24,
    guess_seconds=300,
)
_GPU_TEXT = Task(
    stages=(Stage(1024, 64, 150), Stage(2048, 32, 120), Stage(4096, 16, 90), Stage(8192, 8, 60), Stage(16384, 4, 60)),
    window=256,
    learning_rate=5e-4,
    # 18 million parameters.
    model=ModelConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_layers=6,
        num_query_heads=8,
        num_kv_heads=4,
        head_dim=64,
        rope_theta=100000.0,
        max_positions=16384,
        init_std=0.044,
    ),
    eval_contexts=32,
    guess_seconds=40,
)

CPU = Scale(
    name="cpu",
    recall=Task(
        stages=(Stage(160, 16, 300),),
        window=8,
        learning_rate=1e-2,
        # One KV head, so that a model has one chance per layer to keep the right pairs.
        model=ModelConfig(
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_query_heads=2,
            num_kv_heads=1,
            head_dim=32,
            init_std=0.125,
        ),
        eval_contexts=128,
        guess_seconds=120,
    ),
    short=replace(_CPU_TEXT, stages=(Stage(128, 32, 600),), learning_rate=3e-3, guess_seconds=300),
    text=_CPU_TEXT,
    package_bytes=1_500_000,
    needles=1,
    passkey_samples=16,
    shares=(0.0, 0.01, 0.02, 0.05, 0.2),
    seeds=3,
)

GPU = Scale(
    name="gpu",
    recall=Task(
        stages=(Stage(640, 32, 500),),
        window=32,
        learning_rate=4e-3,
        model=ModelConfig(
            hidden_size=128,
            intermediate_size=256,
            num_layers=2,
            num_query_heads=4,
            num_kv_heads=2,
            head_dim=32,
            init_std=0.088,
        ),
        eval_contexts=256,
        guess_seconds=20,
    ),
    short=replace(_GPU_TEXT, stages=(Stage(512, 64, 2400),), learning_rate=1e-3, guess_seconds=100),
    text=_GPU_TEXT,
    package_bytes=12_000_000,
    needles=4,
    passkey_samples=16,
    shares=(0.0, 0.01, 0.02, 0.05),
    seeds=3,
)

SCALES = {scale.name: scale for scale in (CPU, GPU)}
