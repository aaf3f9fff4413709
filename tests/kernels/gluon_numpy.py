"""Gluon has no interpreter, so here numpy stands in for it: device functions are plain Python.

Arrays are blocks, and pointers know their bounds. What is asynchronous happens as late as it may: copies and products
when they are waited for, and until then their targets hold NaN. So what is read too early, or overwritten too soon,
shows. Layouts, and with them what threads share, are not looked at.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsek_kernels.gpu import forward_hopper, hopper_columns


class Layout:
    """Any; that of every block, buffer and operand."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @property
    def parent(self) -> Layout:
        return self


class Block(np.ndarray):
    """Numbers of a block."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=Layout())

    def to(self, dtype: Any) -> Block:
        return self.astype(dtype)


def block(x: Any) -> Block:
    return np.atleast_1d(np.asarray(x)).view(Block)


@dataclass(frozen=True)
class Pointer:
    memory: np.ndarray
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, block(self.offset)[index])

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where to read or write, and whether; nothing outside the tensor is touched, unless masked."""
        at, mask = np.broadcast_arrays(np.asarray(self.offset), mask)
        assert ((at[mask] >= 0) & (at[mask] < len(self.memory))).all(), (at[mask], len(self.memory))
        return at, mask


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    at, mask = pointer.places(mask)
    loaded = np.full(at.shape, other, pointer.memory.dtype)
    loaded[mask] = pointer.memory[at[mask]]
    return block(loaded)


def store(pointer: Pointer, value: Block, mask: Any) -> None:
    at, mask = pointer.places(mask)
    pointer.memory[at[mask]] = np.broadcast_to(value, at.shape)[mask]


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(x, Pointer):
        assert x.memory is y.memory
        return Pointer(x.memory, np.where(condition, x.offset, y.offset))
    return block(np.where(condition, x, y))


class Buffer(Block):
    """Shared memory; parts of it are views."""

    def index(self, slot: int) -> Buffer:
        return self[slot]

    def permute(self, axes: tuple[int, ...]) -> Buffer:
        return self.transpose(axes)

    def store(self, value: Block) -> None:
        self[...] = value

    def load(self, layout: Layout) -> Block:
        return np.array(self).view(Block)


def allocate(dtype: Any, shape: list[int], layout: Layout) -> Buffer:
    return np.full(shape, np.nan, dtype).view(Buffer)


class Copies:
    """Asynchronous copies, in groups; none lands before it is waited for."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def async_copy_global_to_shared(self, buffer: Buffer, pointer: Pointer, mask: Any) -> None:
        rows = load(pointer, np.broadcast_to(mask, buffer.shape))
        buffer[...] = np.nan
        self.open.append(lambda: buffer.store(rows))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, pending: int) -> None:
        done, self.groups = self.groups[: len(self.groups) - pending], self.groups[len(self.groups) - pending :]
        for land in itertools.chain(*done):
            land()


class Products:
    """Asynchronous matrix products; operands in shared memory are read when the product is waited for."""

    def __init__(self) -> None:
        self.running: list[tuple[Block, Any, Buffer, Block]] = []

    def start(self, a: Any, b: Buffer, acc: Block, use_acc: bool = True, is_async: bool = False) -> Block:
        result = np.full(acc.shape, np.nan).view(Block)
        self.running.append((result, a, b, acc if use_acc else 0 * acc))
        if not is_async:
            self.wait(0, (result,))
        return result

    def wait(self, pending: int, deps: tuple[Block, ...]) -> Block:
        done, self.running = self.running[: len(self.running) - pending], self.running[len(self.running) - pending :]
        for result, a, b, acc in done:
            result[...] = acc + np.asarray(a) @ np.asarray(b)
        (dep,) = deps
        return dep


LAYOUTS = ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout")
NUMPY = types.SimpleNamespace(
    arange=lambda low, high, layout: block(np.arange(low, high)), load=load, store=store, where=where,
    minimum=lambda *x: block(np.minimum(*x)), maximum=lambda *x: block(np.maximum(*x)),
    sum=lambda x, axis: block(np.sum(x, axis)), max=lambda x, axis: block(np.max(x, axis)), exp2=np.exp2, log2=np.log2,
    full=lambda shape, value, dtype, layout: block(np.full(shape, value, float)), zeros_like=np.zeros_like,
    zeros=lambda shape, dtype, layout: block(np.zeros(shape)), convert_layout=lambda x, layout: x,
    allocate_shared_memory=allocate, num_warps=lambda: 4, int32=np.int64, int64=np.int64, float32=float, constexpr=None,
    **dict.fromkeys(LAYOUTS, Layout),
)  # fmt: skip


def functions(program: tuple[int, int] = (0, 0)) -> types.SimpleNamespace:
    """Those of hopper_columns.py and forward_hopper.py, in numpy, as one program of the grid runs them."""
    copies, products = Copies(), Products()
    names: dict[str, Any] = {
        "gl": types.SimpleNamespace(**vars(NUMPY), program_id=lambda axis: block(program[axis])),
        "BEFORE_ALL": hopper_columns.ANYWHERE, "AFTER_ALL": -hopper_columns.ANYWHERE, "LOWEST": -1e30,
        "async_copy": copies, "fence_async_shared": lambda: None, "warpgroup_mma": products.start,
        "warpgroup_mma_wait": products.wait, "range": lambda *ends: range(*(np.asarray(end).item() for end in ends)),
    }  # fmt: skip
    for name, value in {**vars(hopper_columns), **vars(forward_hopper)}.items():
        if hasattr(value, "fn"):
            names[name] = types.FunctionType(value.fn.__code__, names)
    return types.SimpleNamespace(**names)


class KernelInNumpy:
    """Stands in for `forward_hopper_kernel`: launched like it, it fills the same tensors."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, OFFSET: Any, **constants: Any) -> None:
            names = list(inspect.signature(forward_hopper.forward_hopper_kernel.fn).parameters)
            found = {n: pointer_to(x) if isinstance(x, Tensor) else x for n, x in zip(names, args, strict=False)}
            for name in "kv":
                found[name], found[f"carry_{name}"] = in_one_memory(found[name], found[f"carry_{name}"])
            for program in itertools.product(*map(range, grid)):
                functions(program).forward_hopper_kernel(**found, **constants, OFFSET=np.int64)

        return launch


def pointer_to(x: Tensor) -> Pointer:
    storage = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return Pointer(storage.numpy(), x.storage_offset())


def in_one_memory(first: Pointer, second: Pointer) -> tuple[Pointer, Pointer]:
    """Both, which one block of pointers can then point into; NaN lies between them."""
    gap = np.full(1000, torch.nan)
    memory = np.concatenate([first.memory, gap, second.memory])
    return Pointer(memory, first.offset), Pointer(memory, len(first.memory) + len(gap) + second.offset)
