"""A solver on Ray actors: the same call, on every machine of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import ray

from distset.cluster.set_call import LOST
from distset.solvers.base import Solver, TimeLimit
from distset.solvers.pool import Answer, Pooled, answer

__all__ = ["SolverPool"]


class SolverPool(Pooled):
    """`Pooled` on Ray actors, started when they are first needed; the arguments are those of `Pooled`.

    Args:
        solver: a `Solver` or a bare function; pickled to the actors.
        workers, when, limit, retries: as in `Pooled`.
        num_cpus: what an actor asks of the cluster. A fraction by default: actors that take whole cores for their life
            starve whatever else runs there, training workers above all.

    Example (with a Ray cluster):
        ``solve(cost, SolverPool(Tour(), workers=16), grad=Identity())``
    """

    overhead = 4e-3
    startup = 3.0

    def __init__(
        self,
        solver: Solver | Callable[[np.ndarray], np.ndarray],
        workers: int = 2,
        *,
        when: Literal["auto", "always"] = "auto",
        limit: TimeLimit | None = None,
        retries: int = 2,
        num_cpus: float = 0.1,
    ) -> None:
        super().__init__(solver, workers, when=when, limit=limit, retries=retries)
        self.num_cpus = num_cpus
        self._actors: list[Any] = []
        self._running: dict[int, Any] = {}

    def _start(self) -> None:
        if not self._actors:
            self._actors = [self._new() for _ in range(self.workers)]
            ray.get([actor.ready.remote() for actor in self._actors])  # starting up is not to count against a limit

    def _new(self) -> Any:
        return _Worker.options(num_cpus=self.num_cpus).remote(self.solver)  # type: ignore[attr-defined]

    def _submit(self, worker: int, costs: np.ndarray) -> None:
        self._running[worker] = self._actors[worker].answer.remote(costs)

    def _wait(self, busy: list[int], timeout: float | None) -> list[tuple[int, Answer]]:
        ready, _ = ray.wait([self._running[worker] for worker in busy], timeout=timeout)
        return [(worker, self._receive(worker)) for worker in busy if self._running[worker] in ready]

    def _receive(self, worker: int) -> Answer:
        try:
            return ray.get(self._running.pop(worker))
        except LOST:
            return Answer(None, 0.0, lost=True)

    def _restart(self, worker: int) -> None:
        ray.kill(self._actors[worker])
        self._running.pop(worker, None)
        self._actors[worker] = self._new()
        if self.hard is not None:
            ray.get(self._actors[worker].ready.remote())

    def close(self) -> None:
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        self._actors, self._running = [], {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_actors": [], "_running": {}}


@ray.remote
class _Worker:
    def __init__(self, solver: Solver) -> None:
        import torch

        torch.set_num_threads(1)
        self.solver = solver

    def ready(self) -> None:
        """Answered once the process is up."""

    def answer(self, costs: np.ndarray) -> Answer:
        return answer(self.solver, costs)
