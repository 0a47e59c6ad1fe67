r"""Image completion by conditional neural processes: some pixels in, a Gaussian for every pixel out.

The context is a set of elements (place, value). Its encoding r goes with a pixel's place into a decoder,

.. math:: L = -\frac1T \sum_t \log N(y_t; \mu(r, x_t), \sigma(r, x_t)^2), \qquad \sigma = 0.1 + 0.9\, \mathrm{softplus}.

References:
    Garnelo et al.: Conditional Neural Processes. ICML 2018. https://arxiv.org/abs/1807.01613
    Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency and Unbiased Full Set Gradient
    Approximation. ICML 2023, section 4.2 and appendix F. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.encode import encode_set
from distset.encoders import ChunkEncoder
from distset.seeds import generator_for, seeded
from distset.sets import ChunkedSet, InMemory
from distset.task import Elements
from distset.tasks.set_models import Waves
from distset.train import Example, Parts

__all__ = ["CompletionModel", "CompletionTask", "Images", "completion_task", "context_of", "gaussian_nll", "pixel_places"]

LEAST_DEVIATION = 0.1
Maker = Callable[..., tuple[ChunkEncoder, nn.Module]]


class Images(NamedTuple):
    """What completions are measured against: all pixels ``values (B, T, C)``, and the number of ``context`` pixels given."""

    values: Tensor
    context: int


class CompletionModel(nn.Module):
    """Mean and deviation at every place.

    Args:
        encoder: of context elements ``(*, N, 2 + C)``.
        pool: from the encoding to a code ``(*, width)``.
        channels: C.
        width: of the code and the decoder.
        layers: hidden layers of the decoder.
        frequencies: of a place's sines and cosines, see `Waves`; 0 for none, as published.
        grad: the gradient strategy of `encode_set`; `Exact()` if None.
    """

    def __init__(
        self,
        encoder: ChunkEncoder,
        pool: nn.Module,
        channels: int,
        *,
        width: int,
        layers: int = 3,
        frequencies: int = 0,
        grad: Any = None,
    ) -> None:
        super().__init__()
        self.encoder, self.pool, self.grad = encoder, pool, grad
        waves = Waves(frequencies)
        # A linear layer of (code, place) in two parts: the code's is computed once a set, not once a pixel. The code is a
        # mean over hundreds of pixels, nearly the same for all images at first: normalised, its differences are seen.
        self.from_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.from_place = nn.Sequential(waves, nn.Linear(2 + waves.added, width, bias=False))
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.ReLU(inplace=True), nn.Linear(width, width)]
        self.decoder = nn.Sequential(*hidden, nn.ReLU(inplace=True), nn.Linear(width, 2 * channels))

    def forward(self, context: ChunkedSet, places: Tensor, *, seed: int | None = None) -> Tensor:
        """Means and deviations ``(*, T, 2 C)`` at ``places (T, 2)`` or ``(*, T, 2)``."""
        return self.decode(encode_set(self.encoder, context, grad=self.grad, seed=seed), places)

    def decode(self, encoding: Tensor, places: Tensor) -> Tensor:
        """The same from the encoding of the context."""
        code = self.pool(encoding)
        mean, raw = self.decoder(self.from_code(code).unsqueeze(-2) + self.from_place(places)).chunk(2, -1)
        return torch.cat([mean, LEAST_DEVIATION + (1 - LEAST_DEVIATION) * F.softplus(raw)], -1)


class CompletionTask:
    """Loss, prediction and metrics of image completion.

    Args:
        model: gives means and deviations at places.
        shape: ``(H, W, C)`` of the images.
        context: fewest and most context pixels of a training step, drawn uniformly.
        chunk_size: context pixels a chunk, of which `Sampled` and `Subset` draw; None for all in one.
        targets: pixels of an image that count in a training step, drawn anew each time; None for all.
        at_once: images of a step that are encoded as one batch.

    Raises:
        ValueError: for a ``context`` or ``targets`` that the images do not have.

    Example:
        >>> from distset.tasks.completion_models import umbc_set_transformer
        >>> task = completion_task((4, 4, 1), model=umbc_set_transformer, width=8, context=(2, 8), targets=None)
        >>> pixels = torch.cat([pixel_places(4, 4), torch.rand(16, 1)], -1)
        >>> task.loss(Example(InMemory(pixels), None), seed=0).shape
        torch.Size([])
        >>> mean, deviation = task.predict(InMemory(pixels[:5])).chunk(2, -1)  # of all 16, from five
        >>> mean.shape, bool((deviation >= 0.1).all())
        (torch.Size([16, 1]), True)
    """

    def __init__(
        self,
        model: CompletionModel,
        shape: Sequence[int],
        *,
        context: Sequence[int] = (100, 500),
        chunk_size: int | None = 100,
        targets: int | None = 256,
        at_once: int = 16,
    ) -> None:
        pixels = shape[0] * shape[1]
        if not 1 <= context[0] <= context[1] <= pixels:
            raise ValueError(f"context: got {list(context)}, wanted from and to, of the {pixels} pixels of an image")
        if targets is not None and not 1 <= targets <= pixels:
            raise ValueError(f"targets: got {targets}, wanted 1 to {pixels} pixels, or None for all")
        self.model, self.shape, self.context, self.chunk_size = model, tuple(shape), context, chunk_size
        self.targets, self.at_once = targets, at_once
        self.elements = Elements((2 + self.shape[2],))

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """The mean negative log-likelihood of an image's pixels, given some of them."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """The same over images; all of a batch get as many context pixels, each image its own."""
        elements = torch.stack([example.set.whole().elements for example in examples])
        elements = elements.to(next(self.model.parameters()))
        random = generator_for(seed, "pixels")
        size = int(torch.randint(self.context[0], self.context[1] + 1, (), generator=random))
        order = torch.rand(elements.shape[:2], generator=random).argsort(-1).to(elements.device)
        context = InMemory(_gather(elements, order[:, :size]), self.chunk_size, name=examples[0].set.name)
        if self.targets is not None:  # any pixels, those of the context among them
            order = torch.rand(elements.shape[:2], generator=random).argsort(-1)[:, : self.targets].to(elements.device)
            elements = _gather(elements, order)
        places, values = elements.split([2, elements.shape[-1] - 2], -1)
        return gaussian_nll(self.model(context, places, seed=seed), values).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """Means and deviations of every pixel, ``(*, H W, 2 C)``, from the context ``set``."""
        places = pixel_places(*self.shape[:2]).to(next(self.model.parameters()))
        return self.model(set, places, seed=0)

    def answer(self, encoding: Any) -> dict[str, Any]:
        """The completed image: ``means`` and ``deviations``, ``(H, W, C)`` each. Elements are `pixel_places` and values."""
        places = pixel_places(*self.shape[:2]).to(next(self.model.parameters()))
        parts = self.model.decode(encoding, places).chunk(2, -1)
        return {name: part.view(self.shape).tolist() for name, part in zip(("means", "deviations"), parts)}

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Images]) -> dict[str, float]:
        """``loss``, the mean negative log-likelihood of a pixel, over all and by context size (``context/100`` and so on),
        and ``rmse`` of the mean."""
        losses: dict[int, list[Tensor]] = {}
        squares = []
        for output, images in zip(outputs, targets):
            losses.setdefault(images.context, []).append(gaussian_nll(output, images.values).flatten())
            squares.append((output.chunk(2, -1)[0] - images.values).square().flatten())
        by_size = {size: float(torch.cat(found).double().mean()) for size, found in sorted(losses.items())}
        figures = {"loss": sum(by_size.values()) / len(by_size), "rmse": math.sqrt(torch.cat(squares).double().mean())}
        return {**figures, **{f"context/{size}": loss for size, loss in by_size.items()}}

    def draw(self, folder: Path, parts: Parts) -> None:
        """Test images completed from the smallest and the largest context."""
        from distset.tasks.completion_pictures import draw_completions  # matplotlib: not needed to train

        self.model.eval()
        draw_completions(self, parts.test, folder / "completions.png")


