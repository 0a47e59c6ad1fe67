r"""`fixed_point`: a solution of :math:`x = g(x, \theta)` and its gradient, at a memory that iterations do not raise.

The map is iterated without a graph. Where it stops, one more step is taken *with* a graph; it hands the parameters
their gradient, and the strategies differ in the cotangent that reaches it. With :math:`J = \partial g / \partial x` at
the solution,

.. math:: \frac{dL}{d\theta} = u^\top \frac{\partial g}{\partial \theta}, \qquad
          u = \begin{cases} \partial L / \partial x & \text{OneStep} \\
              (I - J^\top)^{-1}\, \partial L / \partial x & \text{Implicit} \end{cases}

`Unrolled` keeps the graph of every iteration instead. Since the parameters are met in an ordinary step, whatever the
map depends on gets its gradient: there is no list of parameters to forget one in, and hooks and DDP see them.

A map that draws at random has no fixed point: draw once, outside, and keep the draws through the solve.

References:
    Özcan, Shi, Ioannidis: Learning Set Functions with Implicit Differentiation. AAAI 2025, Theorem 4.3.
    https://arxiv.org/abs/2412.11239
    Bai, Kolter, Koltun: Deep Equilibrium Models. NeurIPS 2019. https://arxiv.org/abs/1909.01377
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distset.iterations import Anderson, Damped, Iteration, Plain
from distset.krylov import GMRES, Dense, Neumann, attainable, safe

__all__ = [
    "GMRES", "Anderson", "Damped", "Dense", "FixedPointWarning", "Implicit", "Iteration", "Neumann", "OneStep", "Plain",
    "Solution", "Status", "Stop", "Unrolled", "fixed_point", "lipschitz",
]  # fmt: skip

Step = Callable[[Tensor], Tensor]


class FixedPointWarning(UserWarning):
    """A fixed point, or the linear system of its gradient, was not reached; the message says what to try."""


class Status(IntEnum):
    """How the iteration of one set ended."""

    CONVERGED = 0
    CYCLE = 1
    NOT_CONVERGED = 2
    DIVERGED = 3


class Stop(NamedTuple):
    """When to stop: root mean square of ``step(x) - x`` at most ``atol + rtol * rms(x)``, or ``max_steps``."""

    max_steps: int = 100
    atol: float = 1e-5
    rtol: float = 1e-5


class Solution(NamedTuple):
    """The answer of `fixed_point`; whether it converged is a part of it.

    Attributes:
        value: where the iteration stopped, one step further, ``x0``'s shape; it carries the gradient.
        status: a `Status` for each set, int ``(*)``.
        residual: root mean square of ``step(x) - x`` where it stopped, ``(*)``.
        iterations: evaluations of the map until then, ``(*)``.
        period: the length of the cycle where the status says one, else 0, ``(*)``.
        trace: the residual by iteration, ``(iterations, *)``; it stays where a set has stopped.
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    iterations: Tensor
    period: Tensor
    trace: Tensor

    @property
    def converged(self) -> Tensor:
        """bool ``(*)``."""
        return self.status == Status.CONVERGED

    def advice(self) -> str:
        """What went wrong in how many sets, and what to try; empty where all converged."""
        total = self.status.numel()
        lines = []
        if cycles := int((self.status == Status.CYCLE).sum()):
            periods = sorted(set(self.period[self.status == Status.CYCLE].tolist()))
            lines.append(
                f"{cycles} of {total} sets run in a cycle (period {', '.join(map(str, periods))}): the map overshoots; "
                f"use iteration=Damped(0.3) or smaller, Anderson(), or scale the map down"
            )
        if slow := int((self.status == Status.NOT_CONVERGED).sum()):
            worst = self.residual[self.status == Status.NOT_CONVERGED].max().item()
            lines.append(
                f"{slow} of {total} sets are not converged after {len(self.trace)} steps (residual up to {worst:.2g}): "
                f"raise max_steps or the tolerances, or use iteration=Damped(...) or Anderson()"
            )
        if diverged := int((self.status == Status.DIVERGED).sum()):
            lines.append(
                f"{diverged} of {total} sets left the finite numbers; the last finite point is returned: scale the map "
                f"down or use iteration=Damped(...)"
            )
        return "; ".join(lines)


