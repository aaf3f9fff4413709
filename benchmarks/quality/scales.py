"""How large the study is: sizes for CPUs, and two for a GPU. Within one, every kind of attention gets the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

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
    growth: tuple[tuple[int, int], ...] = ()
    """Shorter contexts in the first of these steps, as in `data.growth`."""
    learning_rate: float
    model: ModelConfig
    eval_contexts: int
    guess_seconds: float
    """What one cell may take, until one was timed; see `--seconds`."""

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The first step of each length of context, and that length, in tokens."""
        ends = list(accumulate((steps for _, steps in self.growth), initial=0))
        return list(zip(ends, [*(length for length, _ in self.growth), self.length], strict=True))

    @property
    def tokens(self) -> int:
        """Of the whole training; shorter contexts do not change how many a step has."""
        return self.steps * self.batch * self.length

    @property
    def distances(self) -> list[int]:
        """1x to 16x the window."""
        return [self.window * 2**i for i in range(5)]


@dataclass(frozen=True, kw_only=True)
class Scale:
    name: str
    on_gpu: bool
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

    def tuned(self, base: str, share: float) -> float:
        """A share of a dense model's last training as one of all that it was trained on, `short` counted in."""
        return share * self.text.tokens / (self.short.tokens + self.text.tokens) if base == "text" else share

    @property
    def passkey_lengths(self) -> list[int]:
        """From where every kind sees everything to the whole context, doubling."""
        return [length for i in range(20) if (length := self.short.length * 2**i) <= self.text.length]


_CPU_TEXT = Task(
    length=1024,
    window=64,
    batch=4,
    steps=150,
    growth=((256, 60), (512, 50)),
    learning_rate=1e-3,
    # 0.9 million parameters, which find no pass keys after so little.
    model=ModelConfig(num_layers=4, init_std=0.08, max_positions=1024),
    eval_contexts=24,
    guess_seconds=300,
)
_GPU_TEXT = Task(
    length=16384,
    window=256,
    batch=4,
    steps=480,
    growth=((1024, 150), (2048, 120), (4096, 90), (8192, 60)),
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
    on_gpu=False,
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
    short=replace(_CPU_TEXT, length=128, batch=32, steps=600, growth=(), learning_rate=3e-3, guess_seconds=300),
    text=_CPU_TEXT,
    package_bytes=1_500_000,
    needles=1,
    passkey_samples=16,
    shares=(0.0, 0.01, 0.02, 0.05, 0.2),
    seeds=3,
)

GPU = Scale(
    name="gpu",
    on_gpu=True,
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
    short=replace(_GPU_TEXT, length=512, batch=64, steps=2400, growth=(), learning_rate=1e-3, guess_seconds=100),
    text=_GPU_TEXT,
    package_bytes=12_000_000,
    needles=4,
    passkey_samples=16,
    # The last three are 1, 2 and 5 % of all its bytes, those of `short` counted in.
    shares=(0.0, 0.01, 0.02, 0.05, 0.035, 0.07, 0.175),
    seeds=3,
)

_LONG_TEXT = replace(
    GPU.text,
    length=65536,
    window=512,
    batch=1,
    steps=500,
    growth=((2048, 150), (4096, 120), (8192, 90), (16384, 60), (32768, 40)),
    # Positions that are far apart must differ more slowly.
    model=replace(GPU.text.model, rope_theta=500000.0, max_positions=65536),
    eval_contexts=8,
    guess_seconds=60,
)
LONG = replace(
    GPU,
    name="gpu-long",
    short=replace(
        _LONG_TEXT,
        length=1024,
        batch=64,
        steps=1200,
        growth=(),
        learning_rate=1e-3,
        eval_contexts=128,
        guess_seconds=100,
    ),
    text=_LONG_TEXT,
)
"""As `gpu`, with contexts four times as long and twice the budget of visible pairs."""

SCALES = {scale.name: scale for scale in (CPU, GPU, LONG)}
