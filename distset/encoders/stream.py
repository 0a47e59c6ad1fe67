"""Encoding as elements arrive: chunks in any order, an answer at any time, states that merge, are saved and restored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distset.files import draft_for, publish
from distset.seeds import generator_for
from distset.sets import Chunk
from distset.states import TopK, merge_nodes

__all__ = ["Node", "Place", "Stream", "climb", "covered", "fingerprint", "like_of", "state_tensors"]

FORMAT = "distset stream 3"
Place = tuple[int, int]
"""``(level, position)`` in the merge tree: chunks ``position * 2**level`` to before ``(position + 1) * 2**level``."""


class Node(NamedTuple):
    """The merged state of all chunks below a place, and how many elements they had."""

    state: Any
    elements: int

    def merge(self, other: Node) -> Node:
        return Node(self.state.merge(other.state), self.elements + other.elements)


def climb(place: Place, node: Node, take: Callable[[Place], Node | None]) -> tuple[Place, Node]:
    """Merge ``node`` with its siblings as far as ``take`` has them; where it ends up, and what it is then."""
    level, position = place
    while (sibling := take((level, position ^ 1))) is not None:
        node = sibling.merge(node) if position % 2 else node.merge(sibling)
        level, position = level + 1, position // 2
    return (level, position), node


def covered(known: Container[Place], place: Place) -> bool:
    """Whether ``place`` or an ancestor of it is known."""
    level, position = place
    return any((up, position >> (up - level)) in known for up in range(level, 64))


class Stream:
    """The running encoding of one set whose elements come chunk by chunk.

    Chunks have numbers; they may come in any order and more than once: a number that was taken before changes nothing.
    States are merged in the tree that the numbers fix, so the value has the same bits in whatever order they came, and
    memory is O(log chunks) states plus one for each gap. It equals `encode_set` of all elements in eval mode (to rounding:
    a sweep may take small chunks together).

    Args:
        encoder: a `ChunkEncoder`; used in eval mode, without gradients.
        element_ndim: dimensions of one element: 1 a vector, 3 an image.
        seed: of the query, as in `encode_set`.

    Raises:
        ValueError: for an encoder of several sweeps, which must see all elements before its second one.

    Example:
        >>> import torch
        >>> from distset import UMBC, InMemory, encode_set
        >>> encoder, x = UMBC(dim=8, slots=4).eval(), torch.randn(100, 8)
        >>> stream = encoder.stream()
        >>> for chunk in x.split(30):
        ...     _ = stream.add(chunk)
        >>> len(stream), torch.allclose(stream.value(), encode_set(encoder, InMemory(x)), atol=1e-6)
        (100, True)
    """

    def __init__(self, encoder: Any, *, element_ndim: int = 1, seed: int = 0) -> None:
        if hasattr(encoder, "stages"):
            raise ValueError(
                "encoder: needs several sweeps over the set, a stream has but one; encode stored elements instead"
            )
        self.encoder, self.element_ndim, self.seed = encoder, element_ndim, seed
        self.nodes: dict[Place, Node] = {}
        self._like: Tensor | None = None  # no elements, of the shape and dtype of all
        self._pattern: Any = None  # a state, for its structure
        with _evaluated(encoder):
            self._query = encoder.query(torch.Size(), generator_for(seed, "query"), None)

    def __len__(self) -> int:
        """Elements so far."""
        return sum(node.elements for node in self.nodes.values())

    def __contains__(self, number: int) -> bool:
        """Whether chunk ``number`` has been taken."""
        return covered(self.nodes, (0, number))

    @property
    def num_chunks(self) -> int:
        return sum(1 << level for level, _ in self.nodes)

    @property
    def next_number(self) -> int:
        """One above the highest number so far."""
        return max(((position + 1) << level for level, position in self.nodes), default=0)

    def add(self, elements: Tensor, number: int | None = None) -> bool:
        """Take a chunk; returns whether it was new.

        Args:
            elements: ``(N, *element)``, N at least 1, finite in the encoder's precision.
            number: of the chunk, from 0; the next one if None.

        Raises:
            ValueError: for elements of another shape than before, or that the encoder cannot take, none, or not finite; a
                negative number. Nothing has changed then.
        """
        number = self.next_number if number is None else number
        if number < 0:
            raise ValueError(f"number: got {number}, wanted a chunk number from 0")
        if number in self:
            return False
        state = self.state_of(elements, number) if self.nodes else self._first(elements, number)
        self._like = like_of(elements) if self._like is None else self._like
        self._insert((0, number), Node(state, len(elements)))
        return True

    def _first(self, elements: Tensor, number: int) -> Any:
        """The state of the first chunk, which may have a shape that the encoder's network cannot take."""
        try:
            return self.state_of(elements, number)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"elements: got shape {tuple(elements.shape)} as {elements.dtype}, on which the encoder fails ({error}); "
                "wanted what it was built for: features of the same width, images of the same channels, known words"
            ) from error

    def state_of(self, elements: Tensor, number: int) -> Any:
        """The state of one chunk, without taking it.

        Raises:
            ValueError: as in `add`, and where the encoder makes NaN or infinities of finite elements.
        """
        self._check_shape(elements)
        chunk = self._cast(Chunk(elements, None, number, 0, self.element_ndim))
        if not bool(chunk.elements.isfinite().all()):
            raise ValueError(f"elements: some are NaN or infinite as {chunk.elements.dtype}; clean or drop them")
        state = self._encode(chunk)
        if not _finite(state):
            raise ValueError("elements: the encoder makes NaN or infinities of them; are they scaled as in its training?")
        return state

    def _cast(self, chunk: Chunk) -> Chunk:
        first = next((p for p in self.encoder.parameters() if p.is_floating_point()), None)
        return chunk if first is None else chunk.to(first.device, first.dtype)

    def _encode(self, chunk: Chunk) -> Any:
        with _evaluated(self.encoder):
            return self.encoder(chunk, self._query)

    def value(self) -> Any:
        """The encoding of all elements so far, without a gradient.

        Raises:
            ValueError: before the first chunk.
        """
        with _evaluated(self.encoder):
            return self.encoder.readout(self.state(), self._query)

    def state(self) -> Any:
        """The merged state of all elements so far."""
        if not self.nodes:
            raise ValueError("stream: nothing has come yet, wanted at least one chunk")
        ordered = sorted(self.nodes, key=lambda place: place[1] << place[0])
        return merge_nodes((*place, self.nodes[place].state) for place in ordered)

    def merge(self, other: Stream) -> None:
        """Take what another stream of the same set gathered, under numbers that this one has not.

        Raises:
            ValueError: for a stream of other weights or settings, another seed, or numbers that both have.
        """
        if (fingerprint(self.encoder), self.seed) != (fingerprint(other.encoder), other.seed):
            raise ValueError(
                "other: its encoder has other weights or settings, or it has another seed; all must be the same to be merged"
            )
        if both := next((p for p in other.nodes if self._overlaps(p)), None):
            raise ValueError(f"other: both have chunk {both[1] << both[0]}; give each place its own chunk numbers")
        for place, node in other.nodes.items():
            self._insert(place, node)
        self._like = other._like if self._like is None else self._like

    def _overlaps(self, place: Place) -> bool:
        return covered(self.nodes, place) or any(covered([place], own) for own in self.nodes)

    def _insert(self, place: Place, node: Node) -> None:
        place, node = climb(place, node, lambda sibling: self.nodes.pop(sibling, None))
        self.nodes[place] = node

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for (level, position), node in self.nodes.items():
            for field, tensor in enumerate(state_tensors(node.state)):
                tensors[f"{level}.{position}.{field}"] = tensor.contiguous().clone()
        if self._like is not None:
            tensors["like"] = self._like
        about = {
            "format": FORMAT,
            "seed": str(self.seed),
            "weights": fingerprint(self.encoder),
            "element_ndim": str(self.element_ndim),
            "counts": json.dumps([[*place, node.elements] for place, node in self.nodes.items()]),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_for(path)
        save_file(tensors, draft, metadata=about)
        publish(draft, path)

    @classmethod
    def load(cls, encoder: Any, path: str | os.PathLike[str]) -> Stream:
        """Go on from a saved state.

        Raises:
            ValueError: for a file that is no stream of this version, or was made by an encoder of other weights or settings.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"path: {path} cannot be read ({error}), wanted a stream that was saved") from error
        if about.get("format") != FORMAT:
            raise ValueError(
                f"path: {path} has the format {about.get('format')!r}, wanted {FORMAT!r}; encode its elements again"
            )
        if about["weights"] != fingerprint(encoder):
            raise ValueError(
                f"path: {path} was made by an encoder of other weights or settings; its states mean nothing to this one, "
                "load them with the encoder that made them"
            )
        stream = cls(encoder, element_ndim=int(about["element_ndim"]), seed=int(about["seed"]))
        if "like" in tensors:
            stream._like = like = tensors.pop("like")
            for level, position, count in json.loads(about["counts"]):
                fields = [f"{level}.{position}.{i}" for i in range(len(tensors))]
                state = stream.rebuild([tensors[name] for name in fields if name in tensors], like)
                stream.nodes[level, position] = Node(state, count)
        return stream

    def rebuild(self, tensors: list[Tensor], like: Tensor) -> Any:
        """A state of this encoder from its tensors, in the order of its fields.

        Args:
            tensors: as `state_tensors` gave them.
            like: the `like_of` elements: some encoders take but words, others images.
        """
        if self._pattern is None:
            zero = like.new_zeros(1, *like.shape[1:])
            self._pattern = self._encode(self._cast(Chunk(zero, None, 0, 0, self.element_ndim)))
        return _filled(self._pattern, iter(tensors))

    def _check_shape(self, elements: Tensor) -> None:
        known = None if self._like is None else tuple(self._like.shape[1:])
        fits = elements.dim() == self.element_ndim + 1 if known is None else tuple(elements.shape[1:]) == known
        if not fits or len(elements) == 0:
            wanted = f"{self.element_ndim} dimensions each" if known is None else f"shape {known} each"
            raise ValueError(f"elements: got shape {tuple(elements.shape)}, wanted at least one element of {wanted}")


def fingerprint(encoder: nn.Module) -> str:
    """A digest of the encoder's kind, settings and weights: states of different ones must not be merged.

    Settings are the public attributes of all its modules that are plain: numbers, words, functions, classes, and tuples or
    lists of them; but not ``training``, ``block`` and ``inplace``, which change no value.

    Example:
        >>> from distset import UMBC
        >>> one, other = (UMBC(8, 4, activation=name) for name in ("slot-sigmoid", "slot-softmax"))
        >>> _ = other.load_state_dict(one.state_dict())
        >>> fingerprint(one) == fingerprint(other)
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in encoder.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {_settings(module)}\n".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def like_of(elements: Tensor) -> Tensor:
    """``(0, *element)``: no elements, of the shape and dtype of these."""
    return elements.new_empty((0, *elements.shape[1:]))


def state_tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a state, field by field."""
    for part in state:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from state_tensors(part)


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    exempt = {"training", "block", "inplace"}
    public = ((name, value) for name, value in vars(module).items() if not name.startswith("_") and name not in exempt)
    return sorted((name, told) for name, value in public if (told := _plain(value)) is not None)


def _plain(value: Any) -> str | None:
    """A plain value in words that are the same in every process; None for any other."""
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return value.__qualname__
    if isinstance(value, tuple | list):
        parts = [_plain(part) for part in value]
        return None if None in parts else str(parts)
    return repr(value) if value is None or isinstance(value, bool | int | float | str | torch.dtype) else None


@contextmanager
def _evaluated(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each part goes back to the mode that it had."""
    modes = [(part, part.training) for part in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _finite(state: Any) -> bool:
    """Whether all figures of a state are; where a `TopK` has a place left, its score is -inf."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, TopK):
        return bool((state.scores < torch.inf).all()) and _finite(state.payload)
    return all(map(_finite, state))


def _filled(like: Any, found: Iterator[Tensor]) -> Any:
    if isinstance(like, Tensor):
        return next(found).to(like.device)
    parts = [_filled(part, found) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
