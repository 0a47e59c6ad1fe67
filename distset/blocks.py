r"""What may follow a state: functions of the small set of slots that a set encoder leaves behind.

Every block is a plain module on ``(*, K, D)`` tensors with an optional mask ``(*, K)``, True where there is an element,
and neither knows nor needs chunks: after a `distset.UMBC` state any of them keeps mini-batch consistency. On sets
that fit they are set networks of their own. Equivariant: `SAB`, `ISAB` (and `MAB` in its queries). Invariant: `PMA`,
`FSPool`, `DiffEM` (whose rows are its components).

Shapes: ``*`` batch, ``K`` elements (slots), ``D`` width, ``M`` inducing points or seeds, ``C`` components, ``H`` heads.

References:
    [1] Lee et al.: Set Transformer. ICML 2019. https://arxiv.org/abs/1810.00825
    [2] Zhang, Hare, Prügel-Bennett: FSPool: Learning Set Representations with Featurewise Sort Pooling. ICLR 2020.
        https://arxiv.org/abs/1906.02795
    [3] Kim: Differentiable Expectation-Maximization for Set Representation Learning. ICLR 2022.
        https://openreview.net/forum?id=MXdFBmHT4C
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ISAB", "MAB", "MLP", "PMA", "SAB", "DiffEM", "FSPool", "Mixture", "SetTransformer"]


class MLP(nn.Sequential):
    """Linear layers of the given widths with an activation (and dropout) between them.

    Args:
        widths: of the input, the hidden layers and the output: at least two.
        activation: a module, put between the layers; GELU if None.
        dropout: probability, after each activation.

    Raises:
        ValueError: for fewer than two widths, or one below 1.
    """

    def __init__(self, *widths: int, activation: nn.Module | None = None, dropout: float = 0.0) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths: got {widths}, wanted those of the input, any hidden layers and the output, above 0")
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.GELU() if activation is None else activation]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers[: len(layers) - (2 if dropout else 1)])


class MAB(nn.Module):
    r"""Multihead attention block [1, eq. 6 and 7] of queries ``x`` over elements ``y``,

    .. math:: h = \mathrm{LN}(x W_q + \mathrm{Att}(x W_q, y W_k, y W_v)), \qquad
              \mathrm{MAB}(x, y) = \mathrm{LN}(h + \mathrm{ReLU}(h W_o)),

    as in the authors' release (residual on the projected queries, one feed-forward layer), with logits scaled by the
    width of a head.

    Args:
        dim_query: width of ``x``.
        dim: width of ``y``.
        dim_out: width of the output; ``dim`` if None.
        heads: divides ``dim_out``.
        layer_norm: LN above; the identity if False.
        dropout: probability, on the attention weights and before the second residual.

    Raises:
        ValueError: if ``heads`` does not divide ``dim_out``.
    """

    def __init__(
        self,
        dim_query: int,
        dim: int,
        *,
        dim_out: int | None = None,
        heads: int = 4,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if heads < 1 or dim_out % heads:
            raise ValueError(f"heads: got {heads}, wanted a divisor of the output width {dim_out}")
        self.heads, self.dropout = heads, dropout
        self.to_query = nn.Linear(dim_query, dim_out)
        self.to_key = nn.Linear(dim, dim_out)
        self.to_value = nn.Linear(dim, dim_out)
        self.to_out = nn.Linear(dim_out, dim_out)
        self.norm_attention = nn.LayerNorm(dim_out) if layer_norm else nn.Identity()
        self.norm_out = nn.LayerNorm(dim_out) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries ``x (*, M, dim_query)``, elements ``y (*, K, dim)`` with ``mask (*, K)`` -> ``(*, M, dim_out)``."""
        query = self.to_query(x)
        attended = F.scaled_dot_product_attention(
            self._split(query),
            self._split(self.to_key(y)),
            self._split(self.to_value(y)),
            attn_mask=None if mask is None else mask[..., None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        h = self.norm_attention(query + attended.transpose(-3, -2).flatten(-2))
        return self.norm_out(h + F.dropout(F.relu(self.to_out(h)), self.dropout, self.training))

    def _split(self, x: Tensor) -> Tensor:
        """``(*, M, D)`` to heads ``(*, H, M, D / H)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class SAB(nn.Module):
    """Set attention block [1, eq. 8], ``MAB(x, x)``: elements attend to each other, at K² cost. Options as `MAB`'s."""

    def __init__(
        self, dim: int, *, dim_out: int | None = None, heads: int = 4, layer_norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.mab = MAB(dim, dim, dim_out=dim_out, heads=heads, layer_norm=layer_norm, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*, K, dim)`` -> ``(*, K, dim_out)``; rows that are masked out hold no meaning."""
        return self.mab(x, x, mask)


class ISAB(nn.Module):
    """Induced set attention block [1, eq. 9], ``MAB(x, MAB(I, x))``: attention by way of M learned points, at M K cost.

    Args:
        dim, dim_out, heads, layer_norm, dropout: as in `MAB`.
        points: M.
    """

    def __init__(
        self,
        dim: int,
        points: int,
        *,
        dim_out: int | None = None,
        heads: int = 4,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        self.points = _rows(points, dim_out)
        self.induce = MAB(dim_out, dim, dim_out=dim_out, heads=heads, layer_norm=layer_norm, dropout=dropout)
        self.spread = MAB(dim, dim_out, dim_out=dim_out, heads=heads, layer_norm=layer_norm, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*, K, dim)`` -> ``(*, K, dim_out)``; rows that are masked out hold no meaning."""
        return self.spread(x, self.induce(self.points.expand(*x.shape[:-2], -1, -1), x, mask))


class PMA(nn.Module):
    """Pooling by multihead attention [1, eq. 11], ``MAB(S, x)`` with M learned seeds.

    As in the authors' release, the feed-forward that the paper applies to ``x`` first is the one that ends the block
    before.

    Args:
        dim, dim_out, heads, layer_norm, dropout: as in `MAB`.
        seeds: M, the vectors that the set is pooled to.
    """

    def __init__(
        self,
        dim: int,
        seeds: int = 1,
        *,
        dim_out: int | None = None,
        heads: int = 4,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        self.seeds = _rows(seeds, dim_out)
        self.mab = MAB(dim_out, dim, dim_out=dim_out, heads=heads, layer_norm=layer_norm, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*, K, dim)`` -> ``(*, M, dim_out)``."""
        return self.mab(self.seeds.expand(*x.shape[:-2], -1, -1), x, mask)


class SetTransformer(nn.Sequential):
    """A head from slots to outputs: `SAB` blocks, `PMA` to one vector, a linear layer.

    Args:
        dim: width of a slot.
        dim_out: outputs, the classes of a classifier.
        blocks: how many `SAB`.
        heads, dropout: as in `MAB`.

    Example:
        >>> import torch
        >>> from distset import UMBC, InMemory, encode_set
        >>> from distset.blocks import SetTransformer
        >>> slots = encode_set(UMBC(dim=8, slots=4), InMemory(torch.randn(3, 1000, 8), chunk_size=256))
        >>> SetTransformer(8, 2)(slots).shape
        torch.Size([3, 2])
    """

    def __init__(self, dim: int, dim_out: int, *, blocks: int = 1, heads: int = 4, dropout: float = 0.0) -> None:
        attend = [SAB(dim, heads=heads, dropout=dropout) for _ in range(blocks)]
        super().__init__(*attend, PMA(dim, heads=heads, dropout=dropout), nn.Flatten(-2), nn.Linear(dim, dim_out))


class FSPool(nn.Module):
    r"""Featurewise sort pooling [2, eq. 3 to 5].

    Every feature is sorted on its own, in descending order, and weighed by a learned piecewise linear function of the
    rank, so that sets of any size share the weights:

    .. math:: z_d = \sum_{j=0}^{K-1} f_d\!\left(\tfrac{j}{K-1}\right) x_{(j)d}, \qquad
              f_d(r) = \sum_p \max(0, 1 - |P r - p|)\, w_{pd}.

    Args:
        dim: width D.
        pieces: P, linear pieces of the weight function, which has P + 1 knots a feature.
    """

    def __init__(self, dim: int, pieces: int = 20) -> None:
        super().__init__()
        if pieces < 1:
            raise ValueError(f"pieces: got {pieces}, wanted at least 1 linear piece")
        self.pieces = pieces
        self.knots = nn.Parameter(torch.randn(pieces + 1, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*, K, D)`` with ``mask (*, K)`` -> ``(*, D)``."""
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), -torch.inf)  # behind every element
        ordered = x.sort(dim=-2, descending=True).values
        ranks = torch.arange(x.shape[-2], device=x.device)
        sizes = torch.full((), x.shape[-2], device=x.device) if mask is None else mask.sum(-1, keepdim=True)
        if mask is not None:
            ordered = ordered.masked_fill((ranks >= sizes).unsqueeze(-1), 0.0)
        relative = ranks.to(self.knots.dtype) / (sizes - 1).clamp_min(1)
        return (ordered * self.weights(relative)).sum(-2)

    def weights(self, ranks: Tensor) -> Tensor:
        """The piecewise linear function at relative ranks ``(*, K)`` in 0..1 (above: its end) -> ``(*, K, D)``."""
        place = self.pieces * ranks.clamp(0, 1)
        left = place.floor().clamp_max(self.pieces - 1)
        share = (place - left).unsqueeze(-1)
        left = left.long()
        return (1 - share) * self.knots[left] + share * self.knots[left + 1]


class Mixture(NamedTuple):
    """A mixture of diagonal Gaussians: ``weight (*, C)``, ``mean (*, C, D)`` and ``variance (*, C, D)``."""

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """``log weight_c N(x_k; mean_c, variance_c)`` for ``x (*, K, D)`` -> ``(*, K, C)``."""
        precision = 1 / self.variance
        squares = x.square() @ precision.mT - 2 * (x @ (self.mean * precision).mT)
        constant = (self.mean.square() * precision + self.variance.log() + math.log(2 * math.pi)).sum(-1)
        log_weight = self.weight.clamp_min(torch.finfo(x.dtype).tiny).log()  # a component may have lost every element
        return log_weight.unsqueeze(-2) - 0.5 * (squares + constant.unsqueeze(-2))


class DiffEM(nn.Module):
    r"""Differentiable expectation-maximization [3]: the embedding of a set is the mixture of Gaussians fitted to it.

    From the prior's mode, ``steps`` EM steps towards the maximum a posteriori mixture. Each component c has the prior
    of :math:`\tau` pseudo-elements with learned mean :math:`m_c` and variance :math:`V_c` (diagonal):

    .. math:: q_{kc} \propto \pi_c N(x_k; \mu_c, \Sigma_c), \quad n_c = \tau + \sum_k q_{kc}, \quad
              \pi_c = \frac{n_c}{\sum_{c'} n_{c'}}, \quad \mu_c = \frac{\tau m_c + \sum_k q_{kc} x_k}{n_c}, \quad
              \Sigma_c = \frac{\tau (V_c + m_c^2) + \sum_k q_{kc} x_k^2}{n_c} - \mu_c^2.

    A step never lowers :math:`\sum_k \log p(x_k) + \tau \sum_c (\log \pi_c + E_{N(m_c, V_c)} \log N(\cdot; \mu_c,
    \Sigma_c))`, which is the log-likelihood where :math:`\tau = 0`.

    Args:
        dim: width D.
        components: C, of each mixture.
        heads: H mixtures with priors of their own.
        steps: EM steps.
        tau: strength of the prior, in elements.
        floor: the least variance, against components that collapse on one element where ``tau`` is 0.

    Returns:
        ``(*, H C, 1 + 2 D)``: weight, mean and variance of each component, head by head.
    """

    def __init__(
        self, dim: int, components: int, *, heads: int = 1, steps: int = 3, tau: float = 10.0, floor: float = 1e-6
    ) -> None:
        super().__init__()
        if min(components, heads, steps) < 1:
            raise ValueError(f"components, heads, steps: got {components}, {heads}, {steps}, wanted at least 1 each")
        if tau < 0 or floor <= 0:
            raise ValueError(f"tau, floor: got {tau} and {floor}, wanted tau of at least 0 and a floor above 0")
        self.components, self.steps, self.tau, self.floor = components, steps, tau, floor
        self.mean = nn.Parameter(0.1 * torch.randn(heads, components, dim))
        self.rho = nn.Parameter(torch.full((heads, components, dim), math.log(math.e - 1)))  # a variance of 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(*, K, D)`` with ``mask (*, K)`` -> ``(*, H C, 1 + 2 D)``."""
        mixture = self.fit(x, mask)
        rows = torch.cat([mixture.weight.unsqueeze(-1), mixture.mean, mixture.variance], -1)
        return rows.flatten(-3, -2)

    def fit(self, x: Tensor, mask: Tensor | None = None) -> Mixture:
        """The mixtures after the last step, with a dimension of heads: ``weight (*, H, C)`` and so on."""
        present = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
        centre = (x * present).sum(-2, keepdim=True) / present.sum(-2, keepdim=True)
        centred = ((x - centre) * present).unsqueeze(-3)  # squares of large numbers would cancel in the variances
        centre, present = centre.unsqueeze(-3), present.unsqueeze(-3)
        prior = self.prior(centre)
        mixture = prior
        for _ in range(self.steps):
            mixture = self.step(mixture, prior, centred, present)
        return mixture._replace(mean=mixture.mean + centre)

    def prior(self, centre: Tensor) -> Mixture:
        """The mode of the prior as seen from ``centre (*, 1, 1, D)``."""
        mean = self.mean - centre
        weight = torch.full_like(mean[..., 0], 1 / self.components)
        return Mixture(weight, mean, F.softplus(self.rho).expand_as(mean))

    def step(self, mixture: Mixture, prior: Mixture, x: Tensor, present: Tensor) -> Mixture:
        """One E-step and one M-step on ``x (*, 1, K, D)``, of which ``present (*, 1, K, 1)`` are there."""
        shares = (mixture.log_joint(x).softmax(-1) * present).mT  # (*, H, C, K)
        count = shares.sum(-1, keepdim=True) + self.tau
        safe = count.clamp_min(torch.finfo(x.dtype).eps)
        mean = (shares @ x + self.tau * prior.mean) / safe
        square = (shares @ x.square() + self.tau * (prior.variance + prior.mean.square())) / safe
        weight = (count / count.sum(-2, keepdim=True)).squeeze(-1)
        return Mixture(weight, mean, (square - mean.square()).clamp_min(self.floor))


def _rows(count: int, dim: int) -> nn.Parameter:
    if count < 1:
        raise ValueError(f"points, seeds: got {count}, wanted at least 1 learned vector")
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(count, dim)))
