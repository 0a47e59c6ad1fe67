"""A solver on several processes: the same call, the same bits.

`Pooled` splits a batch into chunks of instances, keeps one chunk on each worker, puts the answers back in order, tries a
lost worker's chunk again and enforces time limits on solvers that know of none. Where the workers live is a subclass's
business: `LocalPool` forks them on this machine, `distset.cluster.SolverPool` makes them Ray actors.

Sending costs time. A pool of w workers is used where it is expected to save a tenth, B t / w + overhead < 0.9 B t, for B
instances of t seconds each: t is measured on a few instances and kept up to date, the overhead starts from a measured
figure (``overhead``) and follows what pooled calls turn out to cost. Elsewhere the batch is solved in process. Workers are
started once what they would have saved so far passes what starting them takes (``startup``).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from math import ceil
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from distset.solvers.base import Solved, Solver, Status, TimeLimit, as_solver

__all__ = ["LocalPool", "Pooled"]

CHUNK_SECONDS = 0.05  # chunks need be no shorter to even out unequal instances
CHUNKS = 4  # a worker, of a call that is not too short for them
CHECK_EVERY = 50  # of the calls that are worth workers, one in so many is solved and timed in process
FORGET = 0.02


class Answer(NamedTuple):
    """What came back for a chunk; ``error`` is the worker's exception, or None; ``lost`` where the worker died."""

    solved: Solved | None
    seconds: float
    error: Exception | None = None
    lost: bool = False


class Pace(NamedTuple):
    """Seconds an instance, measured in batches of ``size``; ``settled`` where larger batches made no difference."""

    seconds: float
    size: int
    settled: bool


