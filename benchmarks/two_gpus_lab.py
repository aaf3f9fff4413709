"""What the parts of two_gpus.py work with: a rank's place, agreed times, the result, steps without exchange."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import deepspeed.comm
import torch
from torch import Tensor

from machine import save
from sparsek_dist.parallel.comm import all_reduce_sum
from sparsek_dist.parallel.mesh import Mesh, build_mesh
from sparsek_dist.training.together import gather_objects
from two_gpus_plan import RESULT, Plan


@dataclass
class Lab:
    plan: Plan
    device: torch.device
    rank: int
    size: int
    meshes: dict[int, Mesh] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def backend(self) -> str:
        return "triton" if self.gpu else "torch"

    def mesh(self, degree: int) -> Mesh:
        """Every rank must ask for the same degrees in the same order."""
        if degree not in self.meshes:
            self.meshes[degree] = build_mesh(degree, timeout=timedelta(seconds=120))
        return self.meshes[degree]

    def late(self) -> bool:
        """The same answer on all ranks, whose clocks are read at different moments."""
        mine = torch.tensor(float(time.time() > self.plan.deadline), device=self.device)
        return bool(all_reduce_sum(mine, self.mesh(self.size).world) > 0)

    def attempt(self, name: str, measure: Callable[[Lab], None]) -> None:
        """Notes a failure of all ranks and goes on. Where one alone fails, the others wait in vain, and all end."""
        failed = ""
        try:
            measure(self)
        except Exception as error:  # noqa: BLE001  the parts after it must still be measured
            traceback.print_exc()
            failed = f"failed: {name} on {self.size}: {error!r}"[:200]
        if any(gather_objects(failed, self.mesh(self.size).world)):
            self.note(failed or f"failed: {name} on another rank")
            gc.collect()
            self.forget()

    def largest(self, value: float) -> float:
        return max(gather_objects(value, self.mesh(self.size).world))

    def add(self, part: str, row: Any) -> None:
        """Appends to the list of this part, on the disk."""
        self._change(lambda result: result.setdefault(part, []).append(row))

    def note(self, text: str) -> None:
        self.say(text)
        self._change(lambda result: result["notes"].append(text))

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def milliseconds(self, work: Callable[[], object], repeats: int) -> float:
        """Median on the slowest rank, after one to warm up. The number is given: ranks must not choose it."""
        work()
        times = []
        for _ in range(repeats):
            deepspeed.comm.barrier()
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return self.largest(statistics.median(times))

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def forget(self) -> None:
        if self.gpu:
            torch.cuda.empty_cache()

    def _change(self, change: Callable[[dict[str, Any]], object]) -> None:
        if self.rank == 0:
            path = self.plan.out / RESULT
            result = json.loads(path.read_text())
            change(result)
            save(path, result)


class WithoutExchange:
    """Runs a step again with what it received before, handed out instead of sent: what that saves, the exchange costs.

    Only the collectives of one group are replaced: reductions of gradients over others go on. It stands in for
    functions of `deepspeed.comm`, through which all of the project's traffic goes, and need not know who calls them.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.kept: list[list[Tensor]] = []
        self._next: Iterator[list[Tensor]] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A step in here communicates, and what arrives is kept."""
        self.kept.clear()
        with self._in_place_of_the_real():
            yield
        assert self.kept, "nothing was received through deepspeed.comm: the exchange goes another way now"

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A step in here, the same as the one before, communicates nothing."""
        self._next = iter(self.kept)
        with self._in_place_of_the_real():
            yield
        assert next(self._next, None) is None, "the step received less than before"
        self._next = None

    @contextmanager
    def _in_place_of_the_real(self) -> Iterator[None]:
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
        changed = {name: self._collective(getattr(deepspeed.comm, name)) for name in names}
        changed["batch_isend_irecv"] = self._neighbours(deepspeed.comm.batch_isend_irecv)
        with mock.patch.multiple(deepspeed.comm, **changed):
            yield

    def _collective(self, real: Callable) -> Callable:
        def instead(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("group") is not self.group:
                return real(output, *args, **kwargs)
            self._receive([output], lambda: [real(output, *args, **kwargs)])
            return _Done()

        return instead

    def _neighbours(self, real: Callable) -> Callable:
        def instead(messages: list[Any]) -> Any:
            if messages[0].group is not self.group:
                return real(messages)
            self._receive([x.tensor for x in messages if x.op == "irecv"], lambda: real(messages))
            return []

        return instead

    def _receive(self, targets: list[Tensor], real: Callable[[], list[Any]]) -> None:
        if self._next is not None:
            for target, kept in zip(targets, next(self._next), strict=True):
                target.copy_(kept)
            return
        for request in real():
            if request is not None:
                request.wait()
        self.kept.append([x.clone() for x in targets])


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""
