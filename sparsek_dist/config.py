"""Every setting of a run: one tree of dataclasses.

settings.py reads and writes it, relations.py says what can stand together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

Gate = Literal["straight_through", "value", "key_value"]
AttentionKind = Literal["sparsek", "random", "sink_window", "window", "full"]
NUM_SINKS = 4
"""First tokens of a document that the `sink_window` baseline always keeps."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Folder of this run below `run.root`: letters, digits, `.`, `_`, `-`."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seeds the weights, the order of the data and the random scores of the `random` baseline."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    source: str | None = None
    """Folder or hub id of a pretrained model to go on from, dense or converted; its shape is then not set here."""
    rope: Literal["keep", "linear", "yarn"] = "keep"
    """How the rotary positions of `source` are stretched to a longer `data.sequence_length`, if at all."""
    type: Literal["llama"] = "llama"
    """Architecture of a model from scratch, by its `model_type` in transformers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 384
    """Width of the MLP."""
    num_layers: int = 4
    """Decoder layers."""
    num_query_heads: int = 4
    """Query heads per layer."""
    num_kv_heads: int = 2
    """KV heads per layer; must divide `num_query_heads`. Each selects its own pairs."""
    head_dim: int = 32
    """Width of one head."""
    rope_theta: float = 10000.0
    """Base of the rotary positions; larger for longer contexts."""
    max_positions: int | None = None
    """Longest context that later runs may take the model to. Default `data.sequence_length`."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; narrow models start faster with about hidden_size ** -0.5."""
    tie_embeddings: bool = False
    """Share the input embedding with the output projection."""


