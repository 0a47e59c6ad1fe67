"""A mailbox between workers and driver: what rank 0 sees while it trains, drawn and written where the user sits."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distset.train import Record, Watch

__all__ = ["Mailbox", "MailboxWatch", "Postman", "open_mailbox"]


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds what workers sent until the driver takes it; needs no CPU of its own."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, tuple[Any, ...]]] = []
        self.failure: tuple[str, str] | None = None

    def put(self, letters: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.letters += letters

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        letters, self.letters = self.letters, []
        return letters

    def fail(self, kind: str, message: str) -> None:
        """Remember an error that would only repeat itself: restarted workers look here before they start."""
        self.failure = self.failure or (kind, message)

    def failed(self) -> tuple[str, str] | None:
        """The kind of error and what it said, if any."""
        return self.failure


def open_mailbox() -> Any:
    """A mailbox on the driver's own node: it lives as long as the driver, whatever other nodes are lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class MailboxWatch(Watch):
    """Sends what it is told to a mailbox, steps bundled."""

    INTERVAL = 0.2

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.bundle: list[tuple[str, tuple[Any, ...]]] = []
        self.sent = time.monotonic()

    def started(self, step: int, total: int, history: list[Record]) -> None:
        self._post("started", (step, total, list(history)), at_once=True)

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        self._post("stepped", (step, sets, elements, loss))

    def paced(self, step: int, seconds: float, waited: float) -> None:
        self._post("paced", (step, seconds, waited))

    def recorded(self, record: Record) -> None:
        self._post("recorded", (record,), at_once="val/loss" in record)

    def flush(self) -> None:
        """Send what is left, and wait until it is there."""
        ray.get(self.mailbox.put.remote(self.bundle))
        self.bundle = []

    def _post(self, name: str, args: tuple[Any, ...], at_once: bool = False) -> None:
        self.bundle.append((name, args))
        if at_once or time.monotonic() - self.sent > self.INTERVAL:
            self.mailbox.put.remote(self.bundle)
            self.bundle, self.sent = [], time.monotonic()


class Postman:
    """Carries letters from a mailbox to a `Watch` of the driver, in a thread, while the context is open."""

    INTERVAL = 0.2

    def __init__(self, mailbox: Any, watch: Watch) -> None:
        self.mailbox, self.watch = mailbox, watch
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._carry, daemon=True)
        self.error: Exception | None = None

    def __enter__(self) -> Postman:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        self.thread.join(timeout=10)
        if kind is None and self.error is not None:
            raise self.error

    def _carry(self) -> None:
        try:
            while not self.done.wait(self.INTERVAL):
                self._deliver()
            self._deliver()
        except Exception as error:  # raised in the driver's thread once training is over: the log is not worth the run
            self.error = error

    def _deliver(self) -> None:
        for name, args in ray.get(self.mailbox.take.remote()):
            getattr(self.watch, name)(*args)
