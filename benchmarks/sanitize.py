"""Runs every Triton kernel once, on small odd shapes: something for compute-sanitizer to look at.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1    # or a read beyond one tensor ends in another one
    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool synccheck --error-exitcode 1 python benchmarks/sanitize.py

Without the sanitizer it shows that all of it runs and gives finite numbers; exit status 0. Run it once so before, and
the kernels are compiled. Without a GPU: TRITON_INTERPRET=1 python benchmarks/sanitize.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsek_kernels import decode_step, prefill, sparsek_attention
from sparsek_kernels.gpu import attention, operator, ops, wavelet
from sparsek_kernels.gpu.selection import select_gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GATES = ("straight_through", "value", "key_value", "none")
BATCH, KV_HEADS = (2, 2) if ON_GPU else (1, 1)
HEADS, WIDTH, SELECTED, WINDOW, SUPPORT = 3 * KV_HEADS, 24, 7, 5, 19


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(name: str, *results: Tensor) -> None:
    for x in results:
        if not bool(torch.isfinite(x).all()):
            raise SystemExit(f"{name}: the result holds NaN or infinity")
    print(f"{name}: ran", flush=True)


def select(length: int) -> None:
    """The selection alone, at a length at which the tree has levels of every kind."""
    scores, start = draw(1, KV_HEADS, length), torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
    nothing = scores.new_empty(1, KV_HEADS, 0)
    found = select_gpu(
        scores, start, nothing, nothing.long(), num_selected=SELECTED, window=WINDOW, support=SUPPORT, chunk_size=128
    )
    check(f"selection of {length}", found.selected_mass, found.visible_until, found.alive)


def attend(length: int, gate: str, dtype: torch.dtype, width: int = WIDTH) -> None:
    """Forward and backward over sequences of three documents."""
    inputs = [draw(BATCH, length, heads, width, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [x.requires_grad_() for x in (*inputs, draw(BATCH, length, KV_HEADS))]
    ids = torch.arange(length, device=DEVICE).expand(BATCH, -1) * 3 // length
    out = sparsek_attention(
        *inputs, num_selected=SELECTED, window=WINDOW, support=SUPPORT, gate=gate, document_ids=ids, backend="triton"
    )
    grads = torch.autograd.grad(out, inputs, draw(*out.shape, dtype=dtype), allow_unused=True)
    check(f"attention {gate} {dtype} {width}", out, *(x for x in grads if x is not None))


def attend_with_carry(length: int, gate: str, dtype: torch.dtype) -> None:
    """A later shard: w - 1 tokens of halo, S scores and k pairs of what came before."""
    tokens = WINDOW - 1 + length
    query, key, value = (draw(1, n, heads, WIDTH, dtype=dtype) for n, heads in
                         ((length, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS)))  # fmt: skip
    pairs = [draw(1, KV_HEADS, SELECTED, WIDTH, dtype=dtype) for _ in range(2)]
    scores = draw(1, tokens, KV_HEADS)
    carried = draw(1, KV_HEADS, SUPPORT).sort(dim=-1, descending=True).values
    positions = -WINDOW - torch.arange(SUPPORT, device=DEVICE).expand(1, KV_HEADS, -1).contiguous()
    start = torch.full((1, length), -1000, device=DEVICE)
    start[:, length // 2 :] = length // 2
    tau, visible, from_, until, number, _, _, alive = ops.select_op(
        scores, start, carried, positions, SELECTED, WINDOW, SUPPORT, 128
    )
    inputs = [x.requires_grad_() for x in (query, key, value, scores, *pairs, carried)]
    selection = (tau, visible, from_, until, number, alive, start)
    out, _ = ops.attention_op(*inputs, *selection, WINDOW, gate, WIDTH**-0.5)
    grads = torch.autograd.grad(out, inputs, draw(*out.shape, dtype=dtype))
    check(f"attention with a carry {gate} {dtype}", out, *grads)


def decode(length: int, gate: str, dtype: torch.dtype) -> None:
    """Two tokens after a prompt."""
    prompt = [draw(2, length, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2)]
    state = prefill(*prompt, draw(2, length, KV_HEADS), num_selected=SELECTED, window=WINDOW, support=SUPPORT)
    for _ in range(2):
        new = [draw(2, 1, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        out = decode_step(*new, draw(2, 1, KV_HEADS), state, gate=gate, backend="triton")
    check(f"decoding {gate} {dtype}", out)


def project(length: int) -> None:
    """The operator, forward and backward."""
    scores = draw(3, length).requires_grad_()
    gates = operator.project(scores, SELECTED)
    check("operator", gates, *torch.autograd.grad(gates, scores, draw(3, length)))


def jobs(length: int) -> Iterator[tuple[Callable[..., None], tuple]]:
    yield select, (length,)
    yield project, (length,)
    short = length // 10 if ON_GPU else length
    half = torch.bfloat16 if ON_GPU else torch.float32
    for gate in GATES:
        yield attend, (short, gate, half)
        yield decode, (WINDOW + SELECTED + 3, gate, half)
    for gate in GATES[:2]:
        yield attend_with_carry, (short, gate, half)
    if ON_GPU:
        yield attend, (short, "key_value", torch.float32)
        # On Hopper, its own forward; the backward of this width differs in its tiles.
        yield attend, (short, GATES[0], half, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4500 if ON_GPU else 33, help="tokens of the longest sequence")
    length = parser.parse_args().length
    if not ON_GPU:
        # Small tiles, so that short sequences have several: the interpreter takes seconds for thousands of tokens.
        wavelet.TILE, attention.ROWS_AT_ONCE = 16, 2
    torch.manual_seed(0)
    for job, arguments in jobs(length):
        job(*arguments)
    if ON_GPU:
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
