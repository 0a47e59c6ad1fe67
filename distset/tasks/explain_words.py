r"""Learning to explain: which k words of a document an answer follows from.

A selector gives each word a logit; a reader sees the k words drawn and nothing else:

.. math:: \min\ E_{z \sim p_{\theta(x)}}\ \ell\big(y, r(x, z)\big), \qquad \textstyle\sum_i z_i = k

Two readers: one learned together with the selector, where y is the document's class or rating (as published), and a judge
that is given, a black box in numpy, where y is the class it decides for when it reads the whole document. Documents of
different length share a batch: a position without a word has logit -inf.

References:
    Chen, Song, Wainwright, Jordan 2018, "Learning to Explain", https://arxiv.org/abs/1802.07814.
    Niepert, Minervini, Franceschi 2021, "Implicit MLE", https://arxiv.org/abs/2106.01798 (BeerAdvocate, k = 5, 10, 15).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from distset.expect import Estimator, expect
from distset.report.kept_words import KeptWords, plot_kept_words, write_kept_words
from distset.sets import ChunkedSet, pad_sets
from distset.subsets import KSubset
from distset.train import Example, Parts

__all__ = ["ExplainTask", "Explainer", "Judge", "LinearJudge", "Review", "explain_judge_task", "explain_words_task"]

Judge = Callable[[NDArray[np.int64], NDArray[np.floating]], NDArray[np.floating]]
"""Class probabilities ``(S, B, C)`` from word numbers ``(B, N)`` and what is kept of them ``(S, B, N)``."""


class Review(NamedTuple):
    """What is known of a document: a class number or a rating, and which words people marked, bool ``(N)`` or None."""

    value: float
    marked: Tensor | None = None


class LinearJudge:
    """A linear model of the mean weight of the words it is shown; numpy, for the explainer a black box.

    Args:
        weights: of each word ``(V, C)``.
        bias: ``(C,)``.
    """

    def __init__(self, weights: Tensor, bias: Tensor) -> None:
        self.weights, self.bias = np.asarray(weights), np.asarray(bias)

    def __call__(self, words: NDArray[np.int64], kept: NDArray[np.floating]) -> NDArray[np.floating]:
        total = np.einsum("sbn,bnc->sbc", kept, self.weights[words])
        scores = total / np.maximum(kept.sum(-1, keepdims=True), 1) + self.bias
        scores -= scores.max(-1, keepdims=True)
        odds = np.exp(scores)
        return odds / odds.sum(-1, keepdims=True)


class Explainer(nn.Module):
    """Selector and reader.

    Args:
        words: size of the vocabulary.
        outputs: of the reader: classes, or 1 for a rating; 0 for no reader of its own.
        width: of embeddings and layers.
    """

    def __init__(self, words: int, outputs: int, *, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.near = nn.Conv1d(width, width, 3, padding=1)
        self.local = nn.Conv1d(width, width, 3, padding=1)
        self.whole = nn.Linear(width, width)
        self.score = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.meaning = nn.Embedding(words, width) if outputs else None
        self.answer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)) if outputs else None

    def select(self, words: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(B, N)`` of word numbers ``(B, N)``: of a word between its neighbours, and of the whole document."""
        there = mask.unsqueeze(-1)
        near = F.relu(self.near((self.embed(words) * there).mT)).mT * there  # (B, N, width)
        whole = F.relu(self.whole(near.amax(-2, keepdim=True)))
        local = F.relu(self.local(near.mT)).mT
        scores = self.score(torch.cat([local, whole.expand_as(local)], -1)).squeeze(-1)
        return scores.masked_fill(~mask, -torch.inf)

    def read(self, words: Tensor, kept: Tensor, k: int) -> Tensor:
        """Answers ``(S, B, outputs)`` from ``kept (S, B, N)``: the mean meaning of the kept words, then two layers."""
        assert self.meaning is not None and self.answer is not None, "an explainer with outputs reads"  # noqa: PT018
        return self.answer(torch.einsum("sbn,bnw->sbw", kept, self.meaning(words)) / k)


