"""Conformance laws, public so that an encoder or state of your own can be proved before it is trusted.

Each ``check_*`` raises `AssertionError` naming the law and the numbers, and returns the errors it measured. Run them in
float64 on a few dozen elements: the laws are exact, so a tolerance covers rounding alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distset.encode import Exact, Full, Gradient, Picks, Sampled, encode_set, encode_state
from distset.encoders import ChunkEncoder, Sweeps
from distset.seeds import generator_for, seed_for
from distset.sets import ChunkedSet, InMemory
from distset.states import merge_tree

__all__ = ["EncoderErrors", "check_encoder", "check_gradient", "check_state", "mean_gradient", "partitions"]

Loss = Callable[[Any], Tensor]


class EncoderErrors(NamedTuple):
    """The largest differences `check_encoder` saw, relative to the largest entry of what they were compared with.

    Attributes:
        value: between partitions of the set.
        exact: of `Exact`'s gradient to plain autograd through the whole set.
        sampled: of the mean of `Sampled`'s gradients over all choices to the same.
    """

    value: float
    exact: float
    sampled: float


def check_encoder(
    encoder: ChunkEncoder | Sweeps,
    elements: Tensor,
    *,
    mask: Tensor | None = None,
    element_ndim: int = 1,
    max_sampled: int = 2,
    tolerance: float = 1e-10,
) -> EncoderErrors:
    """Prove that an encoder is mini-batch consistent and that its gradients are right.

    Checked on a float64 copy, with a loss that looks at every entry of the encoding: (1) any partition into chunks gives
    the value of one chunk; (2) so does any order of the elements; (3) `Exact` equals plain autograd for every parameter;
    (4) the mean of `Sampled(m)` over all choices equals it, for m = 1..max_sampled and every way of choosing.

    Args:
        encoder: with its dropout off (``encoder.eval()``), where one chunk and many are comparable.
        elements: ``(*, N, *element)``, N of about 10 to 40.
        mask, element_ndim: as for `InMemory`.
        max_sampled: the largest m of law 4; its cost grows as chunks**m.
        tolerance: of laws 1 to 3; law 4 gets 100 times as much, for its many additions.

    Raises:
        AssertionError: naming the law that is broken.

    Example:
        >>> import torch
        >>> from distset import UMBC
        >>> from distset.testing import check_encoder
        >>> errors = check_encoder(UMBC(dim=5, slots=3).eval(), torch.randn(12, 5))
        >>> max(errors) < 1e-10
        True
    """
    encoder = deepcopy(encoder).double()
    elements = elements.double() if elements.is_floating_point() else elements
    size = elements.shape[-element_ndim - 1]

    def make(bounds: Sequence[int], order: Tensor | None = None) -> InMemory:
        axis = -element_ndim - 1
        x = elements if order is None else elements.index_select(axis, order)
        m = mask if mask is None or order is None else mask[..., order]
        return InMemory(x, bounds=bounds, mask=m, element_ndim=element_ndim)

    whole = make([0, size])
    with torch.no_grad():
        want = _outputs(encode_set(encoder, whole, seed=1))
        shuffled = torch.randperm(size, generator=generator_for(1, "order"))
        sets = [*(make(b) for b in partitions(size)), make([0, size], shuffled)]
        value = max(_distance(_outputs(encode_set(encoder, s, seed=1)), want) for s in sets)
    _require(value <= tolerance, f"the value depends on the partition or order of the set: relative error {value:.1e}")
    exact = sampled = 0.0
    for bounds in itertools.islice(partitions(size), 3):
        one, many = check_gradient(encoder, make(bounds), whole=whole, max_sampled=max_sampled, tolerance=tolerance)
        exact, sampled = max(exact, one), max(sampled, many)
    return EncoderErrors(value, exact, sampled)


def check_gradient(
    encoder: ChunkEncoder | Sweeps,
    set: ChunkedSet,
    *,
    whole: ChunkedSet | None = None,
    max_sampled: int = 2,
    tolerance: float = 1e-10,
) -> tuple[float, float]:
    """Laws 3 and 4 of `check_encoder` for one chunked set; dropout may be on.

    Args:
        whole: the same set to compare with, in one chunk; by default `Full` on ``set`` itself, which is the reference
            where the chunks' own randomness (dropout) makes one chunk another function.

    Returns:
        The relative errors of `Exact` and of the mean of `Sampled`.
    """
    want = _gradient(encoder, lambda: _encode(encoder, whole or set, [Full()] * _num_stages(encoder)))
    got = _gradient(encoder, lambda: encode_set(encoder, set, grad=Exact(), seed=1))
    exact = _distance(got, want)
    _require(exact <= tolerance, f"Exact() differs from plain autograd: relative error {exact:.1e}")
    sampled = 0.0
    for m in range(1, min(max_sampled, set.num_chunks) + 1):
        for choice in ("uniform", "stratified", "weighted"):
            mean = mean_gradient(encoder, set, Sampled(m, choice))
            error = _distance(mean, want)
            _require(
                error <= 100 * tolerance,
                f"the mean of Sampled({m}, {choice!r}) over all choices differs from plain autograd: {error:.1e}",
            )
            sampled = max(sampled, error)
    return exact, sampled


def mean_gradient(encoder: ChunkEncoder | Sweeps, set: ChunkedSet, grad: Gradient) -> list[Tensor]:
    """The expectation of a strategy's gradient of every parameter, by enumeration of its choices."""
    mean: list[Tensor] | None = None
    for probability, picks in _joint_choices(encoder, set, grad):
        part = _gradient(encoder, lambda picks=picks: _encode(encoder, set, [_Fixed(p, grad) for p in picks]))  # type: ignore[misc]
        scaled = [probability * g for g in part]
        mean = scaled if mean is None else [a + b for a, b in zip(mean, scaled, strict=True)]
    assert mean is not None
    return mean


