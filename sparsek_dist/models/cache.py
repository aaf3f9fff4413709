"""A transformers cache of constant size: w window pairs, k selected pairs and S scores per KV head and layer.

The unit is a cache layer, so any `Cache` will do: where attention is SPARSEK, the adapter puts a `KeptLayer` in the
place of the empty growing layer that transformers made. `generate`, `use_cache=True` and `DynamicCache()` work as they
are, and layers that stay dense keep their growing layer in the same cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from sparsek_dist.attention.parallel import ParallelAttention
from sparsek_dist.errors import ConfigError
from sparsek_dist.models.families import attention_modules
from sparsek_kernels.decode import DecodeState, decode_step, extend, prefill, reorder, state_bytes


class KeptLayer(CacheLayerMixin):
    """The past of one layer: a `DecodeState` that this attention fills and reads."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    # Before the first token nothing is known of head counts and precision, and nothing needs to be.
    supports_early_init = False

    def __init__(self, attention: ParallelAttention) -> None:
        super().__init__()
        if attention.group.size > 1:
            raise ConfigError("a cache belongs to one process, but this model shares its sequence: use_cache=False")
        self.attention = attention
        self.state: DecodeState | None = None
        self.seen = 0
        """Tokens so far, padding included."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, position_ids: Tensor, *, scale: float
    ) -> Tensor:
        """Attention [b, s, h, d] of s >= 1 new tokens, which are then part of the past.

        The first piece runs as in training, so its output is differentiable; later ones keep no graph.

        Args:
            query: [b, s, h, d]; key and value: [b, s, g, d]; scores: [b, s, g].
            position_ids: [b, s] in the document, 0 in left padding.

        Raises:
            ConfigError: if a later piece begins a new document, or is asked for gradients.
        """
        attention, budget = self.attention, self.attention.budget
        index = torch.arange(self.seen, self.seen + query.shape[1], device=query.device)
        # Only the last document of a piece is continued.
        start = index[-1] - position_ids[:, -1]
        self.seen += query.shape[1]
        if self.state is None:
            output = attention(query, key, value, scores, position_ids, scale=scale)
            self.state = prefill(
                key.detach(),
                value.detach(),
                scores.detach(),
                num_selected=budget.num_selected,
                window=budget.window,
                support=budget.support,
                document_start=start,
            )
            return output
        if torch.is_grad_enabled() and query.requires_grad:
            raise ConfigError("a continued cache gives no gradients: use torch.no_grad(), or train without a cache")
        self._continue(self.state, start, index - position_ids, index)
        step = decode_step if query.shape[1] == 1 else extend
        backend = "auto" if attention.backend == "reference" else attention.backend
        return step(query, key, value, scores, self.state, gate=budget.gate, scale=scale, backend=backend)

    @staticmethod
    def _continue(state: DecodeState, start: Tensor, starts: Tensor, index: Tensor) -> None:
        """Checks that the new tokens go on with the row's document; a row that was padding alone may begin one.

        Args:
            start: [b], where the document of the piece's last token begins; starts: [b, s] of every token.
            index: [s] of the new tokens.
        """
        was_padding = (state.document_start >= index[0] - 1) & (start >= index[0])
        goes_on = (start == state.document_start) | was_padding
        # Padding within the piece: every token before the document is one of its own.
        whole = ((starts == start.unsqueeze(-1)) | (starts == index)).all(dim=-1)
        if not bool((goes_on & whole).all()):
            raise ConfigError(
                "position_ids begin a new document, or skip some positions, in a text that is being continued: "
                "use a new cache for a new document"
            )
        state.document_start.copy_(start)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new pairs on: they are kept by `attend`, which knows their scores."""
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the state is made by the first `attend`."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit, as the size does not depend on the length."""
        return -1

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            reorder(self.state, beam_idx.to(self.state.key.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            rows: dict[str, Any] = {name: x[indices] for name, x in self.state.tensors().items()}
            self.state = replace(self.state, **rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(len(self.state.length), device=self.state.key.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses, even for 0: pairs that were dropped cannot come back, and who calls this will want them to."""
        raise ConfigError(
            "a SPARSEK cache cannot take tokens back, which assisted generation wants: generate without it"
        )


class SparsekCache(Cache):
    """An empty cache of a model with SPARSEK attention, for those who want one before the first call."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(
            layers=[
                DynamicLayer() if module.layer_kind == "full" else KeptLayer(module.parallel_attention)
                for module in attention_modules(model)
            ]
        )


def kept_layer(cache: Cache, index: int, attention: ParallelAttention) -> KeptLayer:
    """The layer of a cache that belongs to a SPARSEK layer; an empty growing one is replaced.

    Raises:
        ConfigError: for caches of a fixed length or in low precision, or filled by dense attention.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, KeptLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ConfigError(
            f"a {type(layer).__name__} cannot serve SPARSEK attention, whose cache is of constant size anyway: "
            "leave cache_implementation out"
        )
    if layer.get_seq_length() > 0:
        raise ConfigError("this cache was filled by dense attention: begin with an empty one")
    cache.layers[index] = kept = KeptLayer(attention)
    return kept


def cache_bytes(cache: Cache) -> int:
    """Memory of a cache; without dense layers it does not depend on the length."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, KeptLayer):
            total += 0 if layer.state is None else state_bytes(layer.state)
        elif layer.keys is not None:
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total