class Unrolled:
    """Plain autograd through ``steps`` iterations from ``x0``: memory grows with them; the tolerances only inform."""

    def __init__(self, steps: int = 5) -> None:
        if steps < 1:
            raise ValueError(f"steps: got {steps}, wanted at least 1 unrolled iteration")
        self.steps = steps

    def solve(self, step: Step, x0: Tensor, iteration: Iteration, stop: Stop, event_ndim: int) -> Solution:
        advance, x = iteration.start(), x0
        trace: list[Tensor] = []
        for _ in range(self.steps):
            fx = step(x)
            if trace:
                _check_step(x, fx)
            else:
                _check_first(x, fx)
            trace.append(_rms(fx.detach() - x.detach(), event_ndim))
            x = _flat(advance, x, fx, event_ndim)
        calm = trace[-1].isfinite() & (trace[-1] <= stop.atol + stop.rtol * _rms(x.detach(), event_ndim))
        status = torch.where(calm, Status.CONVERGED, Status.NOT_CONVERGED)
        counts = torch.full_like(status, self.steps)
        return Solution(x, status, trace[-1], counts, torch.zeros_like(status), torch.stack(trace))

    def __repr__(self) -> str:
        return f"Unrolled({self.steps})"


class OneStep:
    """The gradient of one step at the solution, as if its input were constant: right only where J is small."""

    def solve(self, step: Step, x0: Tensor, iteration: Iteration, stop: Stop, event_ndim: int) -> Solution:
        solution, x = _iterate(step, x0, iteration, stop, event_ndim)
        if not torch.is_grad_enabled():
            return solution
        fx = step(x)
        _check_repeats(solution.value, fx)
        return solution._replace(value=fx)

    def __repr__(self) -> str:
        return "OneStep()"


class Implicit:
    """The gradient of the solution itself by the implicit function theorem, through vector-Jacobian products only.

    Args:
        solver: of ``(I - J^T) u = cotangent``: `GMRES()` (default), `Neumann()` or `Dense()`.
    """

    def __init__(self, solver: GMRES | Neumann | Dense | None = None) -> None:
        self.solver = GMRES() if solver is None else solver

    def solve(self, step: Step, x0: Tensor, iteration: Iteration, stop: Stop, event_ndim: int) -> Solution:
        solution, x = _iterate(step, x0, iteration, stop, event_ndim)
        if not torch.is_grad_enabled():
            return solution
        z = x.detach().requires_grad_()
        fx = step(z)
        _check_repeats(solution.value, fx)
        if not _learns(fx, z):
            return solution
        return solution._replace(value=_Implicit.apply(fx, self.solver, event_ndim, (fx, z)))

    def __repr__(self) -> str:
        return f"Implicit({self.solver!r})"