class Pooled(Solver):
    """A solver on ``workers`` processes; it declares what the solver declares.

    Args:
        solver: a `Solver` or a bare function, at home in every worker.
        workers: processes; 0 solves in process.
        when: ``"auto"`` as the module says, or ``"always"``.
        limit: seconds an instance, enforced by ending the worker; for solvers that have no limit of their own. Each
            instance is then sent alone, and never solved in process.
        retries: times that a chunk is tried again after its worker was lost.
    """

    overhead: float
    startup: float

    def __init__(
        self,
        solver: Solver | Callable[[np.ndarray], np.ndarray],
        workers: int = 2,
        *,
        when: Literal["auto", "always"] = "auto",
        limit: TimeLimit | None = None,
        retries: int = 2,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers: got {workers}, wanted 0 (in process) or more")
        if when not in ("auto", "always"):
            raise ValueError(f"when: got {when!r}, wanted 'auto' or 'always'")
        if limit is not None and workers == 0:
            raise ValueError("limit: a limit is enforced by ending a worker, and workers=0 has none; wanted workers >= 1")
        self.solver = as_solver(solver)
        self.workers, self.when, self.retries, self.hard = workers, when, retries, limit
        self.limit = limit or self.solver.limit
        self.sense, self.instance_ndim = self.solver.sense, self.solver.instance_ndim
        self.hyperplane = self.solver.hyperplane
        self.nonnegative, self.scale_free = self.solver.nonnegative, self.solver.scale_free
        self.pooled_calls = 0
        self._paces: dict[tuple[int, ...], Pace] = {}
        self._seconds: dict[tuple[int, ...], float] = {}  # an instance, in the workers
        self._overhead, self._missed, self._turn = self.overhead, 0.0, 0

    # What the workers are

    @abstractmethod
    def _start(self) -> None:
        """Start the workers that are not running."""

    @abstractmethod
    def _submit(self, worker: int, costs: np.ndarray) -> None:
        """Send a chunk to an idle worker."""

    @abstractmethod
    def _wait(self, busy: list[int], timeout: float | None) -> list[tuple[int, Answer]]:
        """The workers of ``busy`` that have answered, after ``timeout`` seconds at the latest."""

    @abstractmethod
    def _restart(self, worker: int) -> None:
        """End a worker, whatever it is doing, and start it anew."""

    @abstractmethod
    def close(self) -> None:
        """End all workers; a later call starts new ones."""

    # The solver

    def mask_for(self, instance: tuple[int, ...]) -> np.ndarray | None:
        return self.solver.mask_for(instance)

    def check_shape(self, instance: tuple[int, ...]) -> None:
        self.solver.check_shape(instance)

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        return self.solver.feasible(solutions)

    def clip(self, costs: Tensor) -> Tensor:
        return self.solver.clip(costs)

    def solve(self, costs: np.ndarray) -> np.ndarray:
        return self.solve_status(costs).solutions

    def solve_status(self, costs: np.ndarray) -> Solved:
        if self.workers == 0 or len(costs) == 0:
            return self.solver.solve_status(costs)
        if self.hard is not None:
            return self._pooled(costs, 1)
        if self.when == "always":
            return self._pooled(costs, self._chunk(costs))
        parts = self._probe(costs)
        rest = costs[sum(len(part.status) for part in parts) :]
        if len(rest):
            parts.append(self._pooled(rest, self._chunk(rest)) if self._worth(rest) else self._timed(rest))
        return Solved(*(np.concatenate(arrays) for arrays in zip(*parts))) if len(parts) > 1 else parts[0]

    # The choice

    def _probe(self, costs: np.ndarray) -> list[Solved]:
        """Solve some instances in process until it is known what one takes in a batch of this size.

        The first of a shape warms up. Then 2, 4, 8, ...: a kernel that works on whole batches has a cost a call, which must
        not be taken for that of its instances. Settled once an instance takes the same in a larger batch.
        """
        parts, done, shape = [], 0, costs.shape[1:]
        pace = self._paces.get(shape)
        if pace is None:
            parts, done, pace = [self.solver.solve_status(costs[:1])], 1, Pace(np.inf, 1, False)
        while not pace.settled and len(costs) - done > 4 * pace.size:
            part = costs[done : done + 2 * pace.size]
            start = time.perf_counter()
            parts.append(self.solver.solve_status(part))
            seconds = (time.perf_counter() - start) / len(part)
            done, pace = done + len(part), Pace(seconds, len(part), seconds > 0.7 * pace.seconds)
            self._paces[shape] = pace
        return parts

    def _timed(self, costs: np.ndarray) -> Solved:
        start = time.perf_counter()
        solved = self.solver.solve_status(costs)
        self._learn(costs, (time.perf_counter() - start) / len(costs))
        return solved

    def _learn(self, costs: np.ndarray, seconds: float) -> None:
        pace = self._paces.get(costs.shape[1:], Pace(seconds, len(costs), False))
        self._paces[costs.shape[1:]] = pace._replace(seconds=0.7 * pace.seconds + 0.3 * seconds)

    def _worth(self, costs: np.ndarray) -> bool:
        pace = self._paces.get(costs.shape[1:])
        if pace is None or len(costs) == 1:
            return False
        alone = pace.seconds * len(costs)
        saved = alone - (alone / self.workers + self._overhead)
        if saved < 0.1 * alone:
            # What a call cost while the machine was busy is forgotten slowly.
            self._overhead += FORGET * (self.overhead - self._overhead)
            return False
        self._missed += saved
        # Now and then in process again: what an instance takes is measured there alone, for workers slow each other down.
        self._turn += 1
        return self._missed > self.startup and self._turn % CHECK_EVERY > 0

    def _chunk(self, costs: np.ndarray) -> int:
        """Instances a chunk: few enough to even out unequal instances, as many as make a message worth its while."""
        shape, share = costs.shape[1:], ceil(len(costs) / self.workers)
        pace = self._paces.get(shape)
        seconds = max(self._seconds.get(shape, pace.seconds if pace else 0.0), 1e-9)
        wanted = min(CHUNK_SECONDS, max(10 * self.overhead, share * seconds / CHUNKS))
        return max(1, min(share, round(wanted / seconds)))

    # The schedule

    def _pooled(self, costs: np.ndarray, size: int) -> Solved:
        start = time.perf_counter()
        chunks = [costs[i : i + size] for i in range(0, len(costs), size)]
        self._start()
        try:
            answers = self._schedule(chunks)
        except BaseException:
            self.close()  # what is still running answers nobody
            raise
        self.pooled_calls += 1
        pace = self._paces.get(costs.shape[1:])
        # The first call starts the workers, which says nothing of the next ones.
        if self.pooled_calls > 1 and pace is not None:
            over = time.perf_counter() - start - pace.seconds * len(costs) / self.workers
            self._overhead = 0.7 * self._overhead + 0.3 * max(over, 0.0)
        self._seconds[costs.shape[1:]] = sum(answer.seconds for answer in answers) / len(costs)
        solved = [answer.solved for answer in answers if answer.solved is not None]
        return Solved(*(np.concatenate(arrays) for arrays in zip(*solved)))

    def _schedule(self, chunks: list[np.ndarray]) -> list[Answer]:
        """One chunk on each worker at a time, answers in order."""
        waiting, tries = deque(range(len(chunks))), [0] * len(chunks)
        idle, running = list(range(self.workers)), dict[int, tuple[int, float]]()
        answers: list[Answer | None] = [None] * len(chunks)
        while waiting or running:
            while waiting and idle:
                worker, index = idle.pop(0), waiting.popleft()
                self._submit(worker, chunks[index])
                running[worker] = index, time.monotonic()
            for worker, answer in self._wait(list(running), self._until_deadline(running)):
                index, _ = running.pop(worker)
                idle.append(worker)
                if answer.error is not None:
                    raise answer.error
                if not answer.lost:
                    answers[index] = answer
                    continue
                self._retry(worker, tries, index)
                waiting.appendleft(index)
            for worker, index in self._overdue(running):
                self._restart(worker)
                idle.append(worker)
                running.pop(worker)
                nothing = Solved(np.zeros_like(chunks[index]), np.full(len(chunks[index]), Status.NOTHING, np.int8))
                answers[index] = Answer(nothing, 0.0)
        return [answer for answer in answers if answer is not None]

    def _retry(self, worker: int, tries: list[int], index: int) -> None:
        tries[index] += 1
        if tries[index] > self.retries:
            raise RuntimeError(
                f"{self}: chunk {index} lost its worker {tries[index]} times; the solver ends its process on these costs, "
                "or memory is short"
            )
        self._restart(worker)

    def _until_deadline(self, running: dict[int, tuple[int, float]]) -> float | None:
        if self.hard is None:
            return None
        first = min(started for _, started in running.values())
        return max(first + self.hard.seconds - time.monotonic(), 0.0)

    def _overdue(self, running: dict[int, tuple[int, float]]) -> list[tuple[int, int]]:
        if self.hard is None:
            return []
        latest = time.monotonic() - self.hard.seconds
        return [(worker, index) for worker, (index, started) in running.items() if started <= latest]

    def __enter__(self) -> Pooled:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.solver!r}, workers={self.workers})"


