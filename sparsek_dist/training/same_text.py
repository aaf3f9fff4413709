"""Do all ranks read the same text? Each host tokenises its own copy of a corpus, and nothing else would notice."""

from __future__ import annotations

import socket

from sparsek_dist.errors import DataError
from sparsek_dist.parallel.mesh import RankGroup
from sparsek_dist.training.together import gather_objects


def require_same_text(fingerprint: str, world: RankGroup, *, source: str) -> None:
    """Compares what all ranks have tokenised. Every rank must call it.

    Args:
        fingerprint: of this rank's tokens.
        source: names the text in the error, as in `data.path = 'books/'`.

    Raises:
        DataError: on all ranks, naming the first that differs from rank 0.
    """
    told = gather_objects((fingerprint, socket.gethostname()), world)
    first, host = told[0]
    for rank, (other, its_host) in enumerate(told):
        if other != first:
            raise DataError(
                f"{source} is not the same text for all ranks: rank 0 on host {host} has tokens {first[:12]}, rank "
                f"{rank} on host {its_host} has {other[:12]}: give every host the same files and the same tokenizer "
                "(a shared folder, or copies), and delete the data.cache of a host whose copy was replaced"
            )
