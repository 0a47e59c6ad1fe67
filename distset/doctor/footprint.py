"""What a training run will take of memory and disk, measured on a few elements of the real model and scaled up.

A process holds the weights, their gradients and the best weights so far, the optimiser's state, a chunk of elements and
what autograd keeps of it and needs on the way back. What is kept is ``fixed + each * elements``, both found from two small
chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distset.build import build
from distset.data import Store
from distset.encode import Full
from distset.problems.runs import build_problem
from distset.runs import make_task
from distset.sets import InMemory
from distset.train import Example

__all__ = ["Footprint", "measure", "measure_problem"]

PROBE = 2**16
"""Numbers in the smaller of the two chunks, about."""
BACKWARD = 2
"""Gradients of activations, and copies of elements, take about as much again as what was kept of the way there."""


class Footprint(NamedTuple):
    """Bytes.

    Attributes:
        weights: of the model.
        optimiser: of its state.
        fixed, each: what autograd keeps of a chunk: of any, and more for each element.
        element: an element as the model takes it.
        elements: that are held at once, one chunk (the largest set with ``grad=full``).
    """

    weights: int
    optimiser: int
    fixed: float = 0.0
    each: float = 0.0
    element: int = 0
    elements: int = 0

    @property
    def checkpoints(self) -> int:
        """Files of a run at their largest: last and best, and the draft of one beside them."""
        last, best = 2 * self.weights + self.optimiser, self.weights
        return 2 * last + best

    @property
    def training(self) -> int:
        """Memory of a training process beyond the software itself."""
        kept = 3 * self.weights + self.optimiser
        return int(kept + BACKWARD * (self.fixed + self.elements * (self.each + self.element)))


def measure(config: Mapping[str, Any], store: Store) -> Footprint:
    """The footprint of a configuration of ``jobs.train`` (with ``class_weights`` as numbers)."""
    task = make_task({**config, "grad": {"_target_": "distset.encode.Full"}}, store.element_shape, store.classes)
    numbers = torch.Size(store.element_shape).numel()
    small = max(2, PROBE // numbers)
    kept = [_saved(task, torch.rand(size, *store.element_shape)) for size in (small, 2 * small)]
    each = (kept[1] - kept[0]) / small
    return _of_model(config, task.model)._replace(
        fixed=max(kept[0] - small * each, 0.0), each=each, element=4 * numbers, elements=_at_once(config, store)
    )


def measure_problem(config: Mapping[str, Any]) -> Footprint:
    """The footprint of a task with examples of its own: of its model alone."""
    return _of_model(config, build_problem(config)[0].model)


def _of_model(config: Mapping[str, Any], model: torch.nn.Module) -> Footprint:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Footprint(weights, _optimiser(config, model))


def _at_once(config: Mapping[str, Any], store: Store) -> int:
    largest = max(store.record(set_id).n for set_id in store.ids)
    if isinstance(build(config["grad"], "grad"), Full):
        return largest
    return min(config["data"]["chunk_size"] or largest, largest)


def _saved(task: Any, elements: Tensor) -> int:
    """Bytes that autograd keeps for the loss of one set of one chunk."""
    known = {t.untyped_storage().data_ptr() for t in (*task.model.parameters(), *task.model.buffers(), elements)}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    task.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(Example(InMemory(elements, name="probe", element_ndim=elements.ndim - 1), 0), seed=0)
    return total


def _optimiser(config: Mapping[str, Any], model: torch.nn.Module) -> int:
    """Bytes of the optimiser's state, after a step of a model that nobody will miss."""
    optimiser = build(config["optim"], "optim").create(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimiser.step()
    tensors = (value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
