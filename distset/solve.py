r"""The verb `solve`: a combinatorial solver inside a network, with a gradient where none exists.

:math:`y(w) = \arg\min_{y \in Y} \langle w, y\rangle` is piecewise constant, so its derivative is 0 or undefined. A strategy
says what comes back instead, for a loss gradient :math:`g = \partial \ell / \partial y`. For a minimising solver:

=============== ====================================================== =================
strategy        gradient at ``w``                                      solver calls
=============== ====================================================== =================
`Identity`      ``P'(w) (-g)``, with ``y = y(P(w))``                   1
`Blackbox`      ``(y(w + lam g) - y(w)) / lam``                        2
`IMLE`          ``(y(w - e + lam g) - y(w - e)) / lam``, noise ``e``   2
`Perturbed`     the Jacobian of ``E[y(w - e)]``, by its score          samples, batched
=============== ====================================================== =================

For a maximising solver ``g``, ``e`` and the result change their sign. Nothing is clipped or rescaled: gradient clipping is
the training loop's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distset.noise import Noise, check_noise
from distset.projections import Projection, Projector, check_projection, mask_of, projection_for
from distset.seeds import generator_for
from distset.solvers.base import Solver, Status, TensorSolver, as_solver, check_costs, solve_checked, solve_tensor_checked

__all__ = [
    "IMLE",
    "Blackbox",
    "Identity",
    "Informed",
    "Perturbed",
    "Solution",
    "solve",
    "solve_with_status",
]

AnySolver = Solver | Callable[[np.ndarray], np.ndarray]


class Solution(NamedTuple):
    """Solutions ``(*, *instance)``, carrying their gradient, and the `Status` of each search, int8 ``(*)``."""

    value: Tensor
    status: Tensor


class Informed:
    """The margin that knows the answer: the true structure is made worse by ``width`` than it is, entry by entry.

    ``w + width (y* - 1/2)`` for a cost, minus for a score: the network has to win by a margin.

    Raises:
        ValueError: for a negative width.
    """

    def __init__(self, width: float) -> None:
        if not 0 <= width < float("inf"):
            raise ValueError(f"width: got {width}, wanted a finite number of at least 0, in units of the cost")
        self.width = float(width)

    def __repr__(self) -> str:
        return f"Informed(width={self.width})"


class Strategy(Protocol):
    """What `solve` does with the costs ``(B, *instance)`` of a problem; gives ``(B, *instance)``."""

    def __call__(self, cost: Tensor, problem: Problem) -> Tensor: ...


def solve(
    cost: Tensor,
    solver: AnySolver,
    *,
    grad: Strategy | None = None,
    truth: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """The best structure for each cost, differentiable by the strategy ``grad``.

    Args:
        cost: ``(*, *instance)``, floating point; the solver says how many dimensions an instance has.
        solver: a `Solver`, or a function from a numpy batch of costs to a numpy batch of solutions (all dimensions but the
            first are then one instance, and the function minimises).
        grad: `Identity()` (default), `Blackbox(lam)`, `IMLE(...)` or `Perturbed(...)`.
        truth: the true structures ``(*, *instance)``, for an `Informed` margin.
        seed: names the noise; None draws it from torch's default generator.

    Returns:
        Solutions of the shape, dtype and device of ``cost`` (float32 where costs are in half precision). An empty batch
        gives an empty batch.

    Raises:
        ValueError: for costs that are not finite or that the solver forbids, a projection that is invalid for the
            solver, a ``truth`` that is missing, not finite or of another shape, a ``grad`` that is no strategy, a solver
            that returns something else than feasible structures.
        TimeoutError: where a time limit was hit and its policy is to fail.

    Example:
        >>> import torch
        >>> from distset.solve import Identity, solve
        >>> from distset.solvers import TopK
        >>> score = torch.tensor([[0.1, 3.0, -1.0, 2.0]], requires_grad=True)
        >>> chosen = solve(score, TopK(2), grad=Identity(projection="mean"))
        >>> chosen
        tensor([[0., 1., 0., 1.]], grad_fn=<...>)
        >>> chosen[0, 1].backward()
        >>> score.grad
        tensor([[-0.2500,  0.7500, -0.2500, -0.2500]])
    """
    return solve_with_status(cost, solver, grad=grad, truth=truth, seed=seed).value


def solve_with_status(
    cost: Tensor,
    solver: AnySolver,
    *,
    grad: Strategy | None = None,
    truth: Tensor | None = None,
    seed: int | None = None,
) -> Solution:
    """`solve`, and how each search ended, for solvers with a time limit; arguments as in `solve`."""
    solver = as_solver(solver)
    batch, instance = _split(cost, solver)
    work = _in_shape(cost, (batch.numel(), *instance))
    work = work if work.dtype == torch.float64 else work.float()
    check_costs(solver, work.detach())
    if truth is not None:
        _check_truth(truth, cost)
    problem = Problem(
        solver,
        None if truth is None else truth.reshape(work.shape).to(work),
        seed,
        torch.is_grad_enabled() and cost.requires_grad,
        [],
    )
    value = (Identity() if grad is None else check_strategy("grad", grad))(problem.masked(work), problem)
    dtype = cost.dtype if cost.dtype == torch.float64 else torch.float32
    status = problem.statuses[0] if problem.statuses else torch.zeros(len(work), dtype=torch.int8)
    return Solution(_in_shape(value.to(dtype), cost.shape), status.reshape(batch))


class Problem(NamedTuple):
    """What a strategy is handed beside the costs."""

    solver: Solver
    truth: Tensor | None
    seed: int | None
    training: bool
    statuses: list[Tensor]

    @property
    def sign(self) -> float:
        """1 where the solver minimises, -1 where it maximises."""
        return 1.0 if self.solver.sense == "min" else -1.0

    def masked(self, cost: Tensor) -> Tensor:
        mask = mask_of(self.solver, tuple(cost.shape[1:]))
        return cost if mask is None else torch.where(mask.to(cost.device), cost, 0.0)

    def run(self, cost: Tensor) -> tuple[Tensor, Tensor | None]:
        """Call the solver once: solutions, and which instances were left out (None: not one)."""
        cost = self.masked(cost.detach())
        if isinstance(self.solver, TensorSolver):
            return solve_tensor_checked(self.solver, cost), None
        found = solve_checked(self.solver, cost.cpu().numpy())
        status = torch.from_numpy(found.status)
        self.statuses.append(status)
        solutions = torch.as_tensor(found.solutions, dtype=cost.dtype, device=cost.device)
        skipped = status == Status.NOTHING
        return solutions, skipped.to(cost.device) if skipped.any() else None

    def draw(self, noise: Noise, like: Tensor, *shape: int) -> Tensor:
        """Noise in the shape of the costs (with ``shape`` in front), the same on every device."""
        seed = int(torch.randint(2**62, ()).item()) if self.seed is None else self.seed
        return noise.sample((*shape, *like.shape), generator_for(seed, "noise"), like.dtype).to(like.device)

    def move(self, cost: Tensor, by: Tensor) -> Tensor:
        """``cost + by``, clipped to the solver's domain; gradients pass straight through the clipping."""
        moved = cost + by
        if not self.solver.nonnegative:
            return moved
        return moved + (self.solver.clip(moved) - moved).detach()


