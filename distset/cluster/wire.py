"""Tensors on their way between processes: as plain bytes, bit for bit, whatever device they come from and go to.

What is packed may hold anything that pickles. Only the span of a view travels, not the storage under it, with its strides
(the order of a product's additions may follow them); a tensor arrives in memory of its own, on the device that the receiver
names: a job packed beside a GPU runs on an actor without one.
"""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Failure", "Packed", "Pickler", "Traffic", "device_of", "dumps", "loads", "pack", "unpack"]

_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


class Packed(NamedTuple):
    """A pickled tree: its structure, and the bytes of its tensors and arrays."""

    stream: bytes
    buffers: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return len(self.stream) + sum(buffer.nbytes for buffer in self.buffers)


class Traffic(NamedTuple):
    """Bytes that crossed between a process and the others it works with.

    Attributes:
        down: to the actors, what goes to all of them counted once (Ray brings one object to each machine once); in a process
            group, what this rank received.
        up: from the actors; in a process group, what this rank sent.
        calls: pieces of work, or collectives. The headers of Ray and gloo, under a kilobyte each, are not counted.
    """

    down: int = 0
    up: int = 0
    calls: int = 0

    def add(self, down: int = 0, up: int = 0, calls: int = 0) -> Traffic:
        return Traffic(self.down + down, self.up + up, self.calls + calls)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine - theirs for mine, theirs in zip(self, other)))


class Failure(NamedTuple):
    """An error on its way to those who wait for an answer, with where it was raised."""

    error: bytes | None
    text: str
    where: str

    @classmethod
    def of(cls, error: Exception, where: str, pickler: Any = None) -> Failure:
        text = traceback.format_exc()
        try:
            return cls(dumps(error, pickler or Pickler), text, where)
        except Exception:  # an error of a kind that does not travel: its text does
            return cls(None, text, where)

    def throw(self) -> None:
        """Raise the error here; a note says where it comes from."""
        try:
            error = RuntimeError(self.text) if self.error is None else loads(self.error)
        except Exception:  # of a class that is not known here
            error = RuntimeError(self.text)
        error.add_note(f"on {self.where}:\n{self.text}")
        raise error


class Tensors:
    """What a pickler makes of tensors and devices; to be mixed into one."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return _reduced(value)
        if isinstance(value, torch.device):
            return _device, (value.type,)
        if type(value).__name__ == "OptimizedModule":  # a compiled module is compiled again by none of its receivers
            return _same, (value._orig_mod,)
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(value)


class Pickler(Tensors, pickle.Pickler):
    """The standard pickler: classes and functions travel by their names."""


def pack(tree: Any, pickler: Any = Pickler) -> Packed:
    """Pickle ``tree``; tensors and arrays stay outside of the stream, uncopied where they are on the CPU.

    Raises:
        ValueError: for a tensor with a graph, which ends where the process does.
    """
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler(stream, protocol=5, buffer_callback=buffers.append).dump(tree)
    return Packed(stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers])


def unpack(packed: Packed, device: torch.device | None = None) -> Any:
    """What was packed, all tensors on ``device``; on one of the kind they came from if None."""
    return _load(packed.stream, packed.buffers, device)


def dumps(tree: Any, pickler: Any = Pickler) -> bytes:
    """``tree`` as one string of bytes."""
    stream = io.BytesIO()
    pickler(stream, protocol=5).dump(tree)
    return stream.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` got."""
    return _load(data, (), None)


def device_of(tree: Any) -> torch.device:
    """Where the tensors of nested tuples, lists, dicts and modules are: the first accelerator found, else the CPU."""
    if isinstance(tree, Tensor):
        return tree.device
    if isinstance(tree, nn.Module):
        parts: Any = [*tree.parameters(), *tree.buffers()]
    elif isinstance(tree, dict):
        parts = tree.values()
    else:
        parts = tree if isinstance(tree, tuple | list) else ()
    return next((found for part in parts if (found := device_of(part)).type != "cpu"), torch.device("cpu"))


def _load(stream: bytes, buffers: Sequence[Any], device: torch.device | None) -> Any:
    token = _DEVICE.set(device)
    try:
        return pickle.loads(stream, buffers=buffers)
    finally:
        _DEVICE.reset(token)


def _reduced(value: Tensor) -> tuple[Any, ...]:
    if value.grad_fn is not None:
        raise ValueError(
            "fn: a tensor with a graph was to leave its process, and gradients do not follow it; use grad=Exact() or "
            "Sampled(m) instead of Full(), or detach what fn takes and returns"
        )
    plain = value.detach().resolve_conj().resolve_neg()
    span = 1 + sum((n - 1) * s for n, s in zip(plain.shape, plain.stride())) if plain.numel() else 0
    if span > 4 * plain.numel():  # a thin view of something large
        plain = plain.contiguous()
        span = plain.numel()
    raw = plain.as_strided((span,), (1,)).cpu().view(torch.uint8).numpy()
    kept = (plain.dtype, tuple(plain.shape), plain.stride(), plain.device.type)
    buffer = pickle.PickleBuffer(raw)  # type: ignore[arg-type]  # arrays are buffers only from Python 3.12 on, for mypy
    return _tensor, (buffer, *kept, isinstance(value, nn.Parameter), value.requires_grad)


def _tensor(
    raw: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], kind: str, parameter: bool, grad: bool
) -> Tensor:
    # Memory of torch's own, whose alignment decides how products round; and what came may be read-only.
    own = torch.empty(memoryview(raw).nbytes, dtype=torch.uint8)
    own.numpy()[:] = np.frombuffer(raw, np.uint8)
    tensor = own.view(dtype).as_strided(shape, stride).to(_device(kind))
    return nn.Parameter(tensor, grad) if parameter else tensor.requires_grad_(grad)


def _device(kind: str) -> torch.device:
    return _DEVICE.get() or torch.device(kind)


def _same(value: Any) -> Any:
    return value
