r"""`encode_set`: the encoding of a set of any size, with a gradient at the memory of one chunk.

The value always comes from all chunks (only `Subset` looks at fewer): their states are computed without a graph and
merged. What follows the state is plain autograd. When the cotangent arrives *at the state*, chunks are replayed one at
a time, each with the same cotangent, since re-based states merge by addition:

.. math:: \nabla_\theta L = \sum_i w_i \, (\partial s_i / \partial \theta)^\top \, \partial L / \partial s,
          \qquad s = \sum_i s_i.

The strategies differ in the chunks they replay and the weights :math:`w_i`: `Exact` takes all with weight 1, `Sampled` chunk
i with probability p_i and weight 1 / (m p_i), which is unbiased (Willette et al. 2023, eq. 11, there for one chunk).
Nothing beside the chunk sums is scaled: slots that reach the output by another way (the residual) keep their plain
gradient.

References:
    Willette, Lee, Andreis, Kawaguchi, Lee, Hwang: Scalable Set Encoding with Universal Mini-Batch Consistency and
    Unbiased Full Set Gradient Approximation. ICML 2023. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import comb, prod
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distset.encoders import ChunkEncoder, Sweeps
from distset.seeds import generator_for, seed_for, seeded
from distset.sets import Chunk, ChunkedSet
from distset.states import State, merge_tree

__all__ = ["Exact", "Full", "Gradient", "Sampled", "Subset", "Sweep", "encode_set", "encode_state"]

Picks = dict[int, float]
"""Chunk index -> weight of its gradient."""


class Gradient(Protocol):
    """A strategy for the gradient of a set encoding: which chunks are replayed, with which weights."""

    def picks(self, log_mass: Tensor | int, generator: torch.Generator) -> Picks:
        """Draw the chunks. ``log_mass`` is ``(chunks, entries)`` where the strategy asks for it, else their number."""
        ...

    def choices(self, log_mass: Tensor | int) -> Iterator[tuple[float, Picks]]:
        """Every draw with its probability, for proofs by enumeration."""
        ...


class Exact:
    """The full-set gradient at the memory of one chunk: every chunk is replayed. About 1.3 times the time of `Full`."""

    def picks(self, log_mass: Tensor | int, generator: torch.Generator) -> Picks:
        return dict.fromkeys(range(_count(log_mass)), 1.0)

    def choices(self, log_mass: Tensor | int) -> Iterator[tuple[float, Picks]]:
        yield 1.0, dict.fromkeys(range(_count(log_mass)), 1.0)

    def __repr__(self) -> str:
        return "Exact()"


class Full:
    """Plain autograd through all chunks; memory grows with the set. The reference the others are measured against."""

    def __repr__(self) -> str:
        return "Full()"


class Sampled:
    """An unbiased gradient from ``m`` chunks; the value still comes from all.

    Args:
        m: chunks that are replayed.
        choice: ``"uniform"``: m distinct chunks, weight n/m each; ``"stratified"``: the chunks are cut into m runs, one
            chunk from each; ``"weighted"``: m draws with replacement by the chunk's share of the attention (mixed with a
            tenth of uniform, so that weights stay below ``10 n / m``), for peaked attention.

    Raises:
        ValueError: for ``m < 1`` or an unknown choice; at use, for more chunks than the set has.
    """

    def __init__(self, m: int = 1, choice: str = "uniform") -> None:
        if m < 1:
            raise ValueError(f"m: got {m}, wanted at least 1 sampled chunk")
        if choice not in ("uniform", "stratified", "weighted"):
            raise ValueError(f"choice: got {choice!r}, wanted 'uniform', 'stratified' or 'weighted'")
        self.m, self.choice = m, choice

    def picks(self, log_mass: Tensor | int, generator: torch.Generator) -> Picks:
        n = self._check(log_mass)
        if self.choice == "uniform":
            order = torch.randperm(n, generator=generator)[: self.m]
            return {int(i): n / self.m for i in sorted(order.tolist())}
        if self.choice == "stratified":
            draws = torch.rand(self.m, generator=generator).tolist()
            return {a + int(u * (b - a)): float(b - a) for u, (a, b) in zip(draws, self._strata(n))}
        p = self.probabilities(log_mass)
        drawn = torch.multinomial(p, self.m, replacement=True, generator=generator)
        return self._weigh(drawn.tolist(), p.tolist())

    def choices(self, log_mass: Tensor | int) -> Iterator[tuple[float, Picks]]:
        n = self._check(log_mass)
        if self.choice == "uniform":
            for drawn in itertools.combinations(range(n), self.m):
                yield 1 / comb(n, self.m), dict.fromkeys(drawn, n / self.m)
        elif self.choice == "stratified":
            strata = self._strata(n)
            for drawn in itertools.product(*(range(a, b) for a, b in strata)):
                weights = [float(b - a) for a, b in strata]
                yield 1 / prod(weights), dict(zip(drawn, weights))
        else:
            p = self.probabilities(log_mass).tolist()
            for drawn in itertools.product(range(n), repeat=self.m):
                yield prod(p[i] for i in drawn), self._weigh(drawn, p)

    @staticmethod
    def probabilities(log_mass: Tensor | int) -> Tensor:
        """The share of each chunk in the state, averaged over its entries, mixed with a tenth of uniform."""
        assert isinstance(log_mass, Tensor), "weighted choice needs the chunks' masses"
        shares = torch.softmax(log_mass.double(), 0).mean(-1)
        return 0.9 * shares + 0.1 / len(shares)

    def _weigh(self, drawn: Sequence[int], p: list[float]) -> Picks:
        picks: Picks = {}
        for i in sorted(drawn):
            picks[i] = picks.get(i, 0.0) + 1 / (self.m * p[i])
        return picks

    def _strata(self, n: int) -> list[tuple[int, int]]:
        borders = [n * j // self.m for j in range(self.m + 1)]
        return list(itertools.pairwise(borders))

    def _check(self, log_mass: Tensor | int) -> int:
        return _check_fits(self.m, _count(log_mass))

    def __repr__(self) -> str:
        return f"Sampled({self.m}, choice={self.choice!r})"


class Subset:
    """Value *and* gradient from ``m`` uniformly drawn chunks: biased, what slot set encoders were trained with.

    Where gradients are off, the value comes from all chunks. In a padded batch, chunks that hold no element of a set give it
    the mean of nothing, which is NaN: give `Subset` one set at a time, or chunks that all sets reach.

    Raises:
        ValueError: for ``m < 1``; at use, for more chunks than the set has.
    """

    def __init__(self, m: int = 1) -> None:
        if m < 1:
            raise ValueError(f"m: got {m}, wanted a subset of at least 1 chunk")
        self.m = m

    def picks(self, log_mass: Tensor | int, generator: torch.Generator) -> Picks:
        n = _check_fits(self.m, _count(log_mass))
        return dict.fromkeys(sorted(torch.randperm(n, generator=generator)[: self.m].tolist()), 1.0)

    def choices(self, log_mass: Tensor | int) -> Iterator[tuple[float, Picks]]:
        n = _check_fits(self.m, _count(log_mass))
        for drawn in itertools.combinations(range(n), self.m):
            yield 1 / comb(n, self.m), dict.fromkeys(drawn, 1.0)

    def __repr__(self) -> str:
        return f"Subset({self.m})"


def encode_set(
    encoder: ChunkEncoder | Sweeps,
    set: ChunkedSet,
    *,
    grad: Gradient | Full | None = None,
    seed: int | None = None,
    condition: Any = None,
) -> Any:
    """The encoding of a set: ``encoder.readout`` of the merged state of all chunks.

    Args:
        encoder: a `ChunkEncoder` (compiled or not), or a `Sweeps` of several.
        set: a `ChunkedSet`; leading batch dimensions and masks as the set has them.
        grad: `Exact()` (default), `Sampled(m, choice)`, `Subset(m)` or `Full()`. It has no effect where gradients are off.
        seed: names everything random: slots, dropout, the choice of chunks. None draws one from torch's default
            generator while training, and is 0 in evaluation, so that predictions repeat.
        condition: handed to ``encoder.query``; what an earlier sweep found.

    Returns:
        What ``encoder.readout`` gives, by default ``state.value()``: ``(*, D)`` or ``(*, K, D)``.

    Raises:
        ValueError: for something that is no encoder, `ChunkedSet` or strategy, train-mode BatchNorm inside the encoder,
            more sampled chunks than chunks, elements that require a gradient (except under `Full`).

    Example:
        >>> import torch
        >>> from distset import UMBC, Exact, InMemory, encode_set
        >>> encoder = UMBC(dim=16, slots=4)
        >>> patches = InMemory(torch.randn(10_000, 16), chunk_size=1024)
        >>> z = encode_set(encoder, patches, grad=Exact(), seed=0)
        >>> z.shape
        torch.Size([4, 16])
        >>> z.square().sum().backward()  # every chunk is replayed here, one at a time
    """
    if (stages := getattr(encoder, "stages", None)) is not None:  # by attribute: a compiled encoder is wrapped
        found = condition
        for number, stage in enumerate(stages):
            stage_seed = None if seed is None else seed_for(seed, "stage", number)
            found = encode_set(stage, set, grad=grad, seed=stage_seed, condition=found)
        return found
    one = cast(ChunkEncoder, encoder)
    state, query = encode_state(one, set, grad=grad, seed=seed, condition=condition)
    return one.readout(state, query)


def encode_state(
    encoder: ChunkEncoder,
    set: ChunkedSet,
    *,
    grad: Gradient | Full | None = None,
    seed: int | None = None,
    condition: Any = None,
) -> tuple[Any, Any]:
    """The merged state, carrying its gradient, and the query it was made with; arguments as in `encode_set`."""
    grad = Exact() if grad is None else grad
    _check_call(encoder, set, grad)
    _check_batchnorm(encoder)
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if encoder.training else 0
    query = encoder.query(set.batch_shape, generator_for(seed, "query"), condition)
    inputs = _Inputs.of(encoder, query)
    sweep = Sweep(encoder, inputs.detached(), seed, _Precision.current(inputs))
    if not torch.is_grad_enabled():
        return _merged(set, sweep), query
    if isinstance(grad, Full):
        return _full(set, sweep._replace(query=query)), query
    if not inputs.differentiable:
        return _merged(set, sweep, _chunk_without_gradient), query
    picks, total = _forward(set, sweep, grad, generator_for(seed, "choice"))
    sums = _Replay.apply(set, sweep, total, picks, *inputs.differentiable)
    return total.with_sums(sums), query


class _Precision(NamedTuple):
    """Where chunks are computed and under which autocast; kept, since backward runs outside of the user's context."""

    device: torch.device | None
    dtype: torch.dtype | None
    autocast: torch.dtype | None

    @staticmethod
    def current(inputs: _Inputs) -> _Precision:
        first = next((p for p in inputs.parameters if p.is_floating_point()), None)
        device = None if first is None else first.device
        kind = "cpu" if device is None else device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return _Precision(device, None if first is None else first.dtype, autocast)

    def place(self, chunk: Chunk) -> Chunk:
        """Stored half precision is widened to the parameters' (or narrowed to the autocast) precision."""
        dtype = self.dtype
        if self.autocast is not None and chunk.elements.dtype != torch.float64:  # which autocast leaves alone
            dtype = self.autocast if chunk.elements.dtype == torch.float16 else None
        return chunk.to(self.device or chunk.elements.device, dtype)

    def context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # No weight cache: weights cast in a sweep without a graph must not be met again in a replay with one.
        kind = "cpu" if self.device is None else self.device.type
        return torch.autocast(kind, dtype=self.autocast, cache_enabled=False)