class Identity:
    r"""The solver as a negative identity behind a projection: ``y(P(w))`` up, ``P'(w) (-g)`` down; one solver call.

    Args:
        projection: ``"auto"`` follows the solver's declaration; ``"none"``, ``"mean"``, ``"norm"``, ``"std"`` or
            `Plane(a)` choose. One that would change the solution is refused.
        margin: noise (`TwoPoint(width)` in the paper) or `Informed(width)`, put in before the projection, and only where a
            gradient is wanted: evaluation sees the cost as it is.

    References:
        Sahoo et al. 2023, https://arxiv.org/abs/2205.15213 (eq. 4 to 10).
    """

    def __init__(self, projection: Projection = "auto", margin: Noise | Informed | None = None) -> None:
        self.projection = check_projection(projection)
        self.margin = _check_margin(margin)

    def __call__(self, cost: Tensor, problem: Problem) -> Tensor:
        moved, project = _prepare(cost, problem, self.projection, self.margin)
        return _NegativeIdentity.apply(moved, problem, project)

    def __repr__(self) -> str:
        return f"Identity(projection={self.projection!r}, margin={self.margin!r})"


class Blackbox:
    """The slope of the loss between two solver calls: ``(y(w + lam g) - y(w)) / lam``.

    Args:
        lam: how far to look, in units of cost over loss gradient: it depends on the scale of both.
        projection, margin: as in `Identity`; the published method has neither.

    References:
        Vlastelica, Paulus, Musil, Martius, Rolínek 2020, "Differentiation of Blackbox Combinatorial Solvers",
        https://arxiv.org/abs/1912.02175 (algorithm 1).
    """

    def __init__(self, lam: float, projection: Projection = "none", margin: Noise | Informed | None = None) -> None:
        self.lam = _check_positive("lam", lam)
        self.projection = check_projection(projection)
        self.margin = _check_margin(margin)

    def __call__(self, cost: Tensor, problem: Problem) -> Tensor:
        moved, project = _prepare(cost, problem, self.projection, self.margin)
        return _Interpolate.apply(project(moved), problem, self.lam)

    def __repr__(self) -> str:
        return f"Blackbox({self.lam}, projection={self.projection!r}, margin={self.margin!r})"


