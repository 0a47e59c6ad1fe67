r"""Utilities of subsets, F(S, V), and the networks that guess which subset they like best.

A `SetFunction` gives the utility of M subsets of an offer at once, and the *marginal gains* of every element,

.. math:: F(S \cup i) - F(S \setminus i) = (1 - 2 s_i)\,\bigl(F(S \oplus i) - F(S)\bigr),

with :math:`S \oplus i` the subset with i put in or taken out. For :math:`F = \rho(\sum_{i \in S} \phi(x_i))` all N gains
follow from one sum, :math:`\rho(u + (1 - 2 s_i)\phi_i) - \rho(u)`: O(N D) a subset where evaluating F anew for each costs
O(N^2 D). Any other F takes the general path, which is correct and evaluates F N + 1 times.

Shapes: ``*`` batch of offers, ``N`` elements, ``M`` subsets, ``D`` width of an element's code, ``H`` of the head.

References:
    [1] Ou, Xu, Su, Li, Zhao, Bian: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022.
        https://arxiv.org/abs/2203.01693
    [2] Özcan, Shi, Ioannidis: Learning Set Functions with Implicit Differentiation. AAAI 2025.
        https://arxiv.org/abs/2412.11239
    [3] Zaheer et al.: Deep Sets. NeurIPS 2017. https://arxiv.org/abs/1703.06114
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.encoders.pooling import accumulable
from distset.offers import check_elements

__all__ = [
    "Copula", "ElementEncoder", "Guess", "Independent", "SetFunction", "SumUtility", "UserUtility", "check_invariance",
    "elbo", "published_recognition", "published_utility",
]  # fmt: skip

ElementEncoder = Callable[[int, int], nn.Module]
"""Width of an element and of its code -> the network between them: a class, or a `functools.partial` of one."""


class SetFunction(nn.Module):
    """The base of utilities: subclasses give ``forward``; ``gains`` is right for any of them."""

    def forward(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None) -> Tensor:
        """F of the subsets ``(*, M, N)`` (0 or 1, or between) of ``elements (*, N, *element)``: ``(*, M)``.

        ``mask`` bool ``(*, N)`` is False at padding, which is in no subset but would count in a context of V.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(elements, subsets)")

    def gains(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None, *, block: int = 64) -> Tensor:
        """The marginal gains ``F(S + i) - F(S - i)`` of all elements at bool ``subsets (*, M, N)``: ``(*, M, N)``.

        Args:
            elements: ``(*, N, *element)``.
            subsets: bool ``(*, M, N)``.
            mask: bool ``(*, N)``, False at padding.
            block: elements whose flipped subsets are evaluated at once.
        """
        m, n = subsets.shape[-2:]
        s = subsets.to(_real(elements))
        value = self(elements, s, mask).unsqueeze(-1)
        parts = []
        for start in range(0, n, block):
            ids = torch.arange(start, min(start + block, n), device=s.device)
            flip = torch.eye(n, dtype=torch.bool, device=s.device)[ids]
            flipped = (subsets.unsqueeze(-2) ^ flip).flatten(-3, -2).to(s.dtype)
            parts.append(self(elements, flipped, mask).unflatten(-1, (m, len(ids))) - value)
        return (1 - 2 * s) * torch.cat(parts, -1)


