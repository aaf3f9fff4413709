"""The selection in Triton does what the selection in torch does, entry by entry.

The interpreter takes about as long for a block of 8 numbers as for one of 512. So most sequences here are a *zoo*: one
document of every score pattern, one after the other, in few and large blocks.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.carry import NOWHERE, Carry
from sparsek_kernels.gpu import selection as gpu
from sparsek_kernels.gpu import wavelet
from sparsek_kernels.gpu.queries import count_gates
from sparsek_kernels.gpu.selection import select_gpu
from sparsek_kernels.gpu.threshold import select_kernel
from sparsek_kernels.selection import Selection, select
from tests.kernels.cases import make_scores
from tests.kernels.compile_only import compile_kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = (
    "random", "ties", "constant", "steep", "increasing", "decreasing", "two_values",
    "signed_zeros", "narrow", "wide", "mild", "offset", "drift",
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(gpu, "BLOCK", 512)
    monkeypatch.setattr(wavelet, "TILE", 128)
    return monkeypatch


@dataclass(frozen=True)
class Problem:
    """What one call of `select_gpu` is about; without a carry its tensors are of width 0."""

    scores: Tensor
    document_start: Tensor
    carry_scores: Tensor
    carry_positions: Tensor
    num_selected: int
    window: int
    support: int
    chunk_size: int = 64

    @property
    def halo(self) -> int:
        return self.scores.shape[2] - self.document_start.shape[1]

    def on_gpu(self) -> Selection:
        tensors = (self.scores, self.document_start, self.carry_scores, self.carry_positions)
        found = select_gpu(
            *(tensor.to(DEVICE) for tensor in tensors),
            num_selected=self.num_selected, window=self.window, support=self.support, chunk_size=self.chunk_size,
        )  # fmt: skip
        return Selection(**{name: field.cpu() for name, field in vars(found).items()})

    def on_cpu(self) -> Selection:
        carried = self.carry_scores.shape[-1]
        pairs = self.scores.new_zeros(*self.scores.shape[:2], carried, 1)
        carry = Carry(self.carry_scores, self.carry_positions, pairs, pairs) if carried else None
        return select(
            self.scores, num_selected=self.num_selected, window=self.window, support=self.support,
            document_start=self.document_start, carry=carry, chunk_size=self.chunk_size,
        )  # fmt: skip

    def positions(self) -> Tensor:
        """[b, g, S + t]."""
        stream = torch.arange(self.scores.shape[2]) - self.halo
        return torch.cat([self.carry_positions, stream.expand_as(self.scores)], dim=-1)

    def entries(self) -> Tensor:
        """[b, g, S + t]: scores of the carried entries, then of the stream."""
        return torch.cat([self.carry_scores, self.scores], dim=-1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts_of(lengths: list[int]) -> Tensor:
    """[s]: where each token's document begins."""
    begins = [0, *itertools.accumulate(lengths)]
    return torch.tensor([begin for begin, length in zip(begins, lengths, strict=False) for _ in range(length)])


