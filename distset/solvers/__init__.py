"""Combinatorial solvers: batches of costs in, batches of the best structures out; they know nothing of gradients."""

from distset.solvers.base import FunctionSolver, Solved, Solver, Status, TensorSolver, TimeLimit
from distset.solvers.ranking import Ranking
from distset.solvers.topk import TopK

__all__ = ["FunctionSolver", "Ranking", "Solved", "Solver", "Status", "TensorSolver", "TimeLimit", "TopK"]