class Sweep(NamedTuple):
    """Everything a chunk needs beside its elements; what a sweep sends to where the chunks live.

    The same object serves the sweep forward and the replay backward, and nothing in it changes in between: sets elsewhere
    may send it once.
    """

    encoder: nn.Module
    query: Any
    seed: int
    precision: _Precision


class _Inputs(NamedTuple):
    """The tensors a chunk's state depends on: the encoder's parameters and the query's tensors."""

    parameters: list[nn.Parameter]
    query: Any

    @staticmethod
    def of(encoder: nn.Module, query: Any) -> _Inputs:
        return _Inputs(list(encoder.parameters()), query)

    def detached(self) -> Any:
        """The query as leaves: replays differentiate with respect to it, and never through it."""
        return _map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), self.query)

    @property
    def differentiable(self) -> list[Tensor]:
        tensors = [*self.parameters, *_tensors(self.query)]
        return [t for t in tensors if t.requires_grad]


class _Weighed(NamedTuple):
    """A state with the log-masses of the chunks it came from: what the weighted choice looks at."""

    state: Any
    log_mass: Tensor

    def merge(self, other: _Weighed) -> _Weighed:
        return _Weighed(self.state.merge(other.state), torch.cat([self.log_mass, other.log_mass]))


def _chunk_state(chunk: Chunk, sweep: Sweep) -> Any:
    """The state of one chunk, without a graph."""
    with torch.no_grad():
        return _state(chunk, sweep)


