"""Every shipped configuration of the attention kernels fits the GPUs: compiled for them here, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.cases import GATES
from tests.kernels.compile_only import MOST_SHARED
from tests.kernels.real_heads import REAL_HEADS

PRODUCTS = {"forward_kernel", "grad_query_kernel", "grad_selected_kernel", "grad_window_kernel"}
"""Kernels whose loads must overlap with their matrix products."""
SUMS = {
    "sum_rows_kernel", "total_rows_kernel", "place_rows_kernel", "total_shares_kernel", "run_shares_kernel",
    "grad_scores_kernel",
}  # fmt: skip
QUICK = [
    "128 4 bfloat16 90 straight_through", "64 20 float32 80 straight_through", "128 4 bfloat16 80 value",
    "128 4 bfloat16 90 value", "256 2 bfloat16 90 value", "64 4 bfloat16 80 value carry",
]  # fmt: skip
SLOW = [
    "128 4 bfloat16 80 straight_through", "128 4 bfloat16 90 key_value carry",
    "128 1 float16 90 value carry", "64 1 bfloat16 90 straight_through",
    "64 4 bfloat16 80 key_value carry", "80 3 bfloat16 90 straight_through carry",
    "96 8 bfloat16 90 none", "256 2 bfloat16 90 straight_through",
    "256 4 float16 90 key_value carry",
    "192 3 bfloat16 90 value carry",
    "256 1 bfloat16 80 value carry", "32 8 float16 90 straight_through",
    "128 32 bfloat16 90 straight_through", "128 4 float32 90 straight_through",
    "96 4 bfloat16 90 straight_through carry",
    "256 1 float16 90 key_value carry", "160 5 bfloat16 90 key_value carry",
    "128 64 float16 90 key_value carry", "80 5 bfloat16 80 straight_through carry",
    "64 3 float16 80 straight_through carry", "192 3 bfloat16 80 straight_through carry",
    "192 33 bfloat16 80 straight_through", "256 64 float16 80 straight_through carry",
    "160 16 bfloat16 80 none", "256 4 float32 80 value carry",
    "256 12 float32 90 straight_through carry", "192 3 float32 90 key_value",
    "64 32 float32 90 value carry", "128 64 float32 80 straight_through carry",
    "256 64 float32 80 key_value", "80 16 float32 80 key_value",
    "32 48 bfloat16 80 key_value",
]  # fmt: skip


def compiled(*settings: str) -> list[dict]:
    """What each kernel of each setting occupies, from a process that has the real compiler."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.kernels.launches", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels_of(setting: str) -> set[str]:
    if "hopper" in setting:
        return {"forward_hopper_kernel"}
    of_scores = {name for name in SUMS if "share" in name or "score" in name}
    return PRODUCTS | (SUMS - of_scores if "none" in setting else SUMS)


def assert_fits(resources: dict) -> None:
    assert resources["shared"] <= MOST_SHARED[int(resources["setting"].split()[3])], resources
    assert resources["spills"] == 0, resources


@pytest.mark.parametrize("setting", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])
def test_kernels_fit(setting: str) -> None:
    found = {line["kernel"]: line for line in compiled(setting)}
    assert found.keys() == kernels_of(setting)
    for name, resources in found.items():
        assert_fits(resources)
        assert name in SUMS or "float32" in setting or resources["copies"] > 0, (name, "loads do not overlap")


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["", "carry"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_real_heads_fit(arch: int, dtype: str, gate: str, carry: str) -> None:
    """None of these models' heads has a kernel that spills."""
    settings = [f"{d} {group} {dtype} {arch} {gate} {carry}" for d, group in REAL_HEADS]
    if arch == 90 and dtype != "float32" and gate != "key_value":
        settings += [f"{x} hopper forward" for x in settings if x.startswith(("64 ", "128 "))]
    found = compiled(*settings)
    assert {(line["setting"], line["kernel"]) for line in found} == {
        (x, name) for x in settings for name in kernels_of(x)
    }
    for resources in found:
        assert_fits(resources)


HOPPER = [
    "128 4 bfloat16 90 straight_through",
    "128 4 bfloat16 90 value",
    *(
        pytest.param(x, marks=pytest.mark.slow)
        for x in [
            "128 1 float16 90 none carry", "128 64 bfloat16 90 none carry",
            "64 1 bfloat16 90 none", "64 3 float16 90 straight_through carry",
            "128 1 float16 90 value carry", "128 64 bfloat16 90 value carry",
            "64 1 bfloat16 90 value", "64 3 float16 90 value carry",
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize("setting", HOPPER)
def test_the_forward_for_hopper_fits(setting: str) -> None:
    (found,) = compiled(f"{setting} hopper forward")  # the other kernels are the same as without it
    assert found["kernel"] in kernels_of("hopper")
    assert_fits(found)
    assert found["copies"] > 0