def answer(solver: Solver, costs: np.ndarray) -> Answer:
    """What a worker does with a chunk."""
    start = time.perf_counter()
    try:
        return Answer(solver.solve_status(costs), time.perf_counter() - start)
    except Exception as error:
        return Answer(None, 0.0, _that_travels(error))


def _that_travels(error: Exception) -> Exception:
    """The error with the worker's traceback; another one that says the same, where it would not come through a pipe."""
    error.add_note("in a worker of the pool:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a worker of the pool: {error}\n{traceback.format_exc()}")
    return error


class LocalPool(Pooled):
    """`Pooled` on processes of this machine, forked when they are first needed, as data loaders do.

    A forked worker has the solver as it is, so that functions defined anywhere will do. Use it as a context manager, or
    `close` it; workers end with the program in any case.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import ShortestPath
        >>> from distset.solvers.pool import LocalPool
        >>> costs = np.random.default_rng(0).uniform(size=(64, 12, 12))
        >>> with LocalPool(ShortestPath(), workers=2) as pool:
        ...     paths = pool.solve(costs)
        >>> np.array_equal(paths, ShortestPath().solve(costs))
        True
    """

    overhead = 0.5e-3
    startup = 0.05

    _processes: list[Any]
    _pipes: list[Connection]

    def _start(self) -> None:
        if not vars(self).get("_processes"):
            pairs = [self._new() for _ in range(self.workers)]
            self._processes, self._pipes = [p for p, _ in pairs], [c for _, c in pairs]

    def _new(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self.solver, theirs, ours), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _submit(self, worker: int, costs: np.ndarray) -> None:
        with contextlib.suppress(OSError):  # a dead worker is met as one by _wait
            self._pipes[worker].send(costs)

    def _wait(self, busy: list[int], timeout: float | None) -> list[tuple[int, Answer]]:
        ready = wait([self._pipes[worker] for worker in busy], timeout)
        return [(worker, self._receive(worker)) for worker in busy if self._pipes[worker] in ready]

    def _receive(self, worker: int) -> Answer:
        try:
            return self._pipes[worker].recv()
        except (EOFError, OSError):
            return Answer(None, 0.0, lost=True)

    def _restart(self, worker: int) -> None:
        self._end(worker)
        self._processes[worker], self._pipes[worker] = self._new()

    def _end(self, worker: int) -> None:
        self._processes[worker].kill()
        self._processes[worker].join()
        self._pipes[worker].close()

    def close(self) -> None:
        for worker in range(len(vars(self).get("_processes", []))):
            self._end(worker)
        self._processes, self._pipes = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_processes", "_pipes")}


def _work(solver: Solver, pipe: Connection, theirs: Connection) -> None:
    """A worker's life: chunks in, answers out, until the pipe closes."""
    import torch

    theirs.close()
    torch.set_num_threads(1)  # workers are the parallelism; and a forked OpenMP pool would hang
    while True:
        try:
            costs = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(answer(solver, costs))
