"""Long documents as sets of words: every word counts, none is cut off.

References:
    Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency and Unbiased Full Set Gradient
    Approximation. ICML 2023, section 4.3 and appendix G. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.encoders import ChunkEncoder
from distset.seeds import seeded
from distset.sets import ChunkedSet
from distset.task import Elements
from distset.tasks.set_models import SetModel
from distset.train import Example

__all__ = ["DocumentTask", "document_task"]

Maker = Callable[..., tuple[ChunkEncoder, nn.Module]]


class DocumentTask:
    """Loss, prediction and metrics of document classification; a target is float ``(C)``, 1 where a document has the class.

    Args:
        model: gives logits ``(C)``.
        words: in the vocabulary.
        classes: names of the C classes.
        multi_label: any number of classes a document, each by a sigmoid; else one, by softmax.

    Example:
        >>> from functools import partial
        >>> from distset import InMemory
        >>> from distset.tasks.document_models import umbc_set_transformer
        >>> model = partial(umbc_set_transformer, width=8)
        >>> task = document_task(words=20, classes=["bad", "good"], multi_label=False, model=model)
        >>> document = InMemory(torch.tensor([[3], [0], [19], [3]]), chunk_size=2)  # numbers of a vocabulary
        >>> task.loss(Example(document, [0.0, 1.0]), seed=0).shape, task.predict(document).shape
        (torch.Size([]), torch.Size([2]))
        >>> figures = task.metrics([torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 0.0])], [[0, 1], [0, 1]])
        >>> figures["micro_f1"], round(figures["loss"], 3)
        (0.5, 1.127)
    """

    def __init__(self, model: SetModel, *, words: int, classes: Sequence[str], multi_label: bool) -> None:
        self.model, self.classes, self.multi_label = model, list(classes), multi_label
        self.elements = Elements((1,), words)

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """Cross-entropy: the mean over the classes where a document may have several."""
        return self._loss(self.model(example.set, seed=seed), torch.as_tensor(example.target))

    def predict(self, set: ChunkedSet) -> Tensor:
        """Logits ``(C)``."""
        return self.model(set, seed=0)

    def answer(self, encoding: Any) -> dict[str, Any]:
        """``{"probabilities": {class: p, ...}}``; they do not add up to 1 where a document may have several classes."""
        logits = self.model.head(encoding)
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        return {"probabilities": dict(zip(self.classes, probabilities.tolist()))}

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """``loss``, ``micro_f1`` (the accuracy where a document has one class) and ``macro_f1``."""
        from sklearn.metrics import f1_score  # not needed for a model alone

        logits, truth = torch.stack(list(outputs)), torch.stack([torch.as_tensor(target) for target in targets])
        likeliest = F.one_hot(logits.argmax(-1), logits.shape[-1])
        found = (logits > 0).int() if self.multi_label else likeliest
        scores = {
            f"{kind}_f1": float(f1_score(truth.int().numpy(), found.numpy(), average=kind, zero_division=0))
            for kind in ("micro", "macro")
        }
        return {"loss": float(self._loss(logits, truth)), **scores}

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        target = target.to(logits)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, target)
        return F.cross_entropy(logits, target)  # probabilities as target, of which one is 1


def document_task(
    words: int,
    classes: Sequence[str],
    multi_label: bool,
    *,
    model: Maker,
    vectors: Tensor | None = None,
    grad: Any = None,
    seed: int = 0,
) -> DocumentTask:
    """A task from plain configuration.

    Args:
        words, classes, multi_label: of the documents; they follow from the data.
        model: ``model(words=..., outputs=...)`` gives an encoder and a head; where there are ``vectors``, it is given those.
        vectors: of the words, ``(words, any width)``, which the model holds instead of learning its own.
        grad: the gradient strategy.
        seed: of the initial weights.
    """
    held = {} if vectors is None else {"vectors": vectors}
    with seeded(seed, torch.device("cpu")):
        encoder, head = model(words=words, outputs=len(classes), **held)
    return DocumentTask(SetModel(encoder, head, grad), words=words, classes=classes, multi_label=multi_label)
