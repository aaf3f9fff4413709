"""The columns of the forward for Hopper, without a GPU: its device functions run in numpy (gluon_numpy.py)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsek_kernels.selection import Selection
from tests.kernels.gluon_numpy import Pointer, block, functions, load
from tests.kernels.test_gpu_selection import Problem, plain, random_problem, shard_problem, starts_of


def columns_seen(problem: Problem, found: Selection, batch: int, tile: int, rows: int, width: int) -> list[list[int]]:
    """Of each query of a tile, the entries that it sees in the loop of the kernel, over tiles of `width` columns."""
    run, k, s = functions(), problem.num_selected, problem.document_start.shape[1]
    support, t = problem.carry_scores.shape[-1], problem.scores.shape[2]
    until, fractional = (Pointer(x[batch, 0].numpy()) for x in (found.visible_until, found.fractional_from))
    columns, num_plain, num_seen = run.column_list(
        block(tile), Pointer(found.alive[batch, 0].flatten().numpy()), fractional, until,
        Pointer(problem.document_start[batch].numpy()), s, t - s, problem.window,
        k, 1 << max(k - 1, 0).bit_length(), problem.chunk_size, rows, width, 4, "value",
    )  # fmt: skip
    queries = block(np.arange(tile * rows, tile * rows + rows))
    seen: list[list[int]] = [[] for _ in queries]
    for j in range(int((columns[2] + columns[5] + width).item()) // width):
        rank = np.arange(width) + j * width - columns[2]
        entry = run.entry_of(rank, run.fetch_listed(rank, columns), columns, support + t - s)
        assert ((entry >= 0) & (entry < support + t)).all(), "rows that do not exist are fetched"
        logits = run.mask_logits(block(np.zeros((rows, width))), j, load(until + entry), queries, columns, width)
        assert j >= num_seen or not logits[queries < s].any(), "a tile without a mask holds what a query must not see"
        in_window = rank < 0
        assert j >= num_plain or (in_window | (load(fractional + entry) > queries[queries < s].max())).all(), "a gate"
        for seen_by_one, row in zip(seen, logits, strict=True):
            seen_by_one += entry[row == 0].tolist()
    return seen[: s - tile * rows]


def wide(s: int, lengths: list[int], k: int, window: int, chunk_size: int) -> Problem:
    scores = torch.randn(1, 1, s, generator=torch.Generator().manual_seed(s))
    return plain(scores, starts_of(lengths)[None], k, window, 3 * k + 1, chunk_size)


PROBLEMS = {
    "one_document": wide(150, [150], 21, 30, 32),
    "documents": random_problem(4, "ties", torch.float32, 2, 1, 150, 6, 12, 19),
    "a_document_begins_in_every_place_of_a_tile": wide(150, [33, 18, 35, 1, 1, 20, 42], 9, 40, 32),
    "window_beyond_n": wide(70, [50, 20], 9, 500, 32),
    "window_1": wide(100, [100], 13, 1, 32),
    "k_0": wide(100, [60, 40], 0, 20, 32),
    "k_0_window_1": wide(40, [40], 0, 1, 32),
    "k_beyond_n": wide(90, [70, 20], 100, 6, 32),
    "increasing": replace(wide(100, [100], 13, 9, 32), scores=torch.arange(100.0).view(1, 1, -1)),
    "decreasing": replace(wide(100, [100], 13, 9, 32), scores=-torch.arange(100.0).view(1, 1, -1)),
    "one_token": wide(1, [1], 3, 4, 32),
    "a_shard": shard_problem(3, "random", torch.float32, 1, 90, 20, 25, 43),
    "a_shard_without_selection": shard_problem(3, "random", torch.float32, 1, 90, 0, 25, 43),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_tile_sees_every_visible_pair_once(name: str) -> None:
    problem = PROBLEMS[name]
    found, position = problem.on_gpu(), problem.positions().numpy()
    s = problem.document_start.shape[1]
    for rows, width in ((1, 8), (8, 4), (32, 8)):
        for batch, tile in itertools.product(range(len(position)), range(-(-s // rows))):
            until = found.visible_until[batch, 0].numpy()
            for i, seen in enumerate(columns_seen(problem, found, batch, tile, rows, width), tile * rows):
                assert sorted(seen) == np.flatnonzero((position[batch, 0] <= i) & (i < until)).tolist(), (tile, i)
