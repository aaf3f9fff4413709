"""Inputs of the kernel tests: named edge cases, score patterns and packings, every one reproducible from its name."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

GATES = ("value", "key_value", "straight_through", "none")


@dataclass(frozen=True)
class Case:
    """One setting of the attention; the defaults are an ordinary case with fractional gates."""

    name: str
    s: int = 37
    num_selected: int = 5
    window: int = 4
    support: int | None = None
    b: int = 2
    h: int = 2
    g: int = 1
    d: int = 8
    scores: str = "random"
    documents: str | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """query, key, value, scores as leaves that require grad; drawn in float32, so both dtypes hold equal values."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        shapes = {
            "query": (self.b, self.s, self.h, self.d),
            "key": (self.b, self.s, self.g, self.d),
            "value": (self.b, self.s, self.g, self.d),
        }
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors["scores"] = make_scores(self.scores, (self.b, self.s, self.g), generator)
        return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}

    def document_ids(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1)
        return None if self.documents is None else make_documents(self.documents, self.b, self.s, generator)

    def settings(self) -> dict:
        return {
            "num_selected": self.num_selected,
            "window": self.window,
            "support": self.support,
            "document_ids": self.document_ids(),
        }


def score_entries(limit: int) -> st.SearchStrategy[float]:
    """Scores up to +-limit on multiples of 2^-16: distinct as a rule, yet float64 decides each border exactly."""
    return st.integers(-limit * 2**16, limit * 2**16).map(lambda steps: steps / 2**16)


QUARTERS = st.integers(-6, 6).map(lambda quarter: quarter / 4)
"""Scores that tie often and put gates exactly on 0 and 1."""