def fixed_point(
    step: Step,
    x0: Tensor,
    *,
    grad: Implicit | OneStep | Unrolled | None = None,
    iteration: Iteration | None = None,
    stop: Stop | None = None,
    event_ndim: int = 1,
    throw: bool = False,
) -> Solution:
    """Solve ``x = step(x)`` for a batch of sets, each to its own convergence.

    Args:
        step: a deterministic map from ``(*, N)`` to ``(*, N)`` that treats the sets of the batch one by one.
        x0: where to start, ``(*, N)``; it gets a gradient from `Unrolled` alone.
        grad: `Implicit(solver)` (default), `OneStep()` or `Unrolled(K)`.
        iteration: `Plain()` (default), `Damped(rate)` or `Anderson(memory)`. The solution does not depend on it, nor
            does its gradient (`Unrolled` excepted).
        stop: tolerances and the largest number of iterations.
        event_ndim: the last dimensions that belong to one set: 1 for ``(*, N)``, 0 where each entry is a problem of its own.
        throw: raise where a set does not converge, instead of a warning (`Unrolled`: never said, it was asked for).

    Returns:
        A `Solution`. A set's value does not depend on its companions in the batch.

    Raises:
        ValueError: for a map that gives no tensor, changes the shape or type, is not finite at ``x0``, or gives another
            value when evaluated again; for a bad ``x0``, ``grad``, ``stop`` or ``event_ndim``.
        RuntimeError: where ``throw`` is set and a set does not converge.

    Example:
        >>> import torch
        >>> from distset.fixed_point import fixed_point
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> solution = fixed_point(lambda x: a * torch.cos(x), torch.zeros(1, dtype=torch.float64))
        >>> bool(solution.converged), round(solution.value.item(), 4)
        (True, 0.4502)
        >>> solution.value.sum().backward()
        >>> round(a.grad.item(), 3)  # cos(x) / (1 + a sin(x)), not the cos(x) of one step
        0.739
    """
    grad = Implicit() if grad is None else grad
    stop = Stop() if stop is None else stop
    _check_call(x0, grad, stop, event_ndim)
    solution = grad.solve(step, x0, Plain() if iteration is None else iteration, stop, event_ndim)
    if isinstance(grad, Unrolled) or not (advice := solution.advice()):
        return solution
    if throw:
        raise RuntimeError(f"fixed_point: {advice}")
    warnings.warn(f"fixed_point: {advice}", FixedPointWarning, stacklevel=2)
    return solution


