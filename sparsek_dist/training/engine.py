"""DeepSpeed's settings, derived from ours by a pure function, and the engine made from them.

DeepSpeed learns the sequence-parallel degree by its number alone (`sequence_parallel_size`), never through groups of
its own: given groups, it divides gradients differently on different ZeRO stages. By the number it divides by the
world size on all four, which parallel/loss.py undoes. tests/training/test_gradient_scale.py pins this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn

from sparsek_dist.config import Config
from sparsek_dist.errors import ConfigError
from sparsek_dist.parallel.mesh import Mesh
from sparsek_dist.training.optim import build_optimizer

Precision = Literal["float32", "bfloat16"]
BUCKET_ELEMENTS = 50_000_000
"""Elements per reduction and gathering bucket: 200 MB in float32, where larger ones stop helping."""
NEVER = 2**62
"""As `steps_per_print`: DeepSpeed's own step lines would only repeat ours."""


def resolve_precision(config: Config, *, on_gpu: bool) -> Precision:
    """`auto` is bfloat16 on GPUs and float32 on CPUs."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bfloat16" if on_gpu else "float32"


def deepspeed_config(config: Config, world_size: int, *, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's settings for this run: the derived ones, then `parallel.deepspeed` as it is."""
    train, stage = config.train, config.parallel.zero_stage
    derived: dict[str, Any] = {
        # All three, or DeepSpeed computes the first as a float.
        "train_batch_size": config.sequences_per_step(world_size),
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation_steps,
        "sequence_parallel_size": config.parallel.sequence_degree,
        # Left out, it would be 1.0, not off.
        "gradient_clipping": config.optimizer.clip_norm,
        "communication_data_type": "fp32",
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_optimization": {"stage": stage, **_bucket_sizes(stage)},
    }
    if precision == "bfloat16" and stage >= 2:
        # Sums of many small bfloat16 gradients lose precision. Stage 0 cannot accumulate in float32, and stage 1 gives
        # wrong gradients with accumulation_steps > 1 when asked to (1.5 times the true ones at 2, in 0.19.8).
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived | config.parallel.deepspeed


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> deepspeed.DeepSpeedEngine:
    """The engine that trains `model` on all ranks; the process group must exist.

    Raises:
        ConfigError: if DeepSpeed refuses its settings, which can only be those of `parallel.deepspeed`.
    """
    precision = resolve_precision(config, on_gpu=torch.cuda.is_available())
    settings = deepspeed_config(config, mesh.world.size, precision=precision)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config.optimizer), config=settings, dist_init_required=False
        )
    except (DeepSpeedConfigError, ValueError) as error:
        raise ConfigError(f"parallel.deepspeed = {config.parallel.deepspeed}: DeepSpeed refuses it: {error}") from error
    return engine


def optimizer_step(engine: Any) -> float:
    """Updates the weights and returns the global gradient norm before clipping, the same on all ranks.

    NaN, infinity or a negative number (DeepSpeed's sign for either) mean that the gradient was not finite.
    """
    plain = engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()
    # On stage 0 in float32 DeepSpeed reports none, and the gradients, already averaged, are gone after the step.
    norm = _gradient_norm(engine.module) if plain else None
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    assert norm is not None
    return float(norm)


def _gradient_norm(model: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def whole_parameters(engine: Any) -> Iterator[nn.Parameter]:
    """The model's parameters in order, each whole while it is looked at. Every rank must go through all of them.

    On ZeRO-3 they are gathered one at a time, so that no rank ever holds more than one whole parameter on its device.
    """
    partitioned = engine.zero_optimization_stage() == 3
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            yield parameter


def gather_weights(engine: Any, mesh: Mesh) -> dict[str, Tensor]:
    """The whole model's state on the CPU of rank 0, {} elsewhere. Every rank must call it.

    Parameters that share memory share it here too.
    """
    on_cpu: dict[int, Tensor] = {}
    for parameter in whole_parameters(engine):
        if mesh.is_main:
            on_cpu[id(parameter)] = parameter.detach().to("cpu", copy=True)
    if not mesh.is_main:
        return {}
    # keep_vars: the entries are then the parameters themselves, not views with other identities.
    state = engine.module.state_dict(keep_vars=True)
    return {name: on_cpu[id(value)] if id(value) in on_cpu else value.detach().cpu() for name, value in state.items()}


def _bucket_sizes(stage: int) -> dict[str, int | bool]:
    if stage == 0:
        return {}
    common = {"reduce_bucket_size": BUCKET_ELEMENTS, "contiguous_gradients": True, "overlap_comm": False}
    if stage < 3:
        return common | {"allgather_bucket_size": BUCKET_ELEMENTS}
    return common | {
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
