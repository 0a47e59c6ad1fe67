"""What is trained, and on what: the protocol of a task, and its examples.

`distset.train.fit` knows nothing else of either; `distset.train` has the names that every task needs, too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

from torch import Tensor, nn

from distset.sets import ChunkedSet

__all__ = ["BatchTask", "Elements", "Example", "LazyExamples", "PacedTask", "Parts", "StreamedTask", "Task"]


class Example(NamedTuple):
    """A set and what is to be learned about it."""

    set: ChunkedSet
    target: Any


class Elements(NamedTuple):
    """What the elements of a task's sets are.

    Attributes:
        shape: of one element.
        words: they are numbers of a vocabulary of so many, integers from 0; None for measured values.
    """

    shape: tuple[int, ...]
    words: int | None = None


class LazyExamples(Sequence[Example]):
    """Examples that are made when they are asked for; a subclass says how many there are, and makes one."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Number ``index``, from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(len(self))[index]
        return self.example(places) if isinstance(places, int) else [self.example(place) for place in places]


class Parts(NamedTuple):
    """Examples to train on, to choose weights by, to report on; and what the task must know of them.

    Attributes:
        train, val, test: sequences of examples, lazy ones welcome.
        facts: arguments of the task's factory that follow from the data, for example ``{"dim": 2}``.
        baselines: figures of simple rules on the test part, for the table of results.
        rules: how examples came about and what baselines do, in words, where a figure means nothing without them.
    """

    train: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]
    facts: dict[str, Any]
    baselines: dict[str, float] = {}  # noqa: RUF012  (never written to)
    rules: dict[str, str] = {}  # noqa: RUF012


class Task(Protocol):
    """A model with its loss and metrics; all that `fit` knows of either."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """The loss of one set, a scalar; everything random follows from ``seed``."""
        ...

    def predict(self, set: ChunkedSet) -> Tensor:
        """The output for one set, for example class probabilities ``(C,)``."""
        ...

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """Figures over many outputs, the monitored one among them."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task that works on many small sets at once; `fit` then goes through a step's sets in groups of ``at_once``.

    Groups, not sets, are shared over workers: a group has the same draws wherever it is computed.
    """

    @property
    def at_once(self) -> int:
        """Sets in a group: memory grows with it, speed as long as the machine's caches hold it."""
        ...

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """The mean loss of the examples, a scalar; everything random follows from ``seed``."""
        ...


@runtime_checkable
class PacedTask(Task, Protocol):
    """A task that changes while it trains; `fit` tells it before every step how far training is."""

    def progress(self, share: float) -> None:
        """A ``share`` of the planned steps, from 0 to below 1, is done."""
        ...


@runtime_checkable
class StreamedTask(Task, Protocol):
    """A task whose ``model.encoder`` takes a set in one sweep, so that it can be asked while the set still grows."""

    @property
    def elements(self) -> Elements:
        """What a set consists of."""
        ...

    def answer(self, encoding: Any) -> dict[str, Any]:
        """What there is to say of a set by its encoding, wherever that was made: plain lists and numbers by name."""
        ...