class UserUtility(SetFunction):
    """Any function of (elements, subsets) as a utility; its parameters are learnt if it is a module.

    Args:
        function: from ``elements (*, N, *element)`` and ``subsets (*, M, N)`` to ``(*, M)``. With a third parameter
            called ``mask`` it takes offers with padding: it then gets the bool ``(*, N)``, or None without padding.

    Raises:
        ValueError: at use, for a value of another shape; for padding with a function that has no ``mask``, which could
            take it for a part of the offer.

    Example:
        >>> import torch
        >>> from distset.set_functions import UserUtility
        >>> def spread(elements, subsets, mask=None):  # no subset holds padding: a sum over S may ignore the mask
        ...     return (subsets * elements.norm(dim=-1).unsqueeze(-2)).sum(-1) - subsets.sum(-1)
        >>> utility = UserUtility(spread)
        >>> offer = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
        >>> utility(offer, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        tensor([ 5., -1.])
        >>> utility.gains(offer, torch.tensor([[False, False, True]]))
        tensor([[ 4., -1.,  1.]])
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.takes_mask = _takes_mask(function)

    def forward(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.takes_mask:
            value = self.function(elements, subsets, mask=mask)
        elif mask is None or bool(mask.all()):
            value = self.function(elements, subsets)
        else:
            raise ValueError(
                "function: takes (elements, subsets) alone, got an offer with padding, wanted a function with a third "
                "parameter, mask: add mask=None, and leave the padding out of all that is computed over the offer"
            )
        if value.shape != subsets.shape[:-1]:
            raise ValueError(
                f"function: gave shape {tuple(value.shape)} for subsets {tuple(subsets.shape)}, wanted one utility a "
                f"subset, {tuple(subsets.shape[:-1])}"
            )
        return value


class SumUtility(SetFunction):
    r""":math:`F(S, V) = \rho\bigl(\sum_{i \in S} \phi(x_i)\bigr)`, or with context
    :math:`\rho\bigl(\sum_{i \in S} \phi(x_i), \sum_{i \in V} \phi(x_i)\bigr)`.

    Without context F cannot know what else is offered: it learns one utility for all offers, as published.

    Args:
        encoder: phi, a network from ``(*, N, *element)`` to ``(*, N, D)`` that looks at each element alone.
        head: rho, a `torch.nn.Sequential` that starts with a Linear from D (2 D with context) and ends in 1.
        context: give the head the sum over the offer as well, behind the sum over the subset.
        element_ndim: dimensions of one element, 3 for images (the encoder then gets ``(M, *element)``).

    Raises:
        ValueError: for a head that does not start with a Linear.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distset.set_functions import SetFunction, SumUtility
        >>> utility = SumUtility(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)))
        >>> offer, subsets = torch.randn(9, 3), torch.rand(4, 9) < 0.5
        >>> utility(offer, subsets).shape, utility.gains(offer, subsets).shape
        (torch.Size([4]), torch.Size([4, 9]))
        >>> one_by_one = SetFunction.gains(utility, offer, subsets)  # N + 1 evaluations; from one sum they are the same
        >>> torch.allclose(utility.gains(offer, subsets), one_by_one, atol=1e-5)
        True
    """

    def __init__(self, encoder: nn.Module, head: nn.Sequential, *, context: bool = False, element_ndim: int = 1) -> None:
        super().__init__()
        first = head[0] if isinstance(head, nn.Sequential) and len(head) > 0 else head
        if not isinstance(first, nn.Linear):
            raise ValueError(
                f"head: got {type(head).__name__} starting with {type(first).__name__}, wanted an nn.Sequential starting "
                f"with nn.Linear, whose product with the sum is taken once for all elements"
            )
        self.encoder, self.head, self.context, self.element_ndim = encoder, head, context, element_ndim

    def embed(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """phi of every element, ``(*, N, D)``; 0 at padding."""
        if self.element_ndim == 1:
            h_ND = self.encoder(elements)
        else:
            lead = elements.shape[: elements.dim() - self.element_ndim]
            h_ND = self.encoder(elements.reshape(-1, *elements.shape[len(lead) :])).reshape(*lead, -1)
        return h_ND if mask is None else h_ND.masked_fill(~mask.unsqueeze(-1), 0.0)

    def forward(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None) -> Tensor:
        h_ND = self.embed(elements, mask)
        return self.of_sums(subsets.to(h_ND.dtype) @ h_ND, self.total(h_ND))

    def gains(self, elements: Tensor, subsets: Tensor, mask: Tensor | None = None, *, block: int = 0) -> Tensor:
        h_ND = self.embed(elements, mask)
        return self.gains_of_sums(h_ND, subsets.to(h_ND.dtype) @ h_ND, subsets, self.total(h_ND))

    def total(self, h_ND: Tensor) -> Tensor | None:
        """The sum over the offer ``(*, D)`` where the head wants it."""
        return h_ND.sum(-2) if self.context else None

    def of_sums(self, sums_MD: Tensor, total_D: Tensor | None) -> Tensor:
        """F from the sums of subsets, ``(*, M)``."""
        return self._rest(self._first(sums_MD, total_D))

    def gains_of_sums(self, h_ND: Tensor, sums_MD: Tensor, inside_MN: Tensor, total_D: Tensor | None) -> Tensor:
        """Gains ``(*, M, N)`` from the subsets' sums; ``inside`` says how much of each element is in them.

        ``inside`` bool: one evaluation of the head an element; real numbers (a smoothed subset): two, without and with i.
        """
        u_MH = self._first(sums_MD, total_D).unsqueeze(-2)
        a_NH = F.linear(h_ND, self._weight()).unsqueeze(-3)
        if inside_MN.dtype == torch.bool:
            flip = 1 - 2 * inside_MN.to(h_ND.dtype)
            return flip * (self._rest(torch.addcmul(u_MH, flip.unsqueeze(-1), a_NH)) - self._rest(u_MH))
        without = torch.addcmul(u_MH, inside_MN.unsqueeze(-1), a_NH, value=-1)
        return self._rest(without + a_NH) - self._rest(without)

    def _weight(self) -> Tensor:
        """The part of the first layer's weight that meets the subset's sum."""
        weight = cast(nn.Linear, self.head[0]).weight
        return weight[:, : weight.shape[1] // 2] if self.context else weight

    def _first(self, sums_MD: Tensor, total_D: Tensor | None) -> Tensor:
        first = cast(nn.Linear, self.head[0])
        u = F.linear(sums_MD, self._weight(), first.bias)
        if total_D is None:
            return u
        return u + F.linear(total_D, first.weight[:, sums_MD.shape[-1] :]).unsqueeze(-2)

    def _rest(self, u: Tensor) -> Tensor:
        for layer in list(self.head)[1:]:
            u = layer(u)
        return u.squeeze(-1)


class Guess(NamedTuple):
    """What a recognition network says of an offer: the parameters of a distribution over subsets.

    Attributes:
        logits: of the marginals, ``(*, N)``.
        noise: how much of the copula's normal is each element's own, ``(*, N)``, 1 for `Independent`.
        factors: what the elements share of it, ``(*, N, rank)``; noise^2 + |factors|^2 = 1. None for `Independent`.
    """

    logits: Tensor
    noise: Tensor
    factors: Tensor | None

    def sample(self, samples: int, generator: torch.Generator, temperature: float = 0.1) -> Tensor:
        """Subsets ``(*, samples, N)``, exactly 0 or 1 with the marginals given by the logits.

        The gradient is the straight-through one of the sigmoid at ``temperature`` [1, eq. 12], biased.
        """
        normal = _normal((*self.logits.shape[:-1], samples, self.logits.shape[-1]), self.logits, generator)
        if self.factors is not None:
            shared = _normal((*self.logits.shape[:-1], samples, self.factors.shape[-1]), self.logits, generator)
            normal = self.noise.unsqueeze(-2) * normal + shared @ self.factors.mT
        # logit of Phi(z), by the two tails, so that no end is rounded to 0 or 1
        score = self.logits.unsqueeze(-2) + torch.special.log_ndtr(normal) - torch.special.log_ndtr(-normal)
        soft = torch.sigmoid(score / temperature)
        return soft + ((score > 0).to(soft.dtype) - soft).detach()

    def entropy(self) -> Tensor:
        r"""The entropy ``(*)``: exact for `Independent`, for a copula a lower bound.

        .. math:: H \ge \sum_i H(\psi_i) + \tfrac12 \log\det R,

        since thresholding cannot raise the total correlation, which for a normal of correlation R is
        :math:`-\frac12 \log\det R`. The determinant costs O(N rank^2). (Both published codes leave it out, which is an
        upper bound: no bound of the likelihood.)
        """
        marginal = F.softplus(self.logits) - self.logits * torch.sigmoid(self.logits)
        if self.factors is None:
            return marginal.sum(-1)
        scaled = self.factors / self.noise.unsqueeze(-1)
        inner = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device) + scaled.mT @ scaled
        return marginal.sum(-1) + self.noise.log().sum(-1) + 0.5 * torch.logdet(inner)

    def masked(self, mask: Tensor | None) -> Guess:
        """Padding is never chosen, and has neither entropy nor correlation."""
        if mask is None:
            return self
        logits = self.logits.masked_fill(~mask, -200.0)  # sigmoid(-200) is 0 to float32 without an inf in the entropy
        factors = None if self.factors is None else self.factors.masked_fill(~mask.unsqueeze(-1), 0.0)
        return Guess(logits, self.noise.masked_fill(~mask, 1.0), factors)


class Independent(nn.Module):
    """A recognition network with independent marginals: ``trunk`` on each element, then one logit.

    Args:
        trunk: from ``(*, N, *element)`` to ``(*, N, width)``.
        width: of the trunk.
    """

    def __init__(self, trunk: nn.Module, width: int = 500) -> None:
        super().__init__()
        self.trunk, self.to_logit = trunk, nn.Linear(width, 1)

    def forward(self, elements: Tensor) -> Guess:
        logits = accumulable(self.to_logit(self.trunk(elements))).squeeze(-1)
        return Guess(logits, torch.ones_like(logits), None)


class Copula(Independent):
    """A Gaussian copula of low rank: correlated choices with exact marginals.

    The normal behind element i is ``noise_i eps_i + factors_i . eta`` with eta shared, *scaled to variance 1*; left
    unscaled, as published, a marginal of 0.1 is drawn with a frequency of .035 to .19.
    """

    def __init__(self, trunk: nn.Module, width: int = 500, rank: int = 5) -> None:
        super().__init__(trunk, width)
        self.to_noise, self.to_factors = nn.Linear(width, 1), nn.Linear(width, rank)

    def forward(self, elements: Tensor) -> Guess:
        h = self.trunk(elements)
        noise, factors = F.softplus(accumulable(self.to_noise(h))), torch.tanh(accumulable(self.to_factors(h)))
        scale = torch.rsqrt(noise.square() + factors.square().sum(-1, keepdim=True))
        return Guess(accumulable(self.to_logit(h)).squeeze(-1), (noise * scale).squeeze(-1), factors * scale)


def elbo(
    utility: SetFunction,
    guess: Guess,
    elements: Tensor,
    *,
    samples: int = 5,
    generator: torch.Generator,
    temperature: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """The evidence lower bound ``E_q F(S) + H(q)`` of each offer, ``(*)``; F from sampled subsets [1, eq. 11].

    Raises:
        ValueError: for no samples, a temperature that is not above 0, features that are not finite, a mask that does
            not fit.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, wanted at least 1 subset to estimate F from")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, wanted a number above 0, 0.1 as published")
    check_elements(elements, mask, elements.dim() - guess.logits.dim())
    guess = guess.masked(mask)
    return utility(elements, guess.sample(samples, generator, temperature), mask).mean(-1) + guess.entropy()