def gaussian_nll(output: Tensor, values: Tensor) -> Tensor:
    """``-log N(values; mean, deviation)`` of every pixel ``(*, T)``, summed over its channels.

    Args:
        output: means and deviations ``(*, T, 2 C)``.
        values: ``(*, T, C)``.

    Example:
        >>> gaussian_nll(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]))  # 2² / 2 + log(2 pi) / 2
        tensor([2.9189])
    """
    mean, deviation = output.chunk(2, -1)
    z = (values - mean) / deviation
    return (0.5 * z.square() + deviation.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def pixel_places(height: int, width: int) -> Tensor:
    """Row and column of every pixel ``(H W, 2)``, from -1 to 1.

    Example:
        >>> pixel_places(2, 2).tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.cartesian_prod(rows, columns)


def context_of(elements: Tensor, size: int, random: torch.Generator) -> Tensor:
    """``size`` random pixels of each image, ``(B, size, 2 + C)``.

    Example:
        >>> context_of(torch.zeros(3, 16, 4), 5, torch.Generator()).shape
        torch.Size([3, 5, 4])
    """
    return _gather(elements, torch.rand(elements.shape[:2], generator=random).argsort(-1)[:, :size])


def completion_task(
    shape: Sequence[int],
    *,
    model: Maker,
    grad: Any = None,
    width: int = 64,
    layers: int = 3,
    frequencies: int = 0,
    context: Sequence[int] = (100, 500),
    chunk_size: int | None = 100,
    targets: int | None = 256,
    at_once: int = 16,
    seed: int = 0,
) -> CompletionTask:
    """A task from plain configuration: ``model(dim=..., width=..., frequencies=...)`` gives an encoder and what pools its
    encoding to a code; the rest as in `CompletionModel` and `CompletionTask`."""
    with seeded(seed, torch.device("cpu")):
        encoder, pool = model(dim=2 + shape[2], width=width, frequencies=frequencies)
        network = CompletionModel(encoder, pool, shape[2], width=width, layers=layers, frequencies=frequencies, grad=grad)
    return CompletionTask(network, shape, context=context, chunk_size=chunk_size, targets=targets, at_once=at_once)


def _gather(elements: Tensor, places: Tensor) -> Tensor:
    return elements.gather(1, places.unsqueeze(-1).expand(*places.shape, elements.shape[-1]))