class ExplainTask:
    """Cross-entropy of a class (or of a judge's decision), or squared error of a rating, from k words.

    Args:
        model: selector and reader.
        vocabulary: its words, for pictures.
        classes: their names; None for a rating.
        k: words kept; all of them in a document that has no more.
        judge: whose answer is explained where the model has no reader; else agreement with it is measured.
        grad, num_samples: as in `distset.expect.expect`.
        at_once: documents padded to one batch.
    """

    def __init__(
        self, model: Explainer, vocabulary: Sequence[str], classes: Sequence[str] | None, k: int = 10, *,
        judge: Judge | None = None, grad: Estimator | None = None, num_samples: int = 8, at_once: int = 16,
    ) -> None:  # fmt: skip
        if k < 1:
            raise ValueError(f"k: got {k}, wanted at least 1 word")
        if model.answer is None and judge is None:
            raise ValueError("judge: got None for a model without a reader, wanted whose answer to explain")
        self.model, self.vocabulary, self.classes, self.k, self.judge = model, vocabulary, classes, k, judge
        self.grad, self.num_samples, self.at_once = grad, num_samples, at_once
        if grad is not None:
            model.learned = grad.learned()

    def loss(self, example: Example, *, seed: int) -> Tensor:
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        device = next(self.model.parameters()).device
        padded, mask = pad_sets([_words(example.set) for example in examples])
        words, mask = padded.squeeze(-1).to(device), mask.to(device)
        subset = self._subset(words, mask)
        values = torch.tensor([float(example.target.value) for example in examples], device=device)
        if self.model.answer is None:
            said = self._judged(words, mask.unsqueeze(0))[0].argmax(-1)

            def surprise(kept: Tensor) -> Tensor:
                odds = self._judged(words, kept)[:, range(len(said)), said]
                return -torch.from_numpy(odds).clamp_min(1e-12).log().to(kept)
        else:

            def surprise(kept: Tensor) -> Tensor:
                return self._error(self.model.read(words, kept, self.k), values)

        return expect(surprise, subset, self.num_samples, grad=self.grad, seed=seed).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """The answer from the k words of highest logit, the judge's of the whole document, then 1 for each word kept.

        ``(C + J + N)``: C answers (class probabilities, or a rating), J the classes of the judge or 0.
        """
        words = _words(set).squeeze(-1).unsqueeze(0).to(next(self.model.parameters()).device)
        mask = torch.ones_like(words, dtype=torch.bool)
        kept = self._subset(words, mask).mode
        whole = [] if self.judge is None else [torch.from_numpy(self._judged(words, mask.unsqueeze(0))[0, 0]).to(kept)]
        if self.model.answer is None:
            answer = torch.from_numpy(self._judged(words, kept.unsqueeze(0))[0, 0]).to(kept)
        else:
            scores = self.model.read(words, kept.unsqueeze(0), self.k)[0, 0]
            answer = torch.sigmoid(scores) if self.classes is None else scores.softmax(-1)
        return torch.cat([answer, *whole, kept[0]])

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Review]) -> dict[str, float]:
        """From the kept words: ``loss``, ``accuracy``, ``agreement`` with the judge's class of the whole document.

        Of a rating, ``loss`` is the mean squared error. ``precision`` is the share of kept words that people marked.
        """
        rows: dict[str, list[float]] = {}
        for output, target in zip(outputs, targets):
            for name, figure in self._figures(output, target).items():
                rows.setdefault(name, []).append(figure)
        return {name: float(np.mean(figures)) for name, figures in rows.items()}

    @torch.no_grad()
    def draw(self, folder: Path, parts: Parts) -> None:
        """``kept_words.html``: test documents with their kept words; ``kept_words.png``: what is kept most often."""
        shown = []
        for place in range(0, len(parts.test), max(1, len(parts.test) // 100)):
            example = parts.test[place]
            answer, _, kept = self._parts(self.predict(example.set).cpu())
            words = [self.vocabulary[i] for i in _words(example.set).squeeze(-1).tolist()]
            shown.append(KeptWords(words, kept.bool().tolist(), self._say(answer), self._truth(example.target)))
        write_kept_words(shown[:: max(1, len(shown) // 20)], folder / "kept_words.html")
        plot_kept_words(shown, folder / "kept_words.png")

    def _subset(self, words: Tensor, mask: Tensor) -> KSubset:
        return KSubset(self.model.select(words, mask), mask.sum(-1).clamp_max(self.k))

    def _judged(self, words: Tensor, kept: Tensor) -> NDArray[np.floating]:
        assert self.judge is not None, "checked at the start"
        return self.judge(words.cpu().numpy(), kept.detach().cpu().numpy().astype(np.float32))

    def _error(self, scores: Tensor, values: Tensor) -> Tensor:
        """Of ``scores (S, B, outputs)`` for ``values (B,)``, ``(S, B)``."""
        if self.classes is None:
            return (torch.sigmoid(scores.squeeze(-1)) - values).square()
        return F.cross_entropy(scores.movedim(-1, 1), values.long().expand(scores.shape[:2]), reduction="none")

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answers = 1 if self.classes is None else len(self.classes)
        judged = 0 if self.judge is None else len(self.classes or ())
        return output[:answers], output[answers : answers + judged], output[answers + judged :]

    def _figures(self, output: Tensor, target: Review) -> dict[str, float]:
        answer, whole, kept = self._parts(output)
        figures: dict[str, float] = {}
        if self.classes is None:
            figures["loss"] = (float(answer[0]) - target.value) ** 2
        else:
            wanted = int(whole.argmax()) if self.model.answer is None else int(target.value)
            figures["loss"] = -float(answer[wanted].clamp_min(1e-12).log())
            figures["accuracy"] = float(answer.argmax() == int(target.value))
        if len(whole):
            figures["agreement"] = float(answer.argmax() == whole.argmax())
        if target.marked is not None:
            figures["precision"] = float((kept.bool() & target.marked).sum()) / max(1, int(kept.sum()))
        return figures

    def _say(self, answer: Tensor) -> str:
        if self.classes is None:
            return f"{float(answer[0]):.2f}"
        return f"{self.classes[int(answer.argmax())]} ({float(answer.max()):.0%})"

    def _truth(self, target: Review) -> str:
        return f"{target.value:.2f}" if self.classes is None else self.classes[int(target.value)]


def explain_words_task(
    words: Sequence[str], classes: Sequence[str] | None, judge: Mapping[str, Tensor] | None, *, k: int = 10,
    width: int = 32, num_samples: int = 8, grad: Estimator | None = None, at_once: int = 16,
) -> ExplainTask:  # fmt: skip
    """Selector and reader learned together, from the documents' classes or ratings."""
    model = Explainer(len(words), 1 if classes is None else len(classes), width=width)
    box = None if judge is None else LinearJudge(**judge)
    return ExplainTask(
        model, words, classes, k, judge=box, grad=grad, num_samples=num_samples, at_once=at_once
    )  # fmt: skip


def explain_judge_task(
    words: Sequence[str], classes: Sequence[str], judge: Mapping[str, Tensor] | None, *, k: int = 10, width: int = 32,
    num_samples: int = 8, grad: Estimator | None = None, at_once: int = 16,
) -> ExplainTask:  # fmt: skip
    """A selector that explains the judge, which is a black box: estimators that need a differentiable f cannot be used.

    Raises:
        ValueError: where the data have no judge.
    """
    if judge is None:
        raise ValueError("judge: the data have none; take examples that come with a judge, such as movie reviews")
    model = Explainer(len(words), 0, width=width)
    return ExplainTask(
        model, words, classes, k, judge=LinearJudge(**judge), grad=grad, num_samples=num_samples, at_once=at_once
    )  # fmt: skip


def _words(document: ChunkedSet) -> Tensor:
    """Word numbers ``(N, 1)``."""
    return document.whole().elements
