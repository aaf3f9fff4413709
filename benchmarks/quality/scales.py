"""How large the study is: sizes for CPUs, and for one GPU. Within one, every kind of attention gets the same."""

from __future__ import annotations

from dataclasses import dataclass

from sparsek_dist.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of one task."""

    length: int
    """n: tokens of a context."""
    window: int
    """w, and k: half of the budget of visible pairs."""
    batch: int
    """Contexts per step."""
    steps: int
    learning_rate: float
    model: ModelConfig
    eval_contexts: int
    guess_seconds: float
    """What one cell may take, until one was timed; see `--seconds`."""

    @property
    def distances(self) -> list[int]:
        """1x to 16x the window."""
        return [self.window * 2**i for i in range(5)]


@dataclass(frozen=True, kw_only=True)
class Scale:
    name: str
    recall: Task
    text: Task
    package_bytes: int
    """Of each package that is read; the rest is left."""
    passkey_samples: int
    """Per length and depth."""
    shares: tuple[float, ...]
    """Of its training that a converted model is tuned for."""
    seeds: int

    def task(self, base: str) -> Task:
        """Of `recall` or `text`; the dense models that the tasks `convert-..` start from are those of these tasks."""
        return self.recall if base == "recall" else self.text


CPU = Scale(
    name="cpu",
    recall=Task(
        length=160,
        window=8,
        batch=16,
        steps=300,
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
    text=Task(
        length=1024,
        window=32,
        batch=2,
        steps=150,
        learning_rate=4e-3,
        # 0.4 million parameters.
        model=ModelConfig(num_layers=2, init_std=0.08),
        eval_contexts=24,
        guess_seconds=200,
    ),
    package_bytes=1_500_000,
    passkey_samples=2,
    shares=(0.0, 0.01, 0.02, 0.05, 0.2),
    seeds=3,
)

GPU = Scale(
    name="gpu",
    recall=Task(
        length=640,
        window=32,
        batch=32,
        steps=500,
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
    text=Task(
        length=16384,
        window=256,
        batch=4,
        steps=600,
        learning_rate=2e-3,
        # 18 million parameters.
        model=ModelConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_layers=6,
            num_query_heads=8,
            num_kv_heads=4,
            head_dim=64,
            rope_theta=100000.0,
            init_std=0.044,
        ),
        eval_contexts=32,
        guess_seconds=70,
    ),
    package_bytes=12_000_000,
    passkey_samples=4,
    shares=(0.0, 0.01, 0.02, 0.05),
    seeds=3,
)

SCALES = {scale.name: scale for scale in (CPU, GPU)}