def published_utility(
    dim: int,
    *,
    nonlinear: bool = False,
    context: bool = False,
    width: int = 256,
    hidden: int = 500,
    encoder: ElementEncoder | None = None,
) -> SumUtility:
    """The utility network of [1, 2]: an encoder of each element, sum, 500-500-1 with ReLU.

    Args:
        dim: width of an element: 2 for Gaussian and Moons, 768 for Amazon.
        nonlinear: one hidden ReLU layer of ``width`` in front; without it F sees only the sum of x and the size.
        context: see `SumUtility`.
        width, hidden: as published 256 and 500.
        encoder: makes the network of elements, ``(*, N, dim)`` to ``(*, N, width)``; None for that of vectors, a Linear.
            Those published for images and for drugs with proteins are in `distset.tasks.offer_encoders`.

    Raises:
        ValueError: for an encoder with ``nonlinear``.

    Example:
        >>> import torch
        >>> from distset.set_functions import published_utility
        >>> utility = published_utility(2)
        >>> offers, subsets = torch.randn(4, 30, 2), torch.rand(4, 5, 30) < 0.5
        >>> utility(offers, subsets).shape, utility.gains(offers, subsets).shape
        (torch.Size([4, 5]), torch.Size([4, 5, 30]))
        >>> bool(utility(offers, torch.zeros(4, 1, 30)).std() < 1e-6)  # without context the empty set is worth one number
        True
    """
    if encoder is not None and nonlinear:
        raise ValueError("nonlinear: got True with an encoder, wanted one of them")
    phi: nn.Module = (encoder or nn.Linear)(dim, width)
    if nonlinear:
        phi = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width))
    head = nn.Sequential(
        nn.Linear(2 * width if context else width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, 1),
    )  # fmt: skip
    return SumUtility(phi, head, context=context)