class IMLE:
    """Implicit maximum-likelihood: a perturbed sample up, the finite difference of the same perturbed solver down.

    The solution is a *sample*, at evaluation too. For S samples an instance, expand the costs by S: the gradient of the
    mean loss is the mean over samples.

    Args:
        noise: `SumOfGamma(k)` for structures with k ones, `Gumbel()` for one.
        lam: the step towards the target distribution. The gradient is divided by it, so that ``lam`` sets how far to look
            and not how long a step is; published code leaves this to the learning rate.

    References:
        Niepert, Minervini, Franceschi 2021, https://arxiv.org/abs/2106.01798 (algorithm 1, eq. 9).
    """

    def __init__(self, noise: Noise, lam: float = 10.0) -> None:
        self.noise = check_noise("noise", noise)
        self.lam = _check_positive("lam", lam)

    def __call__(self, cost: Tensor, problem: Problem) -> Tensor:
        noise = problem.draw(self.noise, cost)
        return _Interpolate.apply(problem.move(cost, -problem.sign * noise), problem, self.lam)

    def __repr__(self) -> str:
        return f"IMLE({self.noise!r}, lam={self.lam})"


class Perturbed:
    r"""The perturbed optimiser: the mean solution under noise, differentiable, its Jacobian by the score of the noise.

    :math:`\bar y(w) = \mathbb E[y(w - e)]`, :math:`J^\top g = -\mathbb E[\langle g, y(w - e)\rangle\, s(e)]` with
    :math:`s = -\nabla \log p`. Both from the same draws; the mean of the other draws is the baseline, which leaves the
    gradient unbiased. Its value is a mean of structures and not a structure.

    Args:
        noise: `Normal(scale)` or `Gumbel(scale)`.
        samples: draws an instance, at least 2; they are solved as one batch.

    References:
        Berthet, Blondel, Teboul, Cuturi, Vert, Bach 2020, "Learning with Differentiable Perturbed Optimizers",
        https://arxiv.org/abs/2002.08676 (proposition 3.1).
    """

    def __init__(self, noise: Noise, samples: int = 10) -> None:
        if not isinstance(samples, (int, np.integer)) or samples < 2:
            raise ValueError(
                f"samples: got {samples}, wanted a whole number of at least 2: the others' mean is the baseline"
            )
        check_noise("noise", noise).score(torch.zeros(1))
        self.noise, self.samples = noise, samples

    def __call__(self, cost: Tensor, problem: Problem) -> Tensor:
        draws = problem.draw(self.noise, cost, self.samples)
        moved = problem.move(cost.detach(), -problem.sign * draws)
        solutions, skipped = problem.run(moved.flatten(0, 1))
        if skipped is not None:
            raise ValueError("grad: Perturbed cannot skip samples; use TimeLimit(seconds, then='best'), or Identity")
        problem.statuses[:] = [s.reshape(self.samples, -1).amax(0) for s in problem.statuses]
        return _MeanOfSamples.apply(cost, solutions.reshape(moved.shape), self.noise.score(draws), -problem.sign)

    def __repr__(self) -> str:
        return f"Perturbed({self.noise!r}, samples={self.samples})"


class _NegativeIdentity(torch.autograd.Function):
    """Solutions of the projected cost up; the gradient straight down, its sign turned, through the projection."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: Problem, project: Projector) -> Tensor:
        projected, scale = project.forward(cost)
        solutions, ctx.skipped = problem.run(projected)
        ctx.project, ctx.sign = project, -problem.sign
        if scale is not None:  # it carries the sign, which spares a pass over the gradient
            ctx.save_for_backward(projected, ctx.sign * scale)
        return solutions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        at_cost = ctx.project.pull_back(g, *saved) if saved else ctx.project.pull_back(ctx.sign * g)
        return _leave_out(at_cost, ctx.skipped), None, None


class _Interpolate(torch.autograd.Function):
    """Solutions up; the finite difference towards the loss gradient down."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, problem: Problem, lam: float) -> Tensor:
        solutions, ctx.skipped = problem.run(cost)
        ctx.problem, ctx.lam = problem, lam
        ctx.save_for_backward(cost, solutions)
        return solutions.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        cost, solutions = ctx.saved_tensors
        if not g.isfinite().all():
            raise ValueError("the gradient of the loss with respect to the solutions has NaN or infinite entries")
        sign = ctx.problem.sign
        other, skipped = ctx.problem.run(ctx.problem.solver.clip(cost + sign * ctx.lam * g))
        slope = sign * (other - solutions) / ctx.lam
        return _leave_out(_leave_out(slope, ctx.skipped), skipped), None, None


