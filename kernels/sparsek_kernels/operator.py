"""The SPARSEK operator: a differentiable top-k along the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_kernels.dispatch import no_triton
from sparsek_kernels.threshold import solve_threshold


def sparsek(scores: Tensor, num_selected: int) -> Tensor:
    """Projects scores onto {0 <= p <= 1, sum p = k}: gates that are 1 for clear winners and 0 for clear losers.

    p = argmin ||p - scores||^2 = clip(scores - tau, 0, 1) (arXiv 2406.16747). With k = 1 it is sparsemax. The
    gradient is Diag(s) - s s^T / |s| with s = 1{0 < p < 1}: saturated and zero entries get none.

    Args:
        scores: [..., n] floating point, finite.
        num_selected: k >= 0. With at most k entries every gate is 1.

    Returns:
        Gates [..., n], in the dtype of `scores`.

    Raises:
        ValueError: for k < 0, a tensor without dimensions, an integer dtype, or a NaN or infinite score.
    """
    if num_selected < 0:
        raise ValueError(f"num_selected = {num_selected} must not be negative")
    if scores.dim() == 0 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating-point tensor [..., n], not {scores.dtype} {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity: SPARSEK needs finite scores")
    if scores.is_cuda and no_triton() is None:
        # Imported here, as triton exists for few platforms and nothing else needs it.
        from sparsek_kernels.gpu.operator import project

        return project(scores, num_selected)
    return _Sparsek.apply(scores, num_selected)


class _Sparsek(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, num_selected: int) -> Tensor:
        if scores.shape[-1] <= num_selected:
            gates = torch.ones_like(scores)
        elif num_selected == 0:
            gates = torch.zeros_like(scores)
        else:
            gates = _project(scores.double(), num_selected).to(scores.dtype)
        ctx.save_for_backward(gates)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors
        fractional = (gates > 0) & (gates < 1)
        inside = torch.where(fractional, grad, 0)
        mean = inside.sum(-1, keepdim=True) / fractional.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(fractional, grad - mean, 0), None


def _project(scores: Tensor, num_selected: int) -> Tensor:
    ranked = scores.sort(dim=-1, descending=True).values
    # tau lies in [z_(k) - 1, z_(k)], so an entry more than 1 away from z_(k) has gate 0 or 1 whatever its value: after
    # this clamp the sums stay small and exact however large the scores are.
    centre = ranked[..., num_selected - 1 : num_selected]
    ranked = (ranked - centre).clamp(-1, 1)
    sums = F.pad(ranked.cumsum(-1), (1, 0))
    total = torch.full_like(centre, ranked.shape[-1], dtype=torch.int64)
    # One subset, of all entries: the number among the first r is r.
    tau = solve_threshold(
        ranked, total, num_selected, count=lambda index: index, sum_=lambda index: sums.gather(-1, index)
    )
    return ((scores - centre).clamp(-1, 1) - tau).clamp(0, 1)
