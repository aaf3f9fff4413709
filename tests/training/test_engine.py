"""DeepSpeed's settings, as literals: a changed default must show here first."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sparsek_dist.config import flatten
from sparsek_dist.relations import DEEPSPEED_KEYS, problems
from sparsek_dist.training.engine import deepspeed_config, resolve_precision
from tests.training.toys import toy_config


def _with_deepspeed(**settings):
    config = toy_config()
    return replace(config, parallel=replace(config.parallel, deepspeed=settings))


def test_stage_two_literally() -> None:
    config = toy_config(zero_stage=2, sequence_degree=2, micro_batch_size=3, accumulation_steps=5)
    assert deepspeed_config(config, 8, precision="float32") == {
        "train_batch_size": 60,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "sequence_parallel_size": 2,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 50_000_000,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "allgather_bucket_size": 50_000_000,
        },
    }


@pytest.mark.parametrize(("stage", "accumulation"), [(0, None), (1, None), (2, "fp32"), (3, "fp32")])
def test_bfloat16(stage, accumulation) -> None:
    settings = deepspeed_config(toy_config(zero_stage=stage), 1, precision="bfloat16")
    assert settings["bf16"] == {"enabled": True}
    assert settings.get("data_types", {}).get("grad_accum_dtype") == accumulation


def test_clipping_is_always_written() -> None:
    config = toy_config()
    config = replace(config, optimizer=replace(config.optimizer, clip_norm=0.0))
    assert deepspeed_config(config, 1, precision="float32")["gradient_clipping"] == 0.0


def test_extra_settings_pass_through() -> None:
    settings = deepspeed_config(_with_deepspeed(wall_clock_breakdown=True), 1, precision="float32")
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("key", "cure"),
    [("wall_clock_brakdown", "did you mean wall_clock_breakdown"), ("gradient_allreduce_op", "use activation_check")],
)
def test_other_keys_are_refused(key, cure) -> None:
    config = _with_deepspeed(**{key: True})
    (problem,) = problems(config, flatten(config))
    assert re.search(rf"parallel\.deepspeed\.{key}.*{cure}", problem)


def test_no_derived_key_may_be_set_a_second_time() -> None:
    for stage in range(4):
        for precision in ("float32", "bfloat16"):
            assert not DEEPSPEED_KEYS & set(deepspeed_config(toy_config(zero_stage=stage), 1, precision=precision))


def test_precision() -> None:
    assert resolve_precision(toy_config(), on_gpu=True) == "bfloat16"
    assert resolve_precision(toy_config(), on_gpu=False) == "float32"
    assert resolve_precision(toy_config(precision="float32"), on_gpu=True) == "float32"
