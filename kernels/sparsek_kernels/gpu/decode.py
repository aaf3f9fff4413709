"""One decoding step as one Triton kernel: attention over ring and selected slots, and the update of the state.

Each KV head is split over several programs. All of them read the state as it was, and each works out from a few
kilobytes of scores what the new state is: who leaves the window, whom it replaces, tau. So attention over the NEW
state needs no waiting: the pair that leaves the window still lies in its slot of the ring, and is read there if it is
selected; the pair it replaces is masked; the new token is the first entry of the first program's softmax. The program
that finishes last adds up the parts and then, as nobody reads any more, writes the state.

The reads are (w + k) pairs per KV head, once; the query heads of a group share them as the rows of one matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.gpu.call import on_device_of
from sparsek_kernels.gpu.decode_state import decide, update

if TYPE_CHECKING:
    from sparsek_kernels.decode_state import DecodeState

LARGEST = {"num_selected": 8192, "support": 16384, "head_dim": 256}
"""Scores of one KV head are held in registers."""
PROGRAMS_PER_PROCESSOR = 1
"""Nearly, where the heads can be split: more of them would each look for the threshold, at the cost of all."""


@triton.jit
def _attend(
    q, new_key, new_value, old_key, old_value, old_scores, split, split_rows, scale,
    position, start, admitted, evicted, tau,
    W: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    GATE_VALUE: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    """Softmax over the rows of one split; the first split's begins with the new token. Highest logit, norm, sum."""
    d, n = tl.arange(0, q.shape[1]), tl.arange(0, BLOCK_N)
    first = split == 0
    highest = tl.where(first, tl.sum(q.to(tl.float32) * new_key[None, :], 1) * scale, -1e30)
    norm = tl.where(first, 1.0, 0.0) + tl.zeros([q.shape[0]], tl.float32)
    total = tl.where(first, new_value[None, :], 0.0) + tl.zeros(q.shape, tl.float32)
    slot = (position % W).to(tl.int32)
    for begin in tl.range(split * split_rows, tl.minimum((split + 1) * split_rows, W + K), BLOCK_N):
        r = begin + n
        within = r < W + K
        pairs = within[:, None] & (d < D)[None, :]
        k = tl.load(old_key + r[:, None] * D + d[None, :], mask=pairs, other=0.0)
        v = tl.load(old_value + r[:, None] * D + d[None, :], mask=pairs, other=0.0)
        u = tl.load(old_scores + r, mask=within, other=float("-inf"))
        in_ring = r < W
        age = tl.where(r > slot, slot - r + W, slot - r)
        in_window = in_ring & (r != slot) & (position - age >= start)
        held = (u > float("-inf")) & ((r != W + evicted) | (admitted == 0))
        chosen = (in_ring & (r == slot) & admitted) | ((r >= W) & held)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if GATE_VALUE:
            gates = tl.minimum(tl.maximum(tl.where(chosen, u, 0.0) - tau, 0.0), 1.0)
            gates = tl.where(chosen, gates, 1.0)
            if GATE_KEY:
                logits *= gates[None, :]
        logits = tl.where((in_window | chosen)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        norm = norm * shrink + tl.sum(weights, 1)
        if GATE_VALUE:
            weights *= gates[None, :]
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    return highest, norm, total


@triton.jit
def _combine(
    partial_out, partial_norm, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The output [BLOCK_H, BLOCK_D] of one KV head from parts [splits, G, D] and [splits, 2, G] of other programs."""
    p, g, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_H], -1e30, tl.float32)
    norm = tl.zeros([BLOCK_H], tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for begin in range(0, splits, BLOCK_P):
        part = begin + p
        exists = (part < splits)[:, None] & (g < G)[None, :]
        at = part[:, None] * (2 * G) + g[None, :]
        peaks = tl.load(partial_norm + at, mask=exists, other=-1e30, cache_modifier=".cg")
        norms = tl.load(partial_norm + at + G, mask=exists, other=0.0, cache_modifier=".cg")
        row = part[:, None] * G + g[None, :]
        filled = exists[:, :, None] & (d < D)[None, None, :]
        sums = tl.load(
            partial_out + row[:, :, None] * D + d[None, None, :], mask=filled, other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(highest, tl.max(peaks, 0))
        shrink = tl.exp2(highest - higher)
        share = tl.exp2(peaks - higher[None, :])
        norm = norm * shrink + tl.sum(norms * share, 0)
        total = total * shrink[:, None] + tl.sum(sums * share[:, :, None], 0)
        highest = higher
    # Rows beyond the group have a norm of 0.
    return total / tl.where(norm > 0.0, norm, 1.0)[:, None]


@triton.jit(do_not_specialize=["num_kv_heads", "splits", "split_rows"])
def _step(
    query, key, value, scores, out, partial_out, partial_norm, scale,
    old_key, old_value, old_scores, selected_positions, support_scores, support_positions,
    length, document_start, arrivals, last_tau, num_kv_heads, splits, split_rows,
    query_b, query_h, key_b, key_g, value_b, value_g, scores_b, scores_g,
    W: tl.constexpr, K: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    GATE_VALUE: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    head = (tl.program_id(0) // splits).to(tl.int64)
    row, kv_head = head // num_kv_heads, head % num_kv_heads
    key += row * key_b + kv_head * key_g
    value += row * value_b + kv_head * value_g
    old_key += head * (W + K) * D
    old_value += head * (W + K) * D
    old_scores += head * (W + K)
    selected_positions += head * K
    support_scores += head * S
    support_positions += head * S
    partial_out += head * splits * G * D
    partial_norm += head * splits * 2 * G
    arrivals += row * (num_kv_heads + 1)
    last_tau += head

    position, start = tl.load(length + row), tl.load(document_start + row)
    exists, admitted, evicted, tau = decide(
        position, start, old_scores, selected_positions, support_scores, support_positions, last_tau,
        W, K, S, BLOCK_K, BLOCK_S, GATE_VALUE,
    )  # fmt: skip
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * G + g
    filled = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + row * query_b + heads[:, None] * query_h + d[None, :], mask=filled, other=0.0)
    new_key = tl.load(key + d, mask=d < D, other=0.0).to(tl.float32)
    new_value = tl.load(value + d, mask=d < D, other=0.0).to(tl.float32)
    highest, norm, total = _attend(
        q, new_key, new_value, old_key, old_value, old_scores, split, split_rows, scale,
        position, start, admitted, evicted, tau, W, K, D, BLOCK_N, GATE_VALUE, GATE_KEY,
    )  # fmt: skip

    at = split * G
    tl.store(partial_out + (at + g)[:, None] * D + d[None, :], total, mask=filled)
    tl.store(partial_norm + 2 * at + g, highest, mask=g < G)
    tl.store(partial_norm + 2 * at + G + g, norm, mask=g < G)
    tl.debug_barrier()  # All threads have written, and read the old state, before one of them says so.
    if tl.atomic_add(arrivals + kv_head, 1, sem="acq_rel") == splits - 1:
        result = _combine(partial_out, partial_norm, splits, G, D, BLOCK_H, BLOCK_D, BLOCK_P)
        score = tl.load(scores + row * scores_b + kv_head * scores_g).to(tl.float32)
        # A score that is no number must not pass unseen.
        result = tl.where(tl.abs(score) < float("inf"), result, float("nan"))
        own = tl.arange(0, BLOCK_H)
        target = out + (row * num_kv_heads + kv_head) * G * D + own[:, None] * D + d[None, :]
        tl.store(target, result, mask=(own < G)[:, None] & (d < D)[None, :])
        score = tl.where(score == 0.0, 0.0, score)  # no -0.0
        update(
            key, value, score, old_key, old_value, old_scores, selected_positions, support_scores, support_positions,
            (position % W).to(tl.int32), position - W, exists, admitted, evicted, W, S, D, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        if GATE_VALUE:
            tl.store(last_tau, tau)
        tl.store(arrivals + kv_head, 0)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + num_kv_heads, 1, sem="acq_rel") == num_kv_heads - 1:
            tl.store(length + row, position + 1)
            tl.store(arrivals + num_kv_heads, 0)


def why_not(query: Tensor, state: DecodeState) -> str:
    """What keeps the kernel from running on this state; empty if nothing does."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query is {query.dtype}, the kernel knows float16, bfloat16 and float32"
    sizes = {"num_selected": state.num_selected, "support": state.support, "head_dim": query.shape[3]}
    for name, size in sizes.items():
        if size > LARGEST[name]:
            return f"{name} = {size} exceeds the kernel's {LARGEST[name]}"
    return ""


def cut(heads: int, rows: int, processors: int, block: int) -> tuple[int, int]:
    """How b * g heads of w + k rows are split over programs: splits per head and rows per split."""
    blocks = triton.cdiv(rows, block)
    splits = min(blocks, max(1, round(PROGRAMS_PER_PROCESSOR * processors / heads)))
    split_rows = triton.cdiv(blocks, splits) * block
    return triton.cdiv(rows, split_rows), split_rows


def warps(state: DecodeState) -> int:
    """Of a program: so many that each thread holds at most 32 of the S scores, twice."""
    return 4 if state.support <= 4096 else 8 if state.support <= 8192 else 16


def constants(state: DecodeState, query: Tensor, gate: str) -> dict[str, int | bool]:
    """The kernel's compile-time sizes."""
    g, d = state.key.shape[1], state.key.shape[3]
    group, width = query.shape[2] // g, max(16, triton.next_power_of_2(d))
    gated = gate in ("value", "key_value") and state.num_selected > 0
    return {
        "W": state.window,
        "K": state.num_selected,
        "S": state.support,
        "G": group,
        "D": d,
        "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": width,
        "BLOCK_K": triton.next_power_of_2(max(state.num_selected, 1)),
        "BLOCK_S": triton.next_power_of_2(max(state.support, 1)),
        "BLOCK_N": 64 if d <= 128 else 32,
        "BLOCK_H": triton.next_power_of_2(group),
        # Parts that are added at once: what 4 warps hold in 64 registers.
        "BLOCK_P": max(1, 8192 // (triton.next_power_of_2(group) * width)),
        "GATE_VALUE": gated,
        "GATE_KEY": gated and gate == "key_value",
    }


def decode_step_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    state: DecodeState,
    *,
    gate: str,
    scale: float,
    processors: int | None = None,
    block: int | None = None,
) -> Tensor:
    """`decode_step` on a CUDA device. Processors and block (rows of one iteration) are for tests and tuning."""
    b, _, h, d = query.shape
    g = key.shape[2]
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if processors is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    sizes = constants(state, query, gate)
    if block is not None:
        sizes["BLOCK_N"] = block
    splits, split_rows = cut(b * g, state.key.shape[2], processors, sizes["BLOCK_N"])
    out = query.new_empty(b, 1, h, d)
    partial_out = query.new_empty(b * h * splits * d, dtype=torch.float32)
    partial_norm = query.new_empty(2 * b * h * splits, dtype=torch.float32)
    with on_device_of(query):
        _step[(b * g * splits,)](
            query, key, value, scores, out, partial_out, partial_norm, scale * 1.4426950408889634,
            state.key, state.value, state.scores, state.selected_positions, state.support_scores,
            state.support_positions, state.length, state.document_start, state.arrivals, state.tau,
            g, splits, split_rows,
            query.stride(0), query.stride(2), key.stride(0), key.stride(2), value.stride(0), value.stride(2),
            scores.stride(0), scores.stride(2), **sizes,
            num_warps=warps(state), num_stages=3,
        )  # fmt: skip
    return out
