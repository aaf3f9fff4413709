"""Runs a function on several processes of this machine, as ranks of one gloo world, and collects what it returns.

    def _sum(rank, world_size, scale): ...            # a module-level function
    assert run_distributed(_sum, 2, 10.0) == [30.0, 30.0]

Each start costs the import of torch and deepspeed on every rank, so let one function run several cases.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class RankFailure(AssertionError):
    """A rank raised, died or stayed silent; the message holds its traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank, after the process group exists; the results in rank order.

    Args:
        fn: a module-level function; it, `args` and its result travel by pickle.
        timeout: seconds after which all ranks are killed. Collectives fail a little earlier, with their own message.

    Raises:
        RankFailure: with the traceback of the rank that failed first. No child survives, whatever happens.
    """
    deadline = time.monotonic() + timeout
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(fn, rank, world_size, args, folder, timeout, sender), daemon=True
                )
                process.start()
                # With the parent's copy closed, a rank that dies without a word reads as end of file.
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            results = _collect(pipes, processes, deadline)
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            return results
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Connection], processes: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailure(f"no word from ranks {silent} within the time limit; they were killed")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankFailure(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RankFailure(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(fn, rank: int, world_size: int, args: tuple, folder: str, timeout: float, sender: Connection) -> None:
    import torch

    from sparsek_dist.parallel.rendezvous import Ranks, initialize, shutdown

    torch.set_num_threads(1)
    try:
        # A file as the meeting place: no port to find, so no other test run can take it.
        ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, local_size=world_size)
        limit = timedelta(seconds=max(1.0, 0.8 * timeout))
        initialize(ranks, timeout=limit, init_method=f"file://{Path(folder) / 'store'}")
        result = fn(rank, world_size, *args)
        # Plain pickle copies tensors; torch's own reducers would leave them in a memory that ends with this process.
        message = pickle.dumps((True, result))
    except BaseException:  # noqa: BLE001 - even SystemExit must reach the parent as a failure
        # Sent before the group ends: the other ranks only notice then, so the first cause is the first reported.
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sender.close()
        raise SystemExit(1) from None
    sender.send_bytes(message)
    sender.close()
    shutdown()
