"""All subsets of k of n written down, and seeded numbers, for tests by enumeration."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def subsets(n: int, k: int) -> Tensor:
    """Zeros and ones ``(n over k, n)``, float64."""
    rows = [[float(i in chosen) for i in range(n)] for chosen in itertools.combinations(range(n), k)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, n)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, float64."""
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Enumerated:
    """Everything of a k-subset distribution by summing over its subsets."""

    def __init__(self, logits: Tensor, k: int) -> None:
        self.z = subsets(logits.shape[-1], k)
        score = self.z @ logits
        self.log_normalizer = score.logsumexp(0)
        self.log_prob = score - self.log_normalizer
        p = self.log_prob.exp()
        self.inclusion = p @ self.z
        self.entropy = -(p * self.log_prob).sum()


def quadratic(z: Tensor) -> Tensor:
    """A function that no affine one is."""
    n = z.shape[-1]
    return ((z @ randn(n, n, seed=5).to(z)) * z).sum(-1)


def true_gradient(logits: Tensor, k: int, f: Callable[[Tensor], Tensor] = quadratic) -> Tensor:
    """Of the mean of f over all subsets, in the logits."""
    leaf = logits.clone().requires_grad_()
    z = subsets(logits.shape[-1], k)
    mean = ((z @ leaf).softmax(0) * f(z)).sum()
    return torch.autograd.grad(mean, leaf)[0]
