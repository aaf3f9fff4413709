"""Every shipped configuration of the attention kernels fits the GPUs: compiled for them here, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.compile_only import MOST_SHARED

PRODUCTS = {"forward_kernel", "grad_query_kernel", "grad_selected_kernel", "grad_window_kernel"}
"""Kernels whose loads must overlap with their matrix products."""
SUMS = {
    "sum_rows_kernel", "total_rows_kernel", "place_rows_kernel", "total_shares_kernel", "run_shares_kernel",
    "grad_scores_kernel",
}  # fmt: skip
QUICK = [(128, 4, "bfloat16", 90, "straight_through", ""), (64, 20, "float32", 80, "straight_through", "")]
SLOW = [
    (128, 4, "bfloat16", 80, "straight_through", ""), (128, 4, "bfloat16", 90, "key_value", "carry"),
    (128, 1, "float16", 90, "value", "carry"), (64, 1, "bfloat16", 90, "straight_through", ""),
    (64, 4, "bfloat16", 80, "key_value", "carry"), (80, 3, "bfloat16", 90, "straight_through", "carry"),
    (96, 8, "bfloat16", 90, "none", ""), (256, 2, "bfloat16", 90, "straight_through", ""),
    (256, 4, "float16", 90, "key_value", "carry"), (256, 2, "bfloat16", 90, "value", ""),
    (192, 3, "bfloat16", 90, "value", "carry"),
    (256, 1, "bfloat16", 80, "value", "carry"), (32, 8, "float16", 90, "straight_through", ""),
    (128, 32, "bfloat16", 90, "straight_through", ""), (128, 4, "float32", 90, "straight_through", ""),
    (96, 4, "bfloat16", 90, "straight_through", "carry"), (128, 4, "bfloat16", 90, "value", ""),
    (256, 1, "float16", 90, "key_value", "carry"), (160, 5, "bfloat16", 90, "key_value", "carry"),
    (128, 64, "float16", 90, "key_value", "carry"), (80, 5, "bfloat16", 80, "straight_through", "carry"),
    (64, 3, "float16", 80, "straight_through", "carry"), (192, 3, "bfloat16", 80, "straight_through", "carry"),
    (192, 33, "bfloat16", 80, "straight_through", ""), (256, 64, "float16", 80, "straight_through", "carry"),
    (160, 16, "bfloat16", 80, "none", ""), (256, 4, "float32", 80, "value", "carry"),
    (256, 12, "float32", 90, "straight_through", "carry"), (192, 3, "float32", 90, "key_value", ""),
    (64, 32, "float32", 90, "value", "carry"), (128, 64, "float32", 80, "straight_through", "carry"),
    (256, 64, "float32", 80, "key_value", ""), (80, 16, "float32", 80, "key_value", ""),
    (32, 48, "bfloat16", 80, "key_value", ""),
]  # fmt: skip


@pytest.mark.parametrize("setting", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)], ids=str)
def test_kernels_fit(setting: tuple) -> None:
    arch = setting[3]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.kernels.launches", *(str(x) for x in setting if x)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    of_scores = {name for name in SUMS if "share" in name or "score" in name}
    assert found.keys() == PRODUCTS | (SUMS - of_scores if "none" in setting else SUMS)
    for name, resources in found.items():
        assert resources["shared"] <= MOST_SHARED[arch], name
        assert resources["spills"] == 0, (name, resources)
        assert name in SUMS or "float32" in setting or resources["copies"] > 0, (name, "loads do not overlap")


HOPPER = [
    (128, 4, "bfloat16", 90, "straight_through", "", "hopper"),
    (128, 4, "bfloat16", 90, "value", "", "hopper"),
    *(
        pytest.param((*x, "hopper"), marks=pytest.mark.slow)
        for x in [
            (128, 1, "float16", 90, "none", "carry"), (128, 64, "bfloat16", 90, "none", "carry"),
            (64, 1, "bfloat16", 90, "none", ""), (64, 3, "float16", 90, "straight_through", "carry"),
            (128, 1, "float16", 90, "value", "carry"), (128, 64, "bfloat16", 90, "value", "carry"),
            (64, 1, "bfloat16", 90, "value", ""), (64, 3, "float16", 90, "value", "carry"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize("setting", HOPPER, ids=str)
def test_the_forward_for_hopper_fits(setting: tuple) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    # The other kernels are the same as without it.
    command = [sys.executable, "-m", "tests.kernels.launches", *(str(x) for x in setting if x), "forward"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, done.stdout.splitlines())
    assert found["kernel"] == "forward_hopper_kernel"
    assert found["spills"] == 0
    assert found["shared"] <= MOST_SHARED[90]
    assert found["copies"] > 0