DERIVED = ("support", "slope")
"""Settings of the attention whose defaults follow from others."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    kind: AttentionKind = "sparsek"
    """`sparsek`, or a baseline with the same budget of `num_selected + window` pairs per query (`full`: all pairs)."""
    num_selected: int = 64
    """k: pairs kept outside the window, per KV head. 0 leaves the window alone."""
    window: int = 64
    """w: newest tokens every query sees, itself included; at least 1."""
    support: int | None = None
    """S: best candidates the soft gates are computed over; more than `num_selected`. Default 4 * num_selected."""
    gate: Gate = "value"
    """How a gate enters: `value` scales v, `key_value` scales k and v, `straight_through` only the gradient."""
    score_std: float = 1.0
    """Standard deviation of the scores at initialisation; a tiny one makes every gate about k/n."""
    slope: float | None = None
    """Added to the score per token of position: above 0, newer pairs are preferred. Default 1 / (2 k + 2 w)."""
    slope_ratio: float = 1.0
    """Slope of the last KV head over that of the first; equal ratios between. Below 1, some heads keep for longer."""
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Implementation. `auto` takes the fastest that can run here and says which."""
    full_layers: str = "none"
    """Layers that stay dense: `none`, `every_other` (1, 3, 5, ...), or their indices, as in `0,5,11`."""
    sliding_layers: Literal["keep", "replace"] = "keep"
    """Layers that a pretrained model slides a window over: `keep` them so, or give them SPARSEK attention, too."""

    @property
    def support_size(self) -> int:
        """S, with its default filled in."""
        return 4 * self.num_selected if self.support is None else self.support

    @property
    def score_slope(self) -> float:
        """Slope per token, with its default: a pair loses a point while twice as many tokens pass as a query sees."""
        return 1 / (2 * (self.num_selected + self.window)) if self.slope is None else self.slope

    def settled(self) -> AttentionConfig:
        """What this amounts to: defaults that depend on others filled in, and what its kind does not use left out.

        It is what is stored and compared: so a later version's defaults change no model, and equal ones are equal.
        """
        if self.kind == "sparsek":
            return replace(self, support=self.support_size, slope=self.score_slope)
        return replace(self, support=None, slope=None, gate="value", score_std=1.0, slope_ratio=1.0)

    def apart(self, other: AttentionConfig) -> dict[str, Any]:
        """Settings that would make `other` work as this does; not those that would follow from the rest."""
        mine, theirs = asdict(self.settled()), asdict(other.settled())
        direct = {name: mine[name] for name in mine if name not in DERIVED and mine[name] != theirs[name]}
        theirs = asdict(replace(other, **direct).settled())
        return direct | {name: mine[name] for name in mine if mine[name] != theirs[name]}

    @property
    def reach(self) -> int:
        """Newest tokens a query sees unconditionally; what a sequence-parallel shard must at least hold."""
        budget = self.num_selected + self.window
        return {"window": budget, "sink_window": budget - NUM_SINKS}.get(self.kind, self.window)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    parameters: Literal["all", "scorer", "lora"] = "all"
    """What learns: all weights, the scorers alone, or the scorers and low-rank updates (needs peft)."""
    lora_rank: int = 16
    """Rank of the updates."""
    lora_alpha: int = 32
    """The updates are scaled by lora_alpha / lora_rank."""
    lora_layers: str = "all"
    """Names of the linear layers that get one, as in `q_proj,v_proj`; `all` is every one in the blocks."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = "python-stdlib"
    """`python-stdlib` (the running Python's own library), a .txt/.jsonl/.parquet file or folder, or a hub id."""
    column: str = "text"
    """Column that holds the text of a document."""
    tokenizer: str = "bytes"
    """`bytes`, or a folder or hub id of a transformers tokenizer."""
    sequence_length: int = 2048
    """Tokens of one context, over all sequence-parallel ranks."""
    growth: str = "none"
    """Shorter contexts to begin with, as in `1024x150,2048x100`: for so many steps each, of as many tokens as ever."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation; 0 < held_out < 1."""
    cache: str = ".cache/tokens"
    """Folder for tokenised corpora; safe to delete."""

    @property
    def first_lengths(self) -> list[tuple[int, int]]:
        """`growth` as (tokens of a context, steps). With a colon, YAML would read one pair as minutes and seconds."""
        if self.growth == "none":
            return []
        return [(int(length), int(steps)) for length, steps in (part.split("x") for part in self.growth.split(","))]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    sequence_degree: int = 1
    """p: ranks that share one sequence, each with a contiguous shard. Sequences are padded to a multiple of it."""
    exchange: Literal["auto", "all_gather", "scan"] = "auto"
    """How selected pairs reach later ranks: all at once, or in log2(p) rounds; `auto` gathers up to degree 8."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage, 0 to 3: what is partitioned over all ranks."""
    timeout_minutes: float = 10.0
    """How long a collective may wait for a silent rank."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, passed through as they are: those in relations.DEEPSPEED_KEYS."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer from torch.optim; `sgd` (no momentum) serves the tests that compare single steps."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    scorer_rate: float = 1.0
    """The scorers' learning rate, and with it their decay, as a multiple of that of all other weights [ours].

    Refused if it is not 1 where no scorer learns. Logged as `scorer_lr`.
    """
    final_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak (cosine decay)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors and embeddings are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's running means."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 300
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 1
    """Contexts in one forward pass of one sequence-parallel group."""
    accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; `auto` is bfloat16 on GPUs, float32 on CPUs. Scores are always float32."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    log_every: int = 10
    """Steps between log lines (metrics.jsonl holds every step)."""
    eval_every: int = 100
    """Steps between evaluations; 0 for only at the end."""
    eval_sequences: int = 32
    """Held-out contexts per evaluation; 0 for all."""
    observe_every: int = 100
    """Steps between pictures and statistics of the selection; 0 for never."""
    compare_every: int = 100
    """Steps between comparisons of all parameters over all ranks, bit for bit; 0 for never."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints to keep."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto` continues from the newest checkpoint if there is one; `must` needs one; `never` refuses a used folder."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def shard_length(self) -> int:
        """Tokens of one context on one rank, up to p - 1 of padding on the last included."""
        return -(-self.data.sequence_length // self.parallel.sequence_degree)

    def data_parallel_degree(self, world_size: int) -> int:
        """Sequence-parallel groups, each reading different contexts."""
        return world_size // self.parallel.sequence_degree

    def sequences_per_step(self, world_size: int) -> int:
        """Contexts in one optimizer step, over all ranks."""
        return self.data_parallel_degree(world_size) * self.train.micro_batch_size * self.train.accumulation_steps


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for comparing two configurations."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {prefix + entry.name: value}
    return flat