def make_scores(pattern: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Scores [b, s, g] in float32. Tied patterns sit on multiples of 1/4, where sums are exact in every order."""
    random = torch.randn(shape, generator=generator)
    ramp = torch.arange(shape[1], dtype=torch.float32)[None, :, None].expand(shape)
    match pattern:
        case "random":
            return random
        case "wide":
            return 20 * random
        case "mild":
            return 0.3 * random
        case "narrow":
            return 1e-3 * random
        case "ties":
            return torch.randint(-4, 5, shape, generator=generator) / 4
        case "two_values":
            return torch.randint(0, 2, shape, generator=generator).float()
        case "constant":
            return torch.full(shape, 0.75)
        case "signed_zeros":
            return torch.where(random > 0, 0.0, -0.0)
        case "increasing":
            return 0.125 * ramp
        case "steep":
            return 2.0 * ramp
        case "decreasing":
            return -0.125 * ramp
        case "drift":
            return random + 0.05 * ramp
        case "offset":
            return 1000.0 + random
        case _:
            raise AssertionError(pattern)


def make_documents(pattern: str, b: int, s: int, generator: torch.Generator) -> Tensor:
    """Document ids [b, s] that never decrease; neither consecutive nor starting at 0."""
    match pattern:
        case "one":
            return torch.full((b, s), 7)
        case "single_tokens":
            return torch.arange(s).expand(b, s).clone()
        case "random":
            starts = torch.rand(b, s, generator=generator) < 0.1
            # Runs of starts make documents of one token: at the front, in the middle and at the end.
            starts[:, [1 % s, s // 2, (s // 2 + 1) % s, s - 1]] = True
            return 3 * starts.long().cumsum(1) - 2
        case "halves":
            return (torch.arange(s) >= s // 2).long().expand(b, s).clone()
        case "aligned":
            return (torch.arange(s) // 64).expand(b, s).clone()
        case _:
            raise AssertionError(pattern)


def document_start(document_ids: Tensor | None, b: int, s: int) -> Tensor:
    """Index [b, s] of the first token of each token's document."""
    if document_ids is None:
        return torch.zeros(b, s, dtype=torch.int64)
    index = torch.arange(s).expand(b, s)
    is_first = torch.ones(b, s, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_first, index, 0).cummax(dim=1).values


def num_fractional_gates(tau: Tensor, scores: Tensor, visible_until: Tensor, fractional_from: Tensor) -> int:
    """How many pairs (query, visible entry) have 0 < m < 1; tau [b, g, s], the others [b, g, entries]."""
    queries = torch.arange(tau.shape[-1], device=tau.device)
    gate = scores[..., None] - tau[..., None, :]
    visible = (queries < visible_until[..., None]) & (queries >= fractional_from[..., None])
    return int((visible & (gate > 0) & (gate < 1)).sum())


EDGE_CASES = [
    Case("one_token", s=1),
    Case("two_tokens_window_1", s=2, window=1, num_selected=1),
    Case("shorter_than_window", s=5, window=8),
    Case("equal_to_window", s=8, window=8),
    Case("one_more_than_window", s=9, window=8),
    Case("equal_to_window_plus_k", s=11, window=4, num_selected=7),
    Case("one_more_than_window_plus_k", s=12, window=4, num_selected=7),
    Case("k_0", num_selected=0),
    Case("k_0_packed", num_selected=0, documents="random"),
    Case("k_0_window_1", num_selected=0, window=1),
    Case("k_1", num_selected=1),
    Case("k_beyond_n", num_selected=50),
    Case("k_beyond_n_packed", num_selected=50, documents="random"),
    Case("window_1", window=1),
    Case("window_1_k_1_packed", window=1, num_selected=1, documents="random"),
    Case("support_k_plus_1", support=6),
    Case("support_k_plus_1_narrow", support=6, scores="narrow"),
    Case("support_reached", support=12, scores="narrow"),
    Case("support_at_least_n", support=37),
    Case("support_beyond_n", support=1000),
    Case("support_beyond_n_packed", support=1000, documents="random"),
    Case("constant", scores="constant"),
    Case("constant_packed", scores="constant", documents="random"),
    Case("increasing", scores="increasing"),
    Case("increasing_by_2", scores="steep"),
    Case("increasing_packed", scores="increasing", documents="random"),
    Case("decreasing", scores="decreasing"),
    Case("decreasing_packed", scores="decreasing", documents="random"),
    Case("signed_zeros", scores="signed_zeros"),
    Case("signed_zeros_k_1", scores="signed_zeros", num_selected=1, window=1),
    Case("ties", scores="ties"),
    Case("ties_packed", scores="ties", documents="random", g=2, h=4),
    Case("two_values", scores="two_values"),
    Case("hard_top_k", scores="wide"),
    Case("narrow_scores", scores="narrow"),
    Case("drift", scores="drift"),
    Case("offset_scores", scores="offset"),
    Case("one_document_given", documents="one"),
    Case("documents_of_one_token", documents="single_tokens"),
    Case("random_documents", documents="random", b=3),
    Case("random_documents_long", s=149, documents="random", g=2, h=4),
    Case("two_documents", s=41, documents="halves"),
    *(Case(f"group_{group}", h=2 * group, g=2, s=29) for group in (1, 3, 4, 5, 7, 8)),
    *(Case(f"head_dim_{d}", d=d, s=23, b=1) for d in (1, 32, 64, 80, 96, 128, 256)),
    *(Case(f"length_{s}", s=s, b=1) for s in (13, 31, 63, 64, 65, 111)),
    Case("long", s=301, b=1, num_selected=11, window=16, g=2, h=2),
    Case("long_wide_window", s=301, b=1, num_selected=7, window=130),
    Case("long_many_selected", s=301, b=1, num_selected=150, window=5),
    Case("long_ties", s=301, b=1, num_selected=40, window=9, scores="ties"),
    Case("long_increasing", s=301, b=1, num_selected=20, window=3, scores="increasing"),
    Case("long_packed_drift", s=301, b=2, num_selected=12, window=7, scores="drift", documents="random"),
    Case("long_many_heads", s=301, b=2, num_selected=60, window=20, h=8, g=2),
    Case("long_wide_window_many_selected", s=301, b=1, num_selected=130, window=130, support=150, d=4),
    Case("long_packed_at_multiples_of_64", s=257, b=1, num_selected=12, window=7, documents="aligned"),
]