def lipschitz(
    step: Step, x: Tensor, *, iterations: int = 30, event_ndim: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """An estimate (from below) of the map's Lipschitz constant at ``x``: its Jacobian's largest singular value, per set.

    Power iteration on ``J^T J`` by products with vectors alone. A map is a contraction if the constant stays below 1 at
    every point: try several as a batch.

    Args:
        step: as in `fixed_point`, twice differentiable by autograd; the constant of a map without a derivative is 0.
        x: points ``(*, N)``.
        iterations: of the power method.
        event_ndim: as in `fixed_point`.
        generator: of the first direction.

    Returns:
        ``(*)``.

    Raises:
        ValueError: for a map whose derivative autograd cannot differentiate again.
    """
    flat = torch.zeros(x.shape[: x.dim() - event_ndim], dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        fz = step(z)
        if not fz.requires_grad:
            return flat
        w = torch.zeros_like(fz, requires_grad=True)
        (back,) = torch.autograd.grad(fz, z, w, create_graph=True, allow_unused=True)  # J^T w, linear in w
    if back is None:
        return flat
    v = torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu" if generator is None else generator.device)
    v = v.to(x.device)
    norm = torch.ones((), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        v = v / _expand(safe(_norm(v, event_ndim)), event_ndim)
        jv = _pushed(back, w, v)
        norm = _norm(jv, event_ndim)
        (v,) = torch.autograd.grad(fz, z, jv, retain_graph=True)
    return norm


def _pushed(back: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """``J v``, the derivative of ``back = J^T w`` in w."""
    try:
        return torch.autograd.grad(back, w, v, retain_graph=True)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"step: its derivative cannot be differentiated again ({error}), wanted a map made of operations that "
            f"autograd differentiates twice; write its autograd.Function without once_differentiable, or leave it out"
        ) from error


def _iterate(step: Step, x0: Tensor, iteration: Iteration, stop: Stop, event_ndim: int) -> tuple[Solution, Tensor]:
    """Iterate without a graph; the solution (one step behind the point) and the point where each set stopped."""
    with torch.no_grad():
        x, advance = x0.detach(), iteration.start()
        trace: list[Tensor] = []
        progress = _Progress(x, stop, event_ndim)
        while True:
            fx = step(x)
            if not trace:
                _check_first(x, fx)
            running = progress.update(x, fx)
            trace.append(progress.residual)
            if not bool(running.any()) or len(trace) == stop.max_steps:
                break
            x = torch.where(_expand(running, event_ndim), _flat(advance, x, fx, event_ndim), progress.point)
        return progress.solution(torch.stack(trace)), progress.point


class _Progress:
    """Who has stopped, where and why. Cycles are found as Brent does: one remembered point, moved at powers of two."""

    def __init__(self, x: Tensor, stop: Stop, event_ndim: int) -> None:
        batch = x.shape[: x.dim() - event_ndim]
        self.stop, self.event_ndim, self.count = stop, event_ndim, 0
        self.point = self.value = self.mark = x
        self.mark_count = 0
        self.mark_residual = torch.full(batch, torch.inf, dtype=x.dtype, device=x.device)
        self.residual = self.mark_residual
        self.status = torch.full(batch, -1, dtype=torch.int64, device=x.device)
        self.iterations, self.period = torch.zeros_like(self.status), torch.zeros_like(self.status)

    def update(self, x: Tensor, fx: Tensor) -> Tensor:
        """Take in one evaluation; returns which sets still run."""
        self.count += 1
        running = self.status < 0
        residual = _rms(fx - x, self.event_ndim)
        finite = residual.isfinite()
        tolerance = self.stop.atol + self.stop.rtol * _rms(x, self.event_ndim)
        converged = residual <= tolerance
        back = _rms(x - self.mark, self.event_ndim) <= torch.minimum(tolerance, 1e-3 * residual)
        same_pace = residual >= (1 - 1e-4) * self.mark_residual  # a contraction that swings slows down
        cycle = back & same_pace & ~converged if self.count > self.mark_count + 1 else torch.zeros_like(converged)
        good = running & finite
        self.point = torch.where(_expand(good, self.event_ndim), x, self.point)
        # The first value is finite, even where so far from x0 that the residual is not.
        self.value = torch.where(_expand(good | (self.count == 1), self.event_ndim), fx, self.value)
        self.residual = torch.where(good, residual, self.residual)
        self.iterations = torch.where(running, self.count, self.iterations)
        self.period = torch.where(good & cycle, self.count - self.mark_count, self.period)
        # The last one holds: far out a residual is within its tolerance where both are infinite.
        for status, where in ((Status.CYCLE, cycle), (Status.CONVERGED, converged), (Status.DIVERGED, ~finite)):
            self.status = torch.where(running & where, status, self.status)
        if self.count & (self.count - 1) == 0:
            self.mark, self.mark_count, self.mark_residual = x, self.count, residual
        return self.status < 0

    def solution(self, trace: Tensor) -> Solution:
        status = torch.where(self.status < 0, Status.NOT_CONVERGED, self.status)
        return Solution(self.value, status, self.residual, self.iterations, self.period, trace)


class _Implicit(torch.autograd.Function):
    """Identity on the step at the solution z; its backward replaces the cotangent g by ``(I - J^T)^-1 g``.

    The products with J go through the graph of that same step, before it hands the parameters their gradient.
    """

    @staticmethod
    def forward(ctx: Any, fx: Tensor, solver: Any, event_ndim: int, graph: tuple[Tensor, Tensor]) -> Tensor:
        ctx.job = (solver, event_ndim, graph)
        return fx.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        solver, event_ndim, (fz, z) = ctx.job
        return _solve_cotangent(fz, z, cotangent, solver, event_ndim), None, None, None


def _solve_cotangent(fz: Tensor, z: Tensor, cotangent: Tensor, solver: Any, event_ndim: int) -> Tensor:
    batch = z.shape[: z.dim() - event_ndim]

    def vjp(u_BN: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(fz, z, u_BN.reshape(z.shape), retain_graph=True, allow_unused=True)
        return torch.zeros_like(u_BN) if product is None else product.reshape(u_BN.shape)

    g_BN = cotangent.reshape(batch.numel(), -1)
    u_BN = solver(vjp, g_BN)
    error_B = (u_BN - vjp(u_BN) - g_BN).norm(dim=-1) / safe(g_BN.norm(dim=-1))
    bad_B = ~u_BN.isfinite().all(-1)
    tol = 10 * attainable(getattr(solver, "tol", 1e-6), g_BN.dtype)
    if bool((failed := bad_B | ~(error_B <= tol)).any()):
        fallback = f"; {int(bad_B.sum())} of them are not finite and take the one-step gradient" if bad_B.any() else ""
        warnings.warn(
            f"Implicit: {solver} left a relative residual up to {error_B.nan_to_num(torch.inf).max().item():.2g} in "
            f"{int(failed.sum())} of {len(failed)} sets{fallback}; raise its max_steps or tol, or use GMRES() or Dense()",
            FixedPointWarning,
            stacklevel=2,
        )
    return torch.where(bad_B.unsqueeze(-1), g_BN, u_BN).reshape(cotangent.shape)


def _learns(fz: Tensor, z: Tensor) -> bool:
    """Whether the step depends on a leaf that wants a gradient, beside z."""
    pending, seen = [fz.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not z:
            return True
        pending += [parent for parent, _ in node.next_functions]
    return False


def _flat(advance: Callable[[Tensor, Tensor], Tensor], x: Tensor, fx: Tensor, event_ndim: int) -> Tensor:
    lead = x.shape[: x.dim() - event_ndim]
    return advance(x.reshape(*lead, -1), fx.reshape(*lead, -1)).reshape(x.shape)


def _norm(x: Tensor, event_ndim: int) -> Tensor:
    return x.abs() if event_ndim == 0 else torch.linalg.vector_norm(x, dim=tuple(range(-event_ndim, 0)))


def _rms(x: Tensor, event_ndim: int) -> Tensor:
    return _norm(x, event_ndim) / x.shape[x.dim() - event_ndim :].numel() ** 0.5


def _expand(x: Tensor, event_ndim: int) -> Tensor:
    return x.reshape(*x.shape, *(1,) * event_ndim)


def _check_call(x0: Tensor, grad: Any, stop: Stop, event_ndim: int) -> None:
    if isinstance(grad, type) or not hasattr(grad, "solve"):
        raise ValueError(f"grad: got {grad!r}, wanted a strategy (not its class or name), such as Implicit()")
    if not isinstance(x0, Tensor):
        raise ValueError(f"x0: got {type(x0).__name__}, wanted a tensor (*, N)")
    if not x0.is_floating_point():
        raise ValueError(f"x0: got {x0.dtype}, wanted floating-point numbers; use x0.float()")
    if not 0 <= event_ndim <= x0.dim() or x0.numel() == 0:
        raise ValueError(f"x0: got shape {tuple(x0.shape)} with event_ndim {event_ndim}, wanted (*, N) with N of that many")
    if stop.max_steps < 1 or stop.atol < 0 or stop.rtol < 0:
        raise ValueError(f"stop: got {stop}, wanted max_steps >= 1 and tolerances >= 0")


def _check_step(x: Tensor, fx: Any) -> None:
    if not isinstance(fx, Tensor):
        raise ValueError(f"step: returned {type(fx).__name__}, wanted the tensor that x goes to")
    if fx.shape != x.shape or fx.dtype != x.dtype:
        raise ValueError(
            f"step: made {fx.dtype} {tuple(fx.shape)} of {x.dtype} {tuple(x.shape)}, wanted the same shape and type; give "
            f"x0 the type that the map works in"
        )


def _check_first(x: Tensor, fx: Tensor) -> None:
    _check_step(x, fx)
    if not bool(fx.isfinite().all()):
        raise ValueError("step: is not finite at x0 already; look for NaN or inf in its inputs and parameters")


def _check_repeats(before: Tensor, now: Tensor) -> None:
    scale = before.abs().amax() if before.numel() else before.sum()
    if bool((now.detach() - before).abs().amax() > 1e-2 * scale + 1e-6):
        raise ValueError(
            "step: gave another value at the same point; draw what is random once, outside of the map, and put dropout "
            "in eval mode"
        )