def check_state(states: Sequence[Any], *, tolerance: float = 1e-10) -> float:
    """Prove that states merge associatively and commutatively and that re-based they merge by addition.

    Args:
        states: three to five float64 states of disjoint chunks of one set.

    Returns:
        The largest relative error of a value over all orders and trees of merging.
    """
    total = merge_tree(states)
    want, worst = _outputs(total.value()), 0.0
    for order in itertools.permutations(states):
        for merged in _all_trees(list(order)):
            worst = max(worst, _distance(_outputs(merged.value()), want))
    _require(worst <= tolerance, f"merging depends on its order: relative error {worst:.1e}")
    parts = zip(*(state.summands(total) for state in states))
    sums = tuple(torch.stack(part).sum(0) for part in parts)
    error = _distance(list(sums), list(total.summands(total)))
    _require(error <= tolerance, f"re-based summands do not add up to the merged state: relative error {error:.1e}")
    return max(worst, error)


def partitions(size: int) -> Iterator[list[int]]:
    """Borders of a few partitions of ``size`` elements, unequal chunks and single elements among them."""
    yield [0, size // 3, size // 3 + 1, size - 1, size] if size > 4 else list(range(size + 1))
    yield sorted({0, size // 2, size})
    yield sorted({0, 1, size // 4 + 1, size // 2 + 1, size})
    yield list(range(size + 1))


class _Fixed:
    """A strategy whose choice is given."""

    def __init__(self, picks: Picks, of: Gradient) -> None:
        self._picks, self.of = picks, of

    def picks(self, log_mass: Tensor | int, generator: torch.Generator) -> Picks:
        return self._picks

    def choices(self, log_mass: Tensor | int) -> Iterator[tuple[float, Picks]]:
        yield 1.0, self._picks


def _stages(encoder: ChunkEncoder | Sweeps) -> list[ChunkEncoder]:
    stages = getattr(encoder, "stages", [encoder])
    return list(cast(Iterable[ChunkEncoder], stages))


def _num_stages(encoder: ChunkEncoder | Sweeps) -> int:
    return len(_stages(encoder))


def _encode(encoder: ChunkEncoder | Sweeps, set: ChunkedSet, grads: Sequence[Any]) -> Any:
    """`encode_set` with a strategy a stage."""
    if not isinstance(encoder, Sweeps):
        return encode_set(encoder, set, grad=grads[0], seed=1)
    found = None
    for number, (stage, grad) in enumerate(zip(_stages(encoder), grads, strict=True)):
        found = encode_set(stage, set, grad=grad, seed=seed_for(1, "stage", number), condition=found)
    return found


def _joint_choices(encoder: ChunkEncoder | Sweeps, set: ChunkedSet, grad: Gradient) -> Iterator[tuple[float, list[Picks]]]:
    """Independent choices of all stages, with the probability of each."""
    choices, found = [], None
    for number, stage in enumerate(_stages(encoder)):
        seed = seed_for(1, "stage", number) if isinstance(encoder, Sweeps) else 1
        with torch.no_grad():
            state, query = encode_state(stage, set, seed=seed, condition=found)
            log_mass = _log_mass(stage, set, seed, found)
            found = stage.readout(state, query)
        choices.append(list(grad.choices(log_mass if getattr(grad, "choice", "") == "weighted" else set.num_chunks)))
    for joint in itertools.product(*choices):
        probability = prod(p for p, _ in joint)
        yield probability, [picks for _, picks in joint]


def _log_mass(stage: ChunkEncoder, set: ChunkedSet, seed: int, condition: Any) -> Tensor:
    masses = []
    for chunk in range(set.num_chunks):
        only = _Only(set, chunk)
        state, _ = encode_state(stage, only, seed=seed, condition=condition)
        masses.append(state.log_mass().reshape(1, -1))
    return torch.cat(masses)


class _Only(ChunkedSet):
    """One chunk of another set."""

    def __init__(self, set: ChunkedSet, chunk: int) -> None:
        self.set, self.chunk, self.batch_shape = set, chunk, set.batch_shape

    @property
    def sizes(self) -> list[int]:
        return [self.set.sizes[self.chunk]]

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        return self.set.map(fn, *args, ids=[self.chunk])


def _gradient(encoder: nn.Module, encode: Callable[[], Any]) -> list[Tensor]:
    """The gradient of every parameter of a loss that looks at every entry of the encoding."""
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    loss = torch.stack([_loss(out) for out in _outputs(encode())]).sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]


def _loss(out: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device)
    return ((out.flatten() + 0.3).sin() * weights).sum()


def _outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _outputs(part)]


def _distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry wanted (gradients: over all parameters)."""
    scale = max(max(float(w.abs().max()) for w in want), 1e-300)
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / scale


def _all_trees(states: list[Any]) -> Iterator[Any]:
    if len(states) == 1:
        yield states[0]
    for cut in range(1, len(states)):
        for left in _all_trees(states[:cut]):
            for right in _all_trees(states[cut:]):
                yield left.merge(right)


def _require(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(law)
