"""A sequence cut into shards gives what the whole gives: outputs and gradients, wherever the cuts fall."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsek_kernels.carry import Carry, empty_carry, merge, summarize
from sparsek_kernels.reference import attention_reference
from sparsek_kernels.shards import shard_attention
from tests.kernels.cases import Case, document_start


def with_halo(tensor: Tensor, first: int, last: int, window: int) -> Tensor:
    """Tokens [first - (w - 1), last), zeros before the sequence."""
    padded = torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (window - 1, 0))
    return padded[:, first : last + window - 1]


def merge_summaries(parts: list[Carry], distances: list[int], starts: Tensor, k: int, support: int) -> Carry:
    """The receiver's carry from summaries of all earlier shards, latest first, each `distance` tokens before it."""
    positions = [part.positions - distance for part, distance in zip(parts, distances, strict=True)]
    side_by_side = Carry(
        scores=torch.cat([part.scores for part in parts], dim=2),
        positions=torch.cat(positions, dim=2),
        key=torch.cat([part.key for part in parts], dim=2),
        value=torch.cat([part.value for part in parts], dim=2),
    )
    return merge(side_by_side, starts, num_selected=k, support=support)


def attend_in_shards(inputs: dict[str, Tensor], cuts: list[int], case: Case, support: int, gate: str) -> Tensor:
    s, k, window = case.s, case.num_selected, case.window
    starts = document_start(case.document_ids(), case.b, s).to(inputs["query"].device)
    bounds = [0, *cuts, s]
    outputs, summaries, origins = [], [], []
    for first, last in pairwise(bounds):
        key, value, scores = (with_halo(inputs[name], first, last, window) for name in ("key", "value", "scores"))
        own_starts = starts[:, first:last] - first
        carry = empty_carry(key, scores, num_selected=k, support=support)
        if summaries:
            distances = [first - origin for origin in reversed(origins)]
            carry = merge_summaries(summaries[::-1], distances, own_starts, k, support)
        query = inputs["query"][:, first:last]
        outputs.append(shard_attention(query, key, value, scores, carry, own_starts, window=window, gate=gate))
        summaries.append(summarize(key, value, scores, own_starts, num_selected=k, support=support))
        origins.append(first)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("gate", ["key_value", "straight_through"])
@pytest.mark.parametrize("cuts", [[48], [32, 64], [3, 4, 60], [10, 20, 30, 40, 50, 60, 70, 80, 90]], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("shards", s=96, num_selected=6, window=5, h=4, g=2, d=4),
        Case("shards_packed", s=96, num_selected=6, window=5, h=2, g=2, d=4, documents="random"),
        Case("shards_ties", s=96, num_selected=6, window=5, d=4, scores="ties"),
        Case("shards_ties_packed", s=96, num_selected=3, window=1, d=4, scores="ties", documents="random"),
        Case("shards_wide_window", s=96, num_selected=4, window=40, d=4),
        Case("shards_narrow", s=96, num_selected=7, window=3, support=12, d=4, scores="narrow", documents="halves"),
        Case("shards_decreasing", s=96, num_selected=9, window=3, d=4, scores="decreasing"),
    ],
    ids=lambda case: case.name,
)
def test_shards_equal_the_whole(case: Case, cuts: list[int], gate: str) -> None:
    support = 4 * case.num_selected if case.support is None else case.support
    results = []
    for attend in (
        lambda inputs: attend_in_shards(inputs, cuts, case, support, gate),
        lambda inputs: attention_reference(**inputs, gate=gate, **case.settings()),
    ):
        inputs = case.inputs()
        output = attend(inputs)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).double()
        results.append((output, *torch.autograd.grad(output, list(inputs.values()), upstream)))
    for name, found, expected in zip(("output", "dquery", "dkey", "dvalue", "dscores"), *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"num_scores": 9}, r"scores must be .* = \[1, 10, 2\]"), ({"window": 0}, "key and value must be"),
     ({"support": 2}, "support = 2 must exceed num_selected = 2")],
)  # fmt: skip
def test_arguments_are_checked_before_anything_is_selected(changed: dict[str, int], message: str) -> None:
    settings = {"num_scores": 10, "window": 3, "support": 4} | changed
    query, key, scores = torch.randn(1, 8, 4, 4), torch.randn(1, 10, 2, 4), torch.randn(1, settings["num_scores"], 2)
    carry = empty_carry(key, scores, num_selected=2, support=settings["support"])
    starts = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        shard_attention(query, key, key, scores, carry, starts, window=settings["window"])
