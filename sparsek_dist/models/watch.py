"""Whether the attention scores of all layers are finite: asked once per forward of a model, not once per layer.

A NaN would make the selection arbitrary without a trace, so it ends the run. Asking in every layer would make the host
wait for the device in every layer; so the answers are collected, and read when the decoder's work is queued. The layers
in between end whatever the scores are, and so do the exchanges of sequence parallelism.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsek_dist.errors import NumericsError
from sparsek_kernels.device_checks import DeviceChecks


class ScoreWatch:
    """Watches the layers of one model; lives in its hooks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._checks = DeviceChecks()
        self._collecting = False
        # The decoder is called whatever stands around it: a language model's head, LoRA, an engine.
        decoder = model.base_model
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end, always_call=True)

    def add(self, layer: int, scores: Tensor, *, now: bool = False) -> None:
        """Scores of a layer that is about to use them.

        Args:
            now: look at once, as what follows has to know.

        Raises:
            NumericsError: naming the layer; where it is part of a model's forward, that raises instead.
        """
        if not self._collecting and torch._C._current_graph_task_id() != -1:
            return  # Within a backward pass, layers are only run again: the forward pass has looked at these scores.
        finite = torch.isfinite(scores.detach()).all()
        self._checks.add(finite, f"layer {layer}: attention scores hold NaN or infinity; the run has diverged")
        if now or not self._collecting:
            self._look()

    def _begin(self, decoder: Any, args: tuple) -> None:
        self._collecting = True

    def _end(self, decoder: Any, args: tuple, output: Any) -> None:
        self._collecting = False
        error = sys.exception() if output is None else None
        if error is None:
            self._look()
        elif (complaint := self._checks.failure()) is not None:
            # Numbers that are not finite may be why it failed, and torch keeps the first error.
            error.add_note(complaint)

    def _look(self) -> None:
        if (complaint := self._checks.failure()) is not None:
            raise NumericsError(complaint)