def published_recognition(
    dim: int, *, rank: int = 0, width: int = 256, hidden: int = 500, encoder: ElementEncoder | None = None
) -> Independent:
    """The recognition network of [1]: an encoder of each element, 500-500 with ReLU; a copula where ``rank`` > 0.

    ``encoder`` as in `published_utility`, with weights of its own.
    """
    trunk = nn.Sequential(
        (encoder or nn.Linear)(dim, width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    )
    return Copula(trunk, hidden, rank) if rank else Independent(trunk, hidden)


def check_invariance(utility: SetFunction, elements: Tensor, *, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Refuse a utility whose value depends on the order of the elements.

    Raises:
        ValueError: naming the utility and how far its values are apart; for features or values that are not finite, of
            which nothing can be said.
    """
    check_elements(elements, None, getattr(utility, "element_ndim", 1))
    generator = torch.Generator().manual_seed(seed)
    axis = getattr(utility, "element_ndim", 1) + 1
    n = elements.shape[-axis]
    subsets = torch.rand(*elements.shape[: elements.dim() - axis], 8, n, generator=generator) < 0.5
    order = torch.randperm(n, generator=generator)
    with torch.no_grad():
        subsets = subsets.to(elements.device, _real(elements))
        value = utility(elements, subsets)
        moved = utility(elements.index_select(elements.dim() - axis, order.to(elements.device)), subsets[..., order])
    if bad := int((~(value.isfinite() & moved.isfinite())).sum()):
        raise ValueError(
            f"utility: {type(utility).__name__} gave {bad} of {value.numel()} values that are NaN or infinite, wanted "
            f"finite ones; look at its parameters, and for a logarithm or a division that meets 0"
        )
    gap = float((moved - value).abs().max())
    if gap > tolerance * (1 + float(value.abs().max())):
        raise ValueError(
            f"utility: {type(utility).__name__} is not permutation invariant: its values differ by {gap:.2g} when the "
            f"elements are put in another order; build it from sums, means or maxima over the elements"
        )


def _takes_mask(function: Callable[..., Tensor]) -> bool:
    try:
        return "mask" in signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # compiled or built in
        return False


def _real(elements: Tensor) -> torch.dtype:
    return elements.dtype if elements.is_floating_point() else torch.get_default_dtype()


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
