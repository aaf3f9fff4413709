"""Where ranks meet before there is a process group, and speak even if there never is one: torch's key-value store.

The process group either forms or does not, and then says little about why. Here rank 0 learns who came, and all can
tell each other what they found.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sparsek_dist.errors import PeerError
from sparsek_dist.parallel.rendezvous import Ranks

SHORTEST_POLL, LONGEST_POLL = 0.001, 0.05
"""Seconds; a clock is compared by quick answers, and a late host costs little while it is waited for."""


class Meeting:
    """Ranks that write values under keys of their own; rank 0 collects them and tells all of them something."""

    def __init__(self, ranks: Ranks, *, timeout: float) -> None:
        """Rank 0 opens the store, the others connect to it.

        Args:
            ranks: from `discover`.
            timeout: seconds to wait for others, here and in every later call.

        Raises:
            PeerError: if rank 0 cannot be reached, with what there is to know about why.
        """
        self.ranks, self.timeout = ranks, timeout
        if ranks.world_size == 1:
            self._store: dist.Store = dist.HashStore()
            return
        # torchrun keeps a store of its own under this address; then every rank is a guest.
        has_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self._store = dist.PrefixStore(
                "meeting",
                dist.TCPStore(
                    ranks.address,
                    ranks.port,
                    ranks.world_size,
                    is_master=ranks.rank == 0 and not has_host,
                    timeout=self.limit,
                    wait_for_workers=False,
                    # The process group will open the same port in this process.
                    multi_tenant=True,
                ),
            )
        except (dist.DistError, RuntimeError) as error:
            raise PeerError(_why_not(ranks, timeout)) from error

    @property
    def limit(self) -> timedelta:
        """The timeout, as torch.distributed wants it."""
        return timedelta(seconds=self.timeout)

    def publish(self, key: str, value: Any) -> None:
        """Leaves this rank's value, which must be plain data (JSON), for `collect`."""
        self._store.set(f"{key}/{self.ranks.rank}", json.dumps(value))

    def collect(
        self,
        key: str,
        *,
        senders: list[int] | None = None,
        patience: float = 1.0,
        enough: Callable[[dict[int, Any]], bool] = lambda told: False,
    ) -> dict[int, Any]:
        """Rank -> what it has published; those who are silent for `patience` times the timeout are left out.

        Args:
            key: as published.
            senders: ranks to wait for; all if None.
            patience: how many timeouts to wait.
            enough: whether what has come is enough to wait no longer.
        """
        waiting = list(range(self.ranks.world_size)) if senders is None else list(senders)
        told: dict[int, Any] = {}

        def ask() -> bool:
            for rank in [rank for rank in waiting if self._store.check([f"{key}/{rank}"])]:
                told[rank] = json.loads(self._store.get(f"{key}/{rank}"))
                waiting.remove(rank)
            return not waiting or enough(told)

        self._poll(ask, patience)
        return dict(sorted(told.items()))

    def tell(self, key: str, value: Any) -> None:
        """From rank 0 to all."""
        self._store.set(f"{key}/told", json.dumps(value))

    def hear(self, key: str, *, patience: float = 1.0) -> Any:
        """What rank 0 tells.

        Raises:
            PeerError: if it tells nothing in time, or is gone.
        """
        silent = f"rank 0 at {self.ranks.address}:{self.ranks.port} fell silent: what it printed says why"
        try:
            if not self._poll(lambda: self._store.check([f"{key}/told"]), patience):
                raise PeerError(silent)
            return json.loads(self._store.get(f"{key}/told"))
        except (dist.DistError, RuntimeError) as error:
            raise PeerError(silent) from error

    def _poll(self, ask: Callable[[], bool], patience: float) -> bool:
        """Whether `ask` came true in time. The store's own waiting would lock out this process's other threads."""
        deadline = time.monotonic() + patience * self.timeout
        pause = SHORTEST_POLL
        while not ask():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)
        return True


def _why_not(ranks: Ranks, timeout: float) -> str:
    """What keeps this rank from rank 0, by trying once more in small steps."""
    place = f"{ranks.address}:{ranks.port}"
    if ranks.rank == 0:
        return f"rank 0 cannot listen on {place}: another process may use the port; set another one (--master_port)"
    before = f"rank {ranks.rank} on {socket.gethostname()} did not reach rank 0 at {place} within {timeout:g} s: "
    try:
        target = socket.getaddrinfo(ranks.address, ranks.port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        return before + f"this host name does not resolve here ({error}). Use an address, or add it to /etc/hosts"
    try:
        with socket.create_connection((str(target[0]), ranks.port), timeout=3):
            return before + "something listens there that is no rank 0 of this run. Choose another port"
    except ConnectionRefusedError:
        return before + f"{target[0]} refuses: rank 0 was not started, has ended, or listens on another host"
    except OSError as error:
        return before + f"no answer from {target[0]} ({error}). Open the port in the firewall, or use another network"
