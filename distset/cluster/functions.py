"""A black box on Ray actors: `expect` calls it as any other function, and its samples are evaluated in parallel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from distset.cluster.set_call import LOST

__all__ = ["RemoteFunction"]


class RemoteFunction:
    """``f``, evaluated on actors a few samples at a time; values come back in the order of the samples.

    An actor that dies is replaced and its samples are evaluated again, so f has to be a function of z alone. What f raises
    is raised here.

    Args:
        f: ``z (s, *, n) -> (s, *)``, numpy in, numbers out; pickled to the actors once. Of several subsets that f sees
            together (see `expect`) a draw has one value.
        workers: actors, started at the first call.
        piece: samples a call.
        in_flight: calls an actor may have waiting, so that it is never idle and never flooded.
        retries: how often one call may be lost with its actor.
        num_cpus: what an actor asks of the cluster.

    Raises:
        ValueError: for workers, piece or in_flight below 1, or retries below 0.
        RuntimeError: at use, where a call was lost more than ``retries`` times.

    Example (with a Ray cluster):
        ``expect(RemoteFunction(simulator, workers=16), KSubset(logits, k), num_samples=64).backward()``
    """

    def __init__(
        self,
        f: Callable[[np.ndarray], Any],
        workers: int = 2,
        *,
        piece: int = 1,
        in_flight: int = 2,
        retries: int = 2,
        num_cpus: float = 0.1,
    ) -> None:
        for name, value, least in (
            ("workers", workers, 1),
            ("piece", piece, 1),
            ("in_flight", in_flight, 1),
            ("retries", retries, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, wanted at least {least}")
        self.f, self.workers, self.piece, self.in_flight = f, workers, piece, in_flight
        self.retries, self.num_cpus = retries, num_cpus
        self.actors: list[Any] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.start()
        pieces = [part.detach().cpu().numpy() for part in z.split(self.piece)]
        values = self._evaluate(pieces)
        return torch.from_numpy(np.concatenate(values)).to(z.device)

    def start(self) -> None:
        """Start the actors that are not there yet, and wait for them."""
        if not self.actors:
            self.actors = [self._new() for _ in range(self.workers)]
            ray.get([actor.ready.remote() for actor in self.actors])

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _evaluate(self, pieces: list[np.ndarray]) -> list[np.ndarray]:
        values: list[Any] = [None] * len(pieces)
        lost = [0] * len(pieces)
        waiting = deque(range(len(pieces)))
        running: dict[Any, tuple[int, int]] = {}  # what is awaited: (piece, worker)
        load = [0] * self.workers
        while waiting or running:
            while waiting and min(load) < self.in_flight:
                number, worker = waiting.popleft(), load.index(min(load))
                running[self.actors[worker].call.remote(pieces[number])] = (number, worker)
                load[worker] += 1
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, worker = running.pop(done)
            try:
                values[number] = ray.get(done)
                load[worker] -= 1
            except LOST as error:
                ours = [number, *(n for n, w in running.values() if w == worker)]
                running = {ref: place for ref, place in running.items() if place[1] != worker}
                self._replace(worker, ours, lost, error)
                waiting.extendleft(reversed(ours))
                load[worker] = 0
        return values

    def _replace(self, worker: int, numbers: list[int], lost: list[int], error: Exception) -> None:
        for number in numbers:
            lost[number] += 1
            if lost[number] > self.retries:
                raise RuntimeError(
                    f"f: the actor evaluating samples from {number * self.piece} on died {lost[number]} times; see its log, "
                    f"its memory above all, or raise retries="
                ) from error
        self.actors[worker] = self._new()

    def _new(self) -> Any:
        return _Evaluator.options(num_cpus=self.num_cpus).remote(self.f)  # type: ignore[attr-defined]


@ray.remote
class _Evaluator:
    def __init__(self, f: Callable[[np.ndarray], Any]) -> None:
        self.f = f

    def ready(self) -> bool:
        return True

    def call(self, z: np.ndarray) -> np.ndarray:
        values = np.asarray(self.f(z))
        if not 0 < values.ndim < z.ndim or values.shape != z.shape[: values.ndim]:
            raise ValueError(
                f"f: returned shape {values.shape} for subsets of shape {z.shape}, wanted {z.shape[:-1]}, or that "
                f"without its last dimensions where f sees several subsets together"
            )
        return values
