"""Learning what to choose: DiffMF, EquiVSet and iDiffMF as one task over pairs (offer V, chosen subset S*).

`OracleTask` puts a utility and a way of solving its mean field together; `diffmf_task`, `equivset_task` and `idiffmf_task`
are the published choices. An example is an offer, or a batch of offers of one shape (see
`distset.problems.offers.examples`), as a `ChunkedSet`; offers of several chunks are solved chunk by chunk
(see `distset.large_offers`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distset.choose import by_greedy, by_size, by_threshold, overlap
from distset.fixed_point import FixedPointWarning, Implicit, Iteration, OneStep, Solution, Stop, Unrolled
from distset.gains import Drawn, GainsEstimator, Smoothed, real_dtype
from distset.large_offers import offer_logits, offer_loss, solve_offer
from distset.mean_field import L2, Constant, Scale, check_contraction, field_step, mean_field, oracle_loss
from distset.offers import check_offer, check_positions
from distset.seeds import generator_for, seed_for
from distset.set_functions import (
    ElementEncoder,
    Independent,
    SetFunction,
    SumUtility,
    elbo,
    published_recognition,
    published_utility,
)
from distset.sets import Chunk, ChunkedSet, InMemory
from distset.train import Example, Parts

__all__ = ["OracleModel", "OracleTask", "Solve", "diffmf_task", "equivset_task", "idiffmf_task"]

RULES = {
    "": "top psi, size known",
    "predicted_size/": "top psi, size predicted",
    "threshold/": "psi >= 0.5",
    "greedy/": "greedy ascent of F, size known, of the first test offers",
}
GREEDY = 100
"""Offers whose F is climbed: an ascent costs about |S*| mean-field steps."""

FIXED_POINT = {
    "fixed_point/lipschitz": "largest stretch of psi -> sigma(gains) found in the first test offers; below 1 it contracts",
    "fixed_point/converged": "share of these offers whose iteration converged",
    "fixed_point/iterations": "steps it took, on average",
}
STRETCHED = 16
"""Offers whose Lipschitz constant is estimated, some 250 mean-field steps each."""


class Solve(NamedTuple):
    """How the mean field is found; see `distset.mean_field.mean_field`."""

    gains: GainsEstimator | None = None
    scale: Scale | None = None
    grad: Implicit | OneStep | Unrolled | None = None
    iteration: Iteration | None = None
    stop: Stop | None = None


class OracleModel(nn.Module):
    """The networks: a utility, and a recognition network where the method has one."""

    def __init__(self, utility: SetFunction, recognition: Independent | None = None) -> None:
        super().__init__()
        self.utility, self.recognition = utility, recognition


class OracleTask:
    """Loss, prediction and metrics of an optimal-subset oracle.

    Args:
        model: a utility, and a recognition network or None.
        solve: how its mean field is found.
        negatives: elements beside S* that count in the loss, as a multiple of |S*|, drawn anew each step: 1 in the
            published code; None for all, the cross-entropy of the paper.
        samples: subsets in the recognition network's evidence lower bound.
    """

    at_once = 8  # offers of a step that are solved together
    rules: ClassVar = {
        prefix + key: rule for prefix, rule in RULES.items() for key in ("jaccard", "precision", "recall", "f1")
    } | FIXED_POINT

    def __init__(self, model: OracleModel, solve: Solve, *, negatives: int | None = None, samples: int = 5) -> None:
        if negatives is not None and negatives < 1:
            raise ValueError(f"negatives: got {negatives}, wanted at least 1 for each chosen element, or None for all")
        self.model, self.solve, self.negatives, self.samples = model, solve, negatives, samples

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """`oracle_loss` of the mean field, plus the negative bound of the recognition network where there is one.

        The bound trains the recognition network alone, and the cross-entropy the utility alone, as published.
        """
        if example.set.num_chunks > 1:
            return self._large_loss(example, seed)
        elements, mask = self._elements(example.set)
        chosen = self._chosen(example, elements)
        check_offer(elements, chosen, mask, element_ndim=getattr(self.model.utility, "element_ndim", 1))
        loss = self._cross_entropy(elements, mask, chosen, seed)
        if self.model.recognition is None:
            return loss
        return loss - self._bound(elements, mask, seed).mean()

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """The mean loss of many offers: those of one shape are solved as one batch, others one after the other."""
        shapes = {(example.set.num_chunks, len(example.set), len(example.set.batch_shape)) for example in examples}
        if len(shapes) == 1 and shapes.pop()[::2] == (1, 1):
            return self.loss(_joined(examples), seed=seed)
        losses = [self.loss(example, seed=seed_for(seed, place)) for place, example in enumerate(examples)]
        return torch.stack(losses).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """The logits of psi, ``(*, N)``; padding has -inf. The same offer gives the same ones."""
        if set.num_chunks > 1:
            return offer_logits(self._utility(), set, self._large_field(set, seed=0))
        elements, mask = self._elements(set)
        logits = self._logits(elements, mask, seed=0)
        return logits if mask is None else logits.masked_fill(~mask, -torch.inf)

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """The cross-entropy of an offer, and Jaccard index, precision, recall and F1 by three rules.

        ``jaccard`` (as published) is that of the top psi at the *known* size of S*; ``predicted_size/*`` takes the
        expected size, ``threshold/*`` all with psi of at least 0.5.
        """
        rows: dict[str, list[Tensor]] = {}
        for logits, target in zip(outputs, targets):
            mask = logits != -torch.inf  # a NaN is no padding
            chosen = _membership(target, logits)
            finite = logits.masked_fill(~mask, -100.0)
            rules = {
                "": by_size(finite, chosen.sum(-1), mask),
                "predicted_size/": by_size(finite, None, mask),
                "threshold/": by_threshold(finite, mask=mask),
            }
            for name, choice in rules.items():
                for key, values in overlap(choice.chosen, chosen).items():
                    rows.setdefault(name + key, []).append(values.reshape(-1))
            many = max(1, chosen[..., 0].numel())
            rows.setdefault("loss", []).append(oracle_loss(finite, chosen, mask).reshape(1).expand(many))
        return {name: float(torch.cat(values).double().mean()) for name, values in rows.items()}

    def measure(self, examples: Sequence[Example]) -> dict[str, float]:
        """What psi cannot say, of the first offers that lie in one chunk.

        ``greedy/*``: how well F itself is climbed. ``fixed_point/*``, where the gradient is implicit: whether the map
        contracts (Assumption 4.1; warned of where it does not), and whether and how soon the iteration converged. What a
        utility or its gains do not allow to measure is left out with a warning: the model is trained, and is not lost.
        """
        whole = [example for example in examples if example.set.num_chunks == 1]
        wanted = {"greedy": self._climbed, "fixed_point/lipschitz": self._stretched, "fixed_point": self._settled}
        found: dict[str, float] = {}
        for name, figures in wanted.items():
            try:
                found |= figures(whole)
            except ValueError as error:
                warnings.warn(f"measure: {name} is left out: {error}", stacklevel=2)
        return found

    def draw(self, folder: Path, parts: Parts) -> None:
        """The residual by iteration over the first test offers; chosen and found, where elements are points or images.

        Nothing without a test offer that lies in one chunk.
        """
        from distset.report.choices import plot_chosen_images, plot_chosen_points, plot_residuals

        example = next((example for example in parts.test if example.set.num_chunks == 1), None)
        if example is None:
            return
        elements, mask = self._elements(example.set)
        truth = self._chosen(example, elements)
        if not example.set.batch_shape:
            elements, truth = elements.unsqueeze(0), truth.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FixedPointWarning)  # a map that does not settle is what the plot may show
            long = self.solve._replace(grad=OneStep(), stop=Stop(max_steps=50, atol=1e-7, rtol=1e-7))
            plot_residuals(self._field(elements, mask, 0, long).trace, folder / "residual.png")
            logits = self._field(elements, mask, 0, self.solve).value
        if mask is not None or elements.dim() != 3:
            return
        found = by_size(logits, truth.sum(-1)).chosen
        side = isqrt(elements.shape[-1] // 3) if elements.shape[-1] % 3 == 0 else isqrt(elements.shape[-1])
        channels = elements.shape[-1] // side**2
        if elements.shape[-1] == 2:
            plot_chosen_points(elements[:4], truth[:4], found[:4], folder / "chosen.png")
        elif elements.min() >= 0 and elements.max() <= 1 and channels * side**2 == elements.shape[-1] >= 64:
            images = elements[:6].unflatten(-1, (channels, side, side))
            plot_chosen_images(images, truth[:6], found[:6], folder / "chosen.png")

    def _climbed(self, examples: Sequence[Example]) -> dict[str, float]:
        rows: dict[str, list[Tensor]] = {}
        for example in examples:
            elements, mask = self._elements(example.set)
            chosen = self._chosen(example, elements)
            found = by_greedy(self.model.utility, elements, chosen.sum(-1), mask).chosen
            for key, values in overlap(found, chosen).items():
                rows.setdefault("greedy/" + key, []).append(values.reshape(-1))
            if sum(map(len, rows["greedy/jaccard"])) >= GREEDY:
                break
        return {name: float(torch.cat(values).double().mean()) for name, values in rows.items()}

    def _stretched(self, examples: Sequence[Example]) -> dict[str, float]:
        how, found = self.solve, []
        for elements, mask in self._few(examples):
            constant = check_contraction(
                self.model.utility, elements, gains=how.gains, scale=how.scale, mask=mask,
                generator=generator_for(0, "draws"),
            )  # fmt: skip
            found.append(float(constant.max()))
        return {"fixed_point/lipschitz": max(found)} if found else {}

    @torch.no_grad()
    def _settled(self, examples: Sequence[Example]) -> dict[str, float]:
        rows = []
        for elements, mask in self._few(examples):
            solution = self._field(elements, mask, 0, self.solve)
            rows.append(torch.stack([solution.converged, solution.iterations]).reshape(2, -1))
        if not rows:
            return {}
        converged, iterations = torch.cat(rows, 1).double().mean(1).tolist()
        return {"fixed_point/converged": converged, "fixed_point/iterations": iterations}

    def _few(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The first `STRETCHED` offers where the gradient is implicit, a few more where they lie in batches; else none."""
        left = STRETCHED if isinstance(self.solve.grad, Implicit) else 0
        for example in examples:
            if left <= 0:
                return
            elements, mask = self._elements(example.set)
            if example.set.batch_shape:
                elements, mask = elements[:STRETCHED], None if mask is None else mask[:STRETCHED]
            left -= len(elements) if example.set.batch_shape else 1
            yield elements, mask

    def _cross_entropy(self, elements: Tensor, mask: Tensor | None, chosen: Tensor, seed: int) -> Tensor:
        """`oracle_loss` of the elements that count; where a few steps are unrolled, the last one is taken at those alone."""
        counted, how = self._counted(chosen, mask, seed), self.solve
        elementwise = how.iteration is None and isinstance(how.scale, Constant | None)
        if counted is None or self.negatives is None or not (elementwise and isinstance(how.grad, Unrolled)):
            return oracle_loss(self._logits(elements, mask, seed), chosen, counted)
        before = self._start(elements, mask)
        if how.grad.steps > 1:
            before = self._field(elements, mask, seed, how._replace(grad=Unrolled(how.grad.steps - 1))).value
        elif before is None:
            before = torch.zeros(chosen.shape, dtype=real_dtype(self.model.utility, elements), device=elements.device)
        places = torch.argsort(counted.int(), dim=-1, descending=True, stable=True)[..., : int(counted.sum(-1).max())]
        last = field_step(
            self.model.utility, elements, gains=how.gains, scale=how.scale, mask=mask,
            generator=generator_for(seed, "draws"), places=places,
        )  # fmt: skip
        return oracle_loss(last(before), chosen.gather(-1, places), counted.gather(-1, places))

    def _logits(self, elements: Tensor, mask: Tensor | None, seed: int) -> Tensor:
        return self._field(elements, mask, seed, self.solve).value

    def _field(self, elements: Tensor, mask: Tensor | None, seed: int, how: Solve) -> Solution:
        return mean_field(
            self.model.utility, elements, gains=how.gains, scale=how.scale, grad=how.grad, iteration=how.iteration,
            stop=how.stop, start=self._start(elements, mask), mask=mask, generator=generator_for(seed, "draws"),
        )  # fmt: skip

    @torch.no_grad()
    def _start(self, elements: Tensor, mask: Tensor | None) -> Tensor | None:
        recognition = self.model.recognition
        return None if recognition is None else recognition(elements).masked(mask).logits

    def _bound(self, elements: Tensor, mask: Tensor | None, seed: int) -> Tensor:
        assert self.model.recognition is not None
        guess = self.model.recognition(elements)
        frozen = _Frozen(self.model.utility)
        return elbo(frozen, guess, elements, samples=self.samples, generator=generator_for(seed, "bound"), mask=mask)

    def _counted(self, chosen: Tensor, mask: Tensor | None, seed: int) -> Tensor | None:
        if self.negatives is None:
            return mask
        rest = ~chosen if mask is None else ~chosen & mask
        keys = torch.rand(chosen.shape, generator=generator_for(seed, "negatives")).to(chosen.device)
        rank = keys.masked_fill(~rest, 2.0).argsort(-1).argsort(-1)
        return chosen | (rest & (rank < self.negatives * chosen.sum(-1, keepdim=True)))

    def _large_loss(self, example: Example, seed: int) -> Tensor:
        offer, places = example.set, None
        chosen = _membership(example.target, torch.empty(len(offer)))
        if self.negatives is not None:
            if offer.batch_shape:
                raise ValueError(f"negatives: {offer!r} is a batch of offers in chunks; pass None, or the offers one by one")
            mask = torch.cat(list(offer.map(_offered)), -1)
            counted = self._counted(chosen, mask, seed)
            places = None if counted is None else counted.nonzero().squeeze(-1)
        return offer_loss(self._utility(), offer, self._large_field(offer, seed), chosen.nonzero().squeeze(-1), places)

    def _large_field(self, offer: ChunkedSet, seed: int) -> Any:
        gains, scale, grad, iteration, stop = self.solve
        if not isinstance(gains, Smoothed | None) or not isinstance(scale, Constant | None) or self.model.recognition:
            raise ValueError(
                f"set: {offer!r} has several chunks, which are solved with Smoothed() gains, a Constant scale and no "
                f"recognition network; use those, or hold the offer in one chunk"
            )
        if scale is not None and not scale.c > 0:
            raise ValueError(f"scale: got {scale!r}, wanted a constant above 0 for offers in chunks, 1 / temperature")
        temperature = 1.0 if scale is None else 1 / scale.c
        samples = 5 if gains is None else gains.samples
        return solve_offer(
            self._utility(), offer, samples=samples, seed=seed, temperature=temperature, grad=grad, iteration=iteration,
            stop=stop,
        )  # fmt: skip

    def _utility(self) -> SumUtility:
        if not isinstance(self.model.utility, SumUtility):
            raise ValueError(f"utility: got {type(self.model.utility).__name__}, wanted a SumUtility for offers in chunks")
        return self.model.utility

    def _chosen(self, example: Example, elements: Tensor) -> Tensor:
        shape = elements.shape[: elements.dim() - getattr(self.model.utility, "element_ndim", 1)]
        return _membership(example.target, torch.empty(shape, device=elements.device))

    def _elements(self, set: ChunkedSet) -> tuple[Tensor, Tensor | None]:
        first = next(self.model.parameters())
        chunk = set.whole().to(first.device, first.dtype)
        begins = next(module for module in self.model.modules() if not list(module.children()))
        if isinstance(begins, nn.Linear) and not chunk.elements.is_floating_point():
            raise ValueError(
                f"elements: got {chunk.elements.dtype} for a network that begins with nn.Linear, wanted floating-point "
                f"numbers; coded letters need encoder@task.encoder=deepdta"
            )
        return chunk.elements, chunk.mask


class _Frozen(SetFunction):
    """A utility whose parameters take no gradient; its inputs do."""

    def __init__(self, utility: SetFunction) -> None:
        super().__init__()
        self.element_ndim = getattr(utility, "element_ndim", 1)
        self._parts = (utility, {name: p.detach() for name, p in utility.named_parameters()})  # a tuple: no submodule

    def forward(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional_call(*self._parts, (elements, subsets, mask))


def diffmf_task(
    dim: int, *, nonlinear: bool = False, context: bool = False, width: int = 256, hidden: int = 500, steps: int = 1,
    samples: int = 5, encoder: ElementEncoder | None = None,
) -> OracleTask:  # fmt: skip
    """DiffMF as published: K unrolled steps from 0.5 over hard draws, |S*| negatives.

    ``encoder`` makes the network of single elements, see `published_utility`.
    """
    utility = published_utility(dim, nonlinear=nonlinear, context=context, width=width, hidden=hidden, encoder=encoder)
    solve = Solve(gains=Drawn(samples, derivative=None), grad=Unrolled(steps))
    return OracleTask(OracleModel(utility), solve, negatives=1)


def equivset_task(
    dim: int, *, rank: int = 0, nonlinear: bool = False, context: bool = False, width: int = 256, hidden: int = 500,
    steps: int = 1, samples: int = 5, encoder: ElementEncoder | None = None,
) -> OracleTask:  # fmt: skip
    """EquiVSet_ind, or with a ``rank`` EquiVSet_copula, as published: DiffMF from a recognition network's guess.

    Both networks have an ``encoder`` of their own.
    """
    utility = published_utility(dim, nonlinear=nonlinear, context=context, width=width, hidden=hidden, encoder=encoder)
    solve = Solve(gains=Drawn(samples, derivative=None), grad=Unrolled(steps))
    recognition = published_recognition(dim, rank=rank, width=width, hidden=hidden, encoder=encoder)
    return OracleTask(OracleModel(utility, recognition), solve, negatives=1, samples=samples)


def idiffmf_task(
    dim: int,
    *,
    scale: Scale | None = None,
    nonlinear: bool = False,
    context: bool = False,
    width: int = 256,
    hidden: int = 500,
    gains: GainsEstimator | None = None,
    iteration: Iteration | None = None,
    stop: Stop | None = None,
    encoder: ElementEncoder | None = None,
) -> OracleTask:
    """iDiffMF: the fixed point with its implicit gradient; ``scale`` is `L2()` (default), `Nuclear()` or `Constant(c)`."""
    solve = Solve(gains or Smoothed(5), L2() if scale is None else scale, Implicit(), iteration, stop)
    utility = published_utility(dim, nonlinear=nonlinear, context=context, width=width, hidden=hidden, encoder=encoder)
    return OracleTask(OracleModel(utility), solve, negatives=1)


def _joined(examples: Sequence[Example]) -> Example:
    """Batches of offers ``(B_i, N, *element)`` as one."""
    chunks = [example.set.whole() for example in examples]
    elements = torch.cat([chunk.elements for chunk in chunks])
    masks = [
        torch.ones(chunk.elements.shape[:2], dtype=torch.bool, device=elements.device) if chunk.mask is None else chunk.mask
        for chunk in chunks
    ]
    chosen = [_membership(example.target, mask) for example, mask in zip(examples, masks)]
    set = InMemory(elements, mask=torch.cat(masks), element_ndim=chunks[0].element_ndim)
    return Example(set, torch.cat(chosen))


def _offered(chunk: Chunk) -> Tensor:
    offered = torch.ones((*chunk.batch_shape, chunk.size), dtype=torch.bool)
    return offered if chunk.mask is None else chunk.mask.cpu()


def _membership(target: Any, like: Tensor) -> Tensor:
    """Targets may be bool ``(*, N)`` or int64 positions, the same for all offers of a batch."""
    target = torch.as_tensor(target).to(like.device)
    if target.dtype == torch.bool:
        if target.shape != like.shape:
            raise ValueError(f"chosen: got torch.bool {tuple(target.shape)}, wanted {tuple(like.shape)}, True in S*")
        return target
    check_positions(target, like.shape[-1])
    return torch.zeros(like.shape, dtype=torch.bool, device=like.device).index_fill(-1, target, True)