def zoo(seed: int, g: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores [1, g, s] and document_start [1, s]: each pattern in a document of `length` tokens, tiny ones between."""
    parts, lengths = [], []
    for i, pattern in enumerate(PATTERNS):
        for n in (length + i, i % 4):
            parts.append(make_scores(pattern, (1, n, g), generator(seed + i)))
            lengths.append(n)
    return torch.cat(parts, dim=1).transpose(1, 2).to(dtype).contiguous(), starts_of(lengths)[None]


def plain(scores: Tensor, document_start: Tensor, k: int, window: int, support: int, chunk_size: int = 64) -> Problem:
    nothing = scores.new_empty(*scores.shape[:2], 0)
    return Problem(scores, document_start, nothing, nothing.long(), k, window, support, chunk_size)


def random_problem(seed: int, pattern: str, dtype: torch.dtype, b: int, g: int, s: int, *sizes: int) -> Problem:
    """Random documents; sizes: k, w, S."""
    scores = make_scores(pattern, (b, s, g), generator(seed)).transpose(1, 2).contiguous().to(dtype)
    begins = torch.rand(b, s, generator=generator(seed + 1)) < 0.06
    index = torch.arange(s).expand(b, s)
    return plain(scores, torch.where(begins, index, 0).cummax(dim=1).values, *sizes)


def shard_problem(seed: int, pattern: str, dtype: torch.dtype, g: int, s: int, k: int, w: int, support: int) -> Problem:
    """A shard in the middle of a document, whose earlier part is longer than the window; some slots are empty."""
    b, rng = 2, generator(seed)
    scores = make_scores(pattern, (b, w - 1 + s + support, g), rng).transpose(1, 2).to(dtype)
    positions = -w - torch.stack([torch.randperm(3 * support, generator=rng)[:support] for _ in range(b * g)])
    positions = positions.view(b, g, support)
    empty = torch.rand(b, g, support, generator=rng) < 0.2
    carried = torch.where(empty, -torch.inf, scores[..., :support])
    positions = torch.where(empty, NOWHERE, positions)
    # Best first, of equal scores the later: two stable sorts.
    order = positions.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, (carried + 0.0).gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    # The first document begins far before the shard, within the halo, or between the carried entries.
    first = torch.tensor([-10 * support, -w - support])
    document_start = torch.zeros(b, s, dtype=torch.int64) + first[:, None]
    document_start[0, s // 3 :] = s // 3
    document_start[1, s - 3 :] = s - 3
    return Problem(
        scores[..., support:].contiguous(), document_start, carried.gather(-1, order), positions.gather(-1, order),
        k, w, support,
    )  # fmt: skip


def assert_equal(problem: Problem) -> Selection:
    found, expected = problem.on_gpu(), problem.on_cpu()
    carried, length = problem.carry_scores.shape[-1], problem.scores.shape[2]
    double = problem.scores.dtype == torch.float64
    for name in ("tau", "selected_mass"):
        close = {"rtol": 1e-12, "atol": 1e-12} if double else {"rtol": 1.2e-7, "atol": 1e-7}
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, **close, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("visible_until", "fractional_from", "fractional_until"):
        wanted = getattr(expected, name)
        wanted = torch.cat([wanted[..., :carried], wanted[..., wanted.shape[-1] - length :]], dim=-1)
        assert_same(name, getattr(found, name), wanted)
    for name in ("num_fractional", "support_size"):
        assert_same(name, getattr(found, name), getattr(expected, name))
    assert_same("alive", found.alive.sort(-1).values, wanted_alive(problem, expected).sort(-1).values)
    assert_best_first(problem, found)
    return found


def assert_same(name: str, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.int32, name
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    differ = (found != expected).nonzero()
    assert not len(differ), f"{name} differs at {len(differ)} places, first at {differ[0].tolist()}"


def wanted_alive(problem: Problem, expected: Selection) -> Tensor:
    """[b, g, c, k]: torch's entries count S slots and w - 1 tokens of halo even where there are none."""
    alive = expected.alive
    alive = torch.nn.functional.pad(alive, (0, problem.num_selected - alive.shape[-1]), value=-1)
    if problem.carry_scores.shape[-1] == 0:
        alive = alive - min(problem.support, problem.document_start.shape[1])
    alive = torch.where(alive >= problem.carry_scores.shape[-1], alive - (problem.window - 1 - problem.halo), alive)
    return alive.clamp_min(-1)


def assert_best_first(problem: Problem, found: Selection) -> None:
    """What stands later in a list of `alive` ranks lower, so from the chunk's first query on it drops out no later."""
    first_query = torch.arange(found.alive.shape[2]).view(-1, 1) * problem.chunk_size
    exists, entry = found.alive >= 0, found.alive.clamp_min(0).long().flatten(2)
    for name in ("visible_until", "fractional_from"):
        along = getattr(found, name).gather(-1, entry).view(found.alive.shape).maximum(first_query)
        assert ((along[..., 1:] <= along[..., :-1]) | ~exists[..., 1:]).all(), name
    assert (exists[..., :-1] | ~exists[..., 1:]).all(), "the entries come first, then -1"
    score = (problem.entries() + 0.0).gather(-1, entry).view(found.alive.shape)
    position = problem.positions().gather(-1, entry).view(found.alive.shape)
    better = (score[..., :-1] > score[..., 1:]) | (
        (score[..., :-1] == score[..., 1:]) & (position[..., :-1] > position[..., 1:])
    )
    assert (better | ~exists[..., 1:]).all()


@DTYPES
@pytest.mark.parametrize(
    ("k", "window", "support"),
    [(5, 4, 12), (3, 1, 4), (1, 2, 500), (0, 3, 1), (29, 7, 31), (6, 50, 24)],
    ids=["ordinary", "window_1", "support_beyond_n", "k_0", "k_beyond_n", "wide_window"],
)
def test_every_pattern(k: int, window: int, support: int, dtype: torch.dtype) -> None:
    scores, document_start = zoo(7 * k, 1, 23 if k != 6 else 70, dtype)
    assert_equal(plain(scores, document_start, k, window, support))


@DTYPES
@pytest.mark.parametrize("pattern", ["random", "ties", "narrow"])
@pytest.mark.parametrize("window", [1, 6])
def test_a_shard_with_a_carry(pattern: str, window: int, dtype: torch.dtype) -> None:
    if pattern == "narrow" and window == 1:
        window = 2
    assert_equal(shard_problem(3, pattern, dtype, 1, 53, 6, window, 17))


def test_a_carry_of_any_strides() -> None:
    """`summarize` returns its entries in the memory order of the scores that it sorted, which is not that of rows."""
    problem = shard_problem(3, "random", torch.float64, 1, 53, 6, 4, 17)
    fields = {
        name: getattr(problem, name).transpose(0, 2).contiguous().transpose(0, 2)
        for name in ("carry_scores", "carry_positions")
    }
    assert not any(field.is_contiguous() for field in fields.values())
    assert_equal(replace(problem, **fields))


@DTYPES
@pytest.mark.parametrize("s", [1, 2, 7, 64])
def test_short_sequences(s: int, dtype: torch.dtype) -> None:
    assert_equal(random_problem(s, "random", dtype, 1, 2, s, 2, 3, 5))


@DTYPES
def test_many_rows_and_small_blocks(dtype: torch.dtype, blocks: pytest.MonkeyPatch) -> None:
    blocks.setattr(gpu, "BLOCK", 32)
    blocks.setattr(wavelet, "TILE", 16)
    assert_equal(random_problem(11, "ties", dtype, 2, 2, 41, 6, 5, 13))


@pytest.mark.parametrize("most_bits", [1, 2, 3])
def test_many_levels_and_passes(most_bits: int, blocks: pytest.MonkeyPatch) -> None:
    """Four levels in passes of 1, of 2, of 3 and 1; the tiles before a tile in several steps."""
    blocks.setattr(wavelet, "TILE", 16)
    blocks.setattr(wavelet, "MOST_BITS", most_bits)
    if DEVICE == "cpu":
        blocks.setattr(wavelet, "TILES_AT_ONCE", wavelet.tl.constexpr(4))
    assert_equal(random_problem(13, "ties", torch.float64, 1, 1, 150, 6, 5, 13))


def test_rows_one_by_one_give_what_rows_together_give(blocks: pytest.MonkeyPatch) -> None:
    problem = random_problem(5, "random", torch.float32, 1, 3, 25, 4, 3, 9)
    together = problem.on_gpu()
    blocks.setattr(gpu, "MAX_BYTES", 1)
    for name, field in vars(problem.on_gpu()).items():
        assert torch.equal(field, getattr(together, name)), name


@pytest.mark.parametrize("sparse", [0, 16, 1 << 20], ids=["in_the_tree", "as_it_comes", "by_rank"])
@pytest.mark.parametrize("part", [4, 1024])
def test_lists_made_in_parts_and_either_way(sparse: int, part: int, blocks: pytest.MonkeyPatch) -> None:
    blocks.setattr(gpu, "BLOCK", 64)
    blocks.setattr(gpu, "SPARSE", sparse)
    blocks.setattr(gpu, "PART", part)
    assert_equal(shard_problem(9, "ties", torch.float32, 1, 150, 11, 5, 23))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_do_not_hang(value: float) -> None:
    problem = random_problem(2, "random", torch.float32, 1, 1, 30, 4, 3, 9)
    problem.scores[0, 0, 5:7] = value
    assert problem.on_gpu().tau.shape == (1, 1, 30)


@triton.jit
def ranks_kernel(ends, sums, ranked, length, levels, span, bounds, out, TILE: tl.constexpr, BOUNDS: tl.constexpr):
    """How many scores of the row less 1 are at or above each bound, and how many above it, by ways down the tree."""
    low = tl.zeros([BOUNDS], tl.int32)
    bound = tl.load(bounds + tl.arange(0, BOUNDS))
    tree = (ends, sums, ranked, length, levels, span)
    _, _, ones, _, _, reached = count_gates(tree, low, low + length, bound, TILE)
    tl.store(out + tl.arange(0, BOUNDS), ones)
    tl.store(out + BOUNDS + tl.arange(0, BOUNDS), reached)


@pytest.mark.parametrize("length", [5, 33])
def test_no_bound_leads_out_of_the_table(length: int) -> None:
    """Padding of -inf is an error that the host reports when all has run, so until then it must do no harm."""
    inf = float("inf")
    scores = torch.randn(1, length, generator=generator(length))
    scores[0, 1:4] = torch.tensor([-inf, inf, -inf])
    tree = wavelet.build_wavelet(scores.to(DEVICE), 2)
    bounds = torch.tensor([-inf, inf, float("nan"), -1e30, 0.0, 1e30, -0.5, 0.5], device=DEVICE)
    found = torch.empty(2, 8, dtype=torch.int32, device=DEVICE)
    ranks_kernel[(1,)](
        tree.ends, tree.sums, tree.ranked, length, tree.levels, 1 << tree.levels, bounds, found,
        TILE=tree.tile, BOUNDS=8,
    )  # fmt: skip
    wanted = torch.stack([(scores - 1 >= bounds.cpu()[:, None]).sum(1), (scores > bounds.cpu()[:, None]).sum(1)])
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("pattern", ["random", "two_values", "increasing"])
def test_the_selected_are_those_of_a_heap(pattern: str) -> None:
    problem = random_problem(21, pattern, torch.float32, 1, 1, 90, 7, 4, 16)
    until = problem.on_gpu().visible_until[0, 0].tolist()
    scores, starts = problem.scores[0, 0].tolist(), problem.document_start[0].tolist()
    heap: list[tuple[float, int]] = []
    for query, start in enumerate(starts):
        if start == query:
            heap.clear()
        left = query - problem.window
        if left >= start:
            heapq.heappush(heap, (scores[left], left))
            if len(heap) > problem.num_selected:
                heapq.heappop(heap)
        selected = {key for key in range(start, left + 1) if query < until[key]}
        assert selected == {key for _, key in heap}, f"query {query}"


ARGUMENTS = {
    "i32": "length middle levels span size level steps first_row heads s carried carry_steps halo num_selected window "
    "support chunk_size",
    "*i32": "ends order ranks theta sigma alive ids next_ids scratch counts num_fractional support_size visible_until "
    "fractional_from fractional_until",
    "*i64": "document_start carry_positions carry_order index",
    "*fp32": "ranked tau tau_out selected_mass scores carry_scores latest_first",
    "*fp64": "sums centre totals",
}
CONSTEXPRS = {"TILE": 512, "BLOCK": 128, "BITS": 2, "PART": 256, "SPARSE": 16}
SIGNATURE = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    ("kernel", "most_registers"),
    [
        (select_kernel, gpu.SELECT_REGISTERS),
        (gpu.interval_kernel, 40),
        (gpu.alive_kernel, 64),
        (gpu.table_kernel, 32),
        (wavelet.rank_entries_kernel, 32),
        (wavelet.total_tiles_kernel, 64),
        (wavelet.descend_kernel, 80),  # With 8 warps.
        (wavelet.descend_within_tiles_kernel, 64),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(getattr(value, "fn", None), "__name__", ""),
)
def test_kernels_compile_without_spilling(kernel: object, most_registers: int, arch: int) -> None:
    constexprs = {name: value for name, value in CONSTEXPRS.items() if name in kernel.arg_names}
    warps = {"descend_kernel": 8, "alive_kernel": 1}.get(kernel.__name__, 4)
    limit = gpu.SELECT_REGISTERS if kernel is select_kernel else None
    resources = compile_kernel(kernel, SIGNATURE, constexprs, arch=arch, num_warps=warps, maxnreg=limit)
    assert resources.spills == 0
    assert resources.registers <= most_registers, resources
    assert resources.shared <= 8192
