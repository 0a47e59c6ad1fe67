"""The bag classifier: a set of any size in, class probabilities out (multiple instance learning).

A `SetModel` is an encoder (with a feature extractor inside it where elements are images) and a head; `BagTask` adds loss,
prediction and metrics; `bag_task` puts one together from plain configuration. Two classes have one logit, more have one
each. A head may return several tensors of logits (DS-MIL's two streams): the loss is the mean of theirs, the first one
predicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.build import build
from distset.checkpoints import check_weights, read_state
from distset.encoders import ChunkEncoder, Features, Sweeps
from distset.seeds import seeded
from distset.sets import ChunkedSet
from distset.tasks.set_models import SetModel
from distset.train import Example

__all__ = ["BagTask", "bag_task", "begin_with"]


class BagTask:
    """Loss, prediction and metrics of a bag classifier.

    Args:
        model: gives one logit for two classes, else one a class, or a tuple of several such.
        classes: the names; a target is an index into them. Of two, the second is the positive one.
        class_weights: weight of each class in the loss; None for 1 each.

    Raises:
        ValueError: for fewer than two classes, weights of another number or not positive.
    """

    def __init__(self, model: SetModel, classes: Sequence[str], class_weights: Sequence[float] | None = None) -> None:
        if len(classes) < 2:
            raise ValueError(f"classes: got {list(classes)}, wanted at least two to tell apart")
        if class_weights is not None and (len(class_weights) != len(classes) or min(class_weights) <= 0):
            raise ValueError(f"class_weights: got {list(class_weights)}, wanted {len(classes)} positive numbers")
        self.model, self.classes = model, list(classes)
        self.class_weights = [1.0] * len(classes) if class_weights is None else list(class_weights)

    @classmethod
    def of(cls, encoder: ChunkEncoder | Sweeps, head: nn.Module, *, classes: Sequence[str], grad: Any = None) -> BagTask:
        """A task from an encoder and a head."""
        return cls(SetModel(encoder, head, grad), classes)

    def loss(self, example: Example, *, seed: int) -> Tensor:
        r"""Weighted cross-entropy :math:`-w_y \log p_y`, the mean over the streams of logits."""
        target = int(example.target)
        losses = [-log_p[target] for log_p in self._log_probabilities(example.set, seed)]
        return self.class_weights[target] * torch.stack(losses).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """Class probabilities ``(C,)``; the same set gives the same ones."""
        return self._log_probabilities(set, seed=0)[0].exp()

    def predict_encoding(self, encoding: Any) -> Tensor:
        """Class probabilities ``(C,)`` from the encoding of a set, wherever it was made."""
        return self._normalised(self.model.head(encoding))[0].exp()

    def answer(self, encoding: Any) -> dict[str, Any]:
        """``{"probabilities": {class: p, ...}}``"""
        return {"probabilities": dict(zip(self.classes, self.predict_encoding(encoding).tolist()))}

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[int]) -> dict[str, float]:
        """The mean of the weighted log-loss, and `distset.report.bag_scores` at threshold 1/2 (AUROC and its kin)."""
        from distset.report import bag_scores  # numpy, pandas and matplotlib: not needed for a model alone

        probabilities = torch.stack(list(outputs)).double()
        index = torch.as_tensor(targets)
        log_p = probabilities[torch.arange(len(index)), index].clamp_min(1e-30).log()
        weights = torch.tensor(self.class_weights, dtype=torch.float64)[index]
        scores = bag_scores(index.numpy(), probabilities.numpy(), resamples=0)
        return {"loss": float(-(weights * log_p).mean()), **{name: score.value for name, score in scores.items()}}

    def _log_probabilities(self, set: ChunkedSet, seed: int) -> list[Tensor]:
        return self._normalised(self.model(set, seed=seed))

    def _normalised(self, logits: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        streams = logits if isinstance(logits, tuple) else (logits,)
        wanted = 1 if len(self.classes) == 2 else len(self.classes)
        for stream in streams:
            if stream.shape != (wanted,):
                raise ValueError(
                    f"model: gave logits of shape {tuple(stream.shape)} for one set, wanted ({wanted},) for the "
                    f"{len(self.classes)} classes {', '.join(self.classes)}"
                )
        # One logit z is two, (0, z): their softmax is the sigmoid of z.
        return [F.log_softmax(F.pad(z.float(), (1, 0)) if wanted == 1 else z.float(), -1) for z in streams]


def bag_task(
    *,
    model: Mapping[str, Any],
    backbone: Mapping[str, Any] | None,
    grad: Any,
    element_shape: Sequence[int],
    classes: Sequence[str],
    class_weights: Sequence[float] | None = None,
    freeze: str | None = None,
    start: str | None = None,
    seed: int = 0,
) -> BagTask:
    """A task from plain configuration (see `distset.build`).

    Args:
        model: builds encoder and head, given ``dim`` and ``outputs``.
        backbone: builds the feature extractor ``(M, *element)`` to ``(M, D)``, given ``shape``; None or empty for none.
        grad: the gradient strategy, or its configuration.
        element_shape: ``(D,)`` of vectors, ``(channels, height, width)`` of images.
        classes, class_weights: as in `BagTask`.
        freeze: "head" for all that follows the features (encoder and head), "backbone" for what makes them.
        start: checkpoint whose weights to begin with; see `begin_with`.
        seed: of the initial weights.

    Raises:
        ValueError: for images without a backbone, an unknown ``freeze`` or one without a backbone; as `begin_with`.
    """
    if freeze not in (None, "head", "backbone") or (freeze and not backbone):
        raise ValueError(f"freeze: got {freeze!r}, wanted head, backbone or null, and a backbone beside it")
    outputs = 1 if len(classes) == 2 else len(classes)
    with seeded(seed, torch.device("cpu")):
        extractor = None if not backbone else build(backbone, "backbone", shape=tuple(element_shape))
        dim = element_shape[0] if extractor is None else _width(extractor, element_shape)
        if extractor is None and len(element_shape) != 1:
            raise ValueError(
                f"backbone: got none, but elements are {tuple(element_shape)}; images need one, such as backbone=cnn"
            )
        encoder, head = build(model, "model", dim=dim, outputs=outputs)
    if freeze == "head":
        encoder.requires_grad_(False)
        head.requires_grad_(False)
    elif freeze == "backbone" and extractor is not None:
        extractor.requires_grad_(False)
    encoder = encoder if extractor is None else _inside(extractor, encoder)
    task = BagTask(SetModel(encoder, head, build(grad, "grad")), classes, class_weights)
    if start is not None:
        begin_with(task.model, start)
    return task


def begin_with(model: SetModel, path: str) -> None:
    """Take the weights of a checkpoint: of the same model, or of one trained on this backbone's features without it.

    Args:
        model: gets the weights; where they have no backbone, its own stays.
        path: a run folder (its best weights are taken), or a ``state.pt``.

    Raises:
        ValueError: for a file that is not there or no checkpoint, weights of another model.
    """
    file = Path(path) / "checkpoints" / "best" / "state.pt" if Path(path).is_dir() else Path(path)
    weights, own = read_state(file)["model"], model.state_dict()
    backbone = {name: tensor for name, tensor in own.items() if ".extractor." in name}
    if backbone and not any(".extractor." in name for name in weights):
        inner = {re.sub(r"^encoder\.(stages\.\d+\.)?", r"encoder.\1encoder.", name): t for name, t in weights.items()}
        weights = {**backbone, **inner}
    check_weights(model, weights, f"start: {file}")
    model.load_state_dict(weights)


def _width(extractor: nn.Module, element_shape: Sequence[int]) -> int:
    """The width of the features, by a look at one."""
    mode = extractor.training
    with torch.no_grad():
        features = extractor.eval()(torch.zeros(1, *element_shape))
    extractor.train(mode)
    if features.dim() != 2:
        raise ValueError(
            f"backbone: gave {tuple(features.shape)} for one element, wanted (1, D); flatten or pool its output"
        )
    return features.shape[1]


def _inside(extractor: nn.Module, encoder: ChunkEncoder | Sweeps) -> ChunkEncoder | Sweeps:
    """The encoder (each of its sweeps) with the extractor inside."""
    if isinstance(encoder, Sweeps):
        return Sweeps(*(Features(extractor, stage) for stage in cast(Iterable[ChunkEncoder], encoder.stages)))
    return Features(extractor, encoder)
