"""Without a GPU the Triton kernels run in its interpreter, chosen before anything (transformers, say) imports it."""

from __future__ import annotations

import dataclasses
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

    from triton.runtime.interpreter import interpreter_builder

    # Looking for overflow at every addition would take half of the time.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
