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
MOST_SPILLED = {
    (80, 128): {"forward_kernel": 160, "grad_query_kernel": 168, "grad_selected_kernel": 8, "grad_window_kernel": 8},
    (90, 128): {"forward_kernel": 0, "grad_query_kernel": 8, "grad_selected_kernel": 144, "grad_window_kernel": 40},
    (80, 256): {"forward_kernel": 0, "grad_query_kernel": 0, "grad_selected_kernel": 0, "grad_window_kernel": 0},
    (90, 256): {
        "forward_kernel": 200,
        "grad_query_kernel": 128,
        "grad_selected_kernel": 248,
        "grad_window_kernel": 400,
    },
}
"""Bytes of local memory per thread, by architecture and widest head: just above what the shipped tiles use, so that
growth is noticed, with Triton 3.6 and 3.7. On Hopper nearly all of it lies outside of the loops over tiles. None: up to
d = 64 there, and in `grad_query_kernel` with d = 128 where G is a power of two, with d = 256 unless `straight_through`.
Tiles that spill nothing were timed at d = 128 and 256: slower, by a tenth up to twice."""

QUICK = [(128, 4, "bfloat16", 90, "straight_through", "")]
SLOW = [
    (128, 4, "bfloat16", 80, "straight_through", ""), (128, 4, "bfloat16", 90, "key_value", "carry"),
    (128, 1, "float16", 90, "value", "carry"), (64, 1, "bfloat16", 90, "straight_through", ""),
    (64, 4, "bfloat16", 80, "key_value", "carry"), (80, 3, "bfloat16", 90, "straight_through", "carry"),
    (96, 8, "bfloat16", 90, "none", ""), (256, 2, "bfloat16", 90, "straight_through", ""),
    (256, 4, "float16", 90, "key_value", "carry"), (256, 2, "bfloat16", 90, "value", ""),
    (192, 3, "bfloat16", 90, "value", "carry"),
    (256, 1, "bfloat16", 80, "value", "carry"), (32, 8, "float16", 90, "straight_through", ""),
    (128, 32, "bfloat16", 90, "straight_through", ""), (128, 4, "float32", 90, "straight_through", ""),
]  # fmt: skip


@pytest.mark.parametrize("setting", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)], ids=str)
def test_kernels_fit(setting: tuple) -> None:
    d, _, _, arch, _, _ = setting
    most_spilled = {} if d <= 64 and arch == 90 else MOST_SPILLED[arch, 128 if d <= 128 else 256]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.kernels.launches", *(str(x) for x in setting if x)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    of_scores = {name for name in SUMS if "share" in name or "score" in name}
    assert found.keys() == PRODUCTS | (SUMS - of_scores if "none" in setting else SUMS)
    for name, resources in found.items():
        assert resources["shared"] <= MOST_SHARED[arch], name
        # Exact float32 products need no tensor cores and take registers instead.
        assert resources["spills"] <= most_spilled.get(name, 0) or "float32" in setting, (name, resources)
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
