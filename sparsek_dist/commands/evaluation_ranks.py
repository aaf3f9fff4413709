"""The ranks of an evaluation: all that were started share each sequence, as one sequence-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsek_dist.commands.evaluation_target import Target
from sparsek_dist.commands.trained import open_model
from sparsek_dist.evaluation.shards import Sharing
from sparsek_dist.parallel.mesh import RankGroup, build_mesh
from sparsek_dist.parallel.rendezvous import initialize, shutdown
from sparsek_dist.training.checksum import require_equal_weights
from sparsek_dist.training.same_text import require_same_text
from sparsek_dist.training.together import together


@contextmanager
def opened(target: Target, fingerprint: str, *, text: str) -> Iterator[tuple[Any, Sharing]]:
    """The target's model on all ranks, which hold the same weights and read the same text; alone, no group is made.

    Args:
        fingerprint: of the text.
        text: its name, in errors.

    Raises:
        CheckpointError: on all ranks, if one of them cannot load the model.
        DataError, PeerError: on all ranks, if they read different texts, or hold different weights.
    """
    ranks = target.ranks
    group, device = RankGroup(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ranks.world_size > 1:
        device = initialize(ranks, timeout=target.timeout)
        group = build_mesh(ranks.world_size, timeout=target.timeout).sequence
        require_same_text(fingerprint, group, source=text)
    with together(group):
        model = open_model(
            target.weights, target.spec, backend=target.backend, group=group, exchange=target.exchange
        ).to(device)
    require_equal_weights(model, group)
    yield model, Sharing(group, target.least_shard)
    # Not reached after an error: ending a group whose other ranks are gone may wait for them.
    if ranks.world_size > 1:
        shutdown()