def _chunk_without_gradient(chunk: Chunk, sweep: Sweep) -> Any:
    """The state of one chunk, of an encoder that is frozen or has no parameters."""
    _check_elements(chunk)
    return _chunk_state(chunk, sweep)


def _chunk_weighed(chunk: Chunk, sweep: Sweep) -> _Weighed:
    state = _chunk_state(chunk, sweep)
    return _Weighed(state, state.log_mass().reshape(1, -1))


def _state(chunk: Chunk, sweep: Sweep) -> Any:
    chunk = sweep.precision.place(chunk)
    with sweep.precision.context():
        if not sweep.encoder.training:
            return sweep.encoder(chunk, sweep.query)
        with seeded(seed_for(sweep.seed, "chunk", chunk.id), chunk.elements.device):
            return sweep.encoder(chunk, sweep.query)


def _chunk_vjp(
    chunk: Chunk, sweep: Sweep, total: State, weights: Picks | float, cotangents: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The chunk's share of the gradient: its re-based state's vector-Jacobian product, times its weight."""
    _check_elements(chunk)
    leaves = _Inputs.of(sweep.encoder, sweep.query).differentiable
    weight = weights[chunk.id] if isinstance(weights, dict) else weights
    with torch.enable_grad():
        sums = _state(chunk, sweep).summands(total)
    pairs = [(s, weight * c) for s, c in zip(sums, cotangents) if s.requires_grad]
    if not pairs:
        return (None,) * len(leaves)
    outputs, vectors = zip(*pairs)
    return torch.autograd.grad(outputs, leaves, vectors, allow_unused=True)


class _Replay(torch.autograd.Function):
    """Identity on the merged state's sums; its backward replays the picked chunks.

    Parameters and query tensors are explicit inputs, so that hooks, DDP and ``torch.autograd.grad`` see them.
    """

    @staticmethod
    def forward(ctx: Any, set: ChunkedSet, sweep: Sweep, total: Any, picks: Picks, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.job = (set, sweep, total, picks)
        return tuple(tensor.clone() for tensor in total.summands(total))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where a parameter was changed in place since the forward sweep
        set, sweep, total, picks = ctx.job
        alike = len({*picks.values()}) == 1  # then one number goes to the chunks, however many they are
        weights = next(iter(picks.values())) if alike else picks
        grads = set.sum(_chunk_vjp, sweep, total, weights, cotangents, ids=list(picks))
        return (None, None, None, None, *grads)


def _forward(set: ChunkedSet, sweep: Sweep, grad: Gradient, generator: torch.Generator) -> tuple[Picks, Any]:
    """Sweep the chunks without a graph and draw the ones to replay."""
    if isinstance(grad, Subset):
        picks = grad.picks(set.num_chunks, generator)
        return picks, set.merge(_chunk_state, sweep, ids=list(picks))
    if isinstance(grad, Sampled) and grad.choice == "weighted":
        weighed = set.merge(_chunk_weighed, sweep)
        return grad.picks(weighed.log_mass.cpu(), generator), weighed.state
    picks = grad.picks(set.num_chunks, generator)  # before the sweep: bad counts are said at once
    return picks, _merged(set, sweep)


def _merged(set: ChunkedSet, sweep: Sweep, fn: Callable[[Chunk, Sweep], Any] = _chunk_state) -> Any:
    """The state of the whole set without a graph; small chunks go together where the encoder says that it may be."""
    sizes, block = set.sizes, getattr(sweep.encoder, "block", 0)
    if sweep.precision.device is not None and sweep.precision.device.type == "cuda":
        block *= 32  # a GPU wants larger calls
    factor = 1
    while 2 * factor * max(sizes) <= block and factor < len(sizes):
        factor *= 2  # a power of two fixed by the chunk size alone: who sweeps does not change the value's bits
    return (set if factor == 1 else set.coarser(factor)).merge(fn, sweep)


def _full(set: ChunkedSet, sweep: Sweep) -> Any:
    """Every chunk's state with its graph; the value is that of the merge tree."""
    states = list(set.map(_state, sweep))
    total = merge_tree(_map_tensors(Tensor.detach, state) for state in states)
    parts = [state.summands(total) for state in states]
    sums = tuple(sum(column[1:], start=column[0]) for column in zip(*parts))
    return total.with_sums(tuple(whole + (s - s.detach()) for whole, s in zip(total.summands(total), sums)))


def _check_call(encoder: Any, set: Any, grad: Any) -> None:
    if not hasattr(encoder, "query") or not hasattr(encoder, "readout"):  # by attribute: a compiled encoder is wrapped
        raise ValueError(f"encoder: got {type(encoder).__name__}, wanted a ChunkEncoder, such as UMBC(...), or your own")
    if not isinstance(set, ChunkedSet):
        raise ValueError(f"set: got {type(set).__name__}, wanted a ChunkedSet; wrap a tensor as InMemory(x, chunk_size=...)")
    if isinstance(grad, type) or not (isinstance(grad, Full) or hasattr(grad, "picks")):
        raise ValueError(f"grad: got {grad!r}, wanted a strategy (not its class or name), such as Exact() or Sampled(1)")


def _check_elements(chunk: Chunk) -> None:
    if chunk.elements.requires_grad:
        raise ValueError(
            "set: its elements require a gradient, which only Full() gives; put the network that makes them "
            "inside the encoder (see Features), where Exact() and Sampled() reach it"
        )


def _check_batchnorm(encoder: nn.Module) -> None:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"encoder: {name or 'it'} is a {type(module).__name__} in training mode, whose output depends on which "
                f"elements share a chunk: the same set would get different values. Put it in eval mode, or use "
                f"InstanceNorm, GroupNorm or LayerNorm"
            )


def _check_fits(m: int, chunks: int) -> int:
    if m > chunks:
        raise ValueError(f"m: got {m} chunks to draw from a set of {chunks}; lower m or use smaller chunks (chunk_size=)")
    return chunks


def _count(log_mass: Tensor | int) -> int:
    return log_mass if isinstance(log_mass, int) else len(log_mass)


def _map_tensors(fn: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, tuple):
        mapped = [_map_tensors(fn, part) for part in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for part in tree for t in _tensors(part)] if isinstance(tree, tuple) else []