class _MeanOfSamples(torch.autograd.Function):
    """The mean of solutions ``(S, B, *instance)`` up; the score-function gradient with leave-one-out baseline down."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, solutions: Tensor, score: Tensor, sign: float) -> Tensor:
        ctx.sign = sign
        mean = solutions.mean(0)
        ctx.save_for_backward(solutions - mean, score)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        centred, score = ctx.saved_tensors
        # y_i less the mean of the others is S / (S - 1) times y_i less the mean of all.
        dims = tuple(range(2, centred.ndim))
        weight = (g * centred).sum(dims, keepdim=True)
        return ctx.sign * (weight * score).sum(0) / (len(centred) - 1), None, None, None


def _prepare(
    cost: Tensor, problem: Problem, projection: Projection, margin: Noise | Informed | None
) -> tuple[Tensor, Projector]:
    """The margin, and the projection that comes after it: before the noise it would not keep costs from collapsing."""
    project = projection_for(projection, problem.solver, tuple(cost.shape[1:]))
    if margin is not None and problem.training:
        cost = problem.move(cost, _margin(margin, cost, problem))
    return cost, project


def _margin(margin: Noise | Informed, cost: Tensor, problem: Problem) -> Tensor:
    if not isinstance(margin, Informed):
        return problem.draw(margin, cost)
    if problem.truth is None:
        raise ValueError("truth: got None, wanted the true structures: margin=Informed(...) is made of them")
    return problem.sign * margin.width * (problem.truth - 0.5)


def _check_margin(margin: Noise | Informed | None) -> Noise | Informed | None:
    if margin is None or isinstance(margin, Noise | Informed):
        return margin
    came = f"the class {margin.__name__}" if isinstance(margin, type) else repr(margin)
    raise ValueError(f"margin: got {came}, wanted noise, such as TwoPoint(width), or Informed(width), or None")


def check_strategy(name: str, grad: Strategy) -> Strategy:
    """``grad`` where it is a strategy, else a ValueError that names the argument ``name``."""
    if callable(grad) and not isinstance(grad, type):
        return grad
    came = f"the class {grad.__name__}" if isinstance(grad, type) else repr(grad)
    raise ValueError(f"{name}: got {came}, wanted an object: Identity(), Blackbox(lam), IMLE(noise) or Perturbed(noise)")


def _check_truth(truth: Tensor, cost: Tensor) -> None:
    if not isinstance(truth, Tensor):
        raise ValueError(f"truth: got {type(truth).__name__}, wanted a tensor of true structures, in the shape of the cost")
    if truth.shape != cost.shape:
        raise ValueError(f"truth: got shape {tuple(truth.shape)}, wanted {tuple(cost.shape)}, the shape of the cost")
    if not truth.isfinite().all():
        raise ValueError("truth: got NaN or infinite entries, wanted true structures; look for NaN in the labels")


def _check_positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, wanted a positive finite number")
    return float(value)


def _split(cost: Tensor, solver: Solver) -> tuple[torch.Size, torch.Size]:
    """The batch's and the instance's shape."""
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        came = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
        raise ValueError(f"cost: got {came}, wanted a floating-point tensor")
    ndim = cost.ndim - 1 if solver.instance_ndim < 0 else solver.instance_ndim
    if ndim < 1 or cost.ndim < ndim:
        wanted = "a batch dimension and then an instance" if solver.instance_ndim < 0 else f"at least {ndim} dimensions"
        raise ValueError(f"cost: got shape {tuple(cost.shape)} for {solver}, wanted {wanted}")
    return cost.shape[: cost.ndim - ndim], cost.shape[cost.ndim - ndim :]


def _in_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view is a node of the graph: none where there is nothing to do."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _leave_out(gradient: Tensor, skipped: Tensor | None) -> Tensor:
    if skipped is None:
        return gradient
    return gradient.masked_fill(skipped.reshape(-1, *[1] * (gradient.ndim - 1)), 0.0)
