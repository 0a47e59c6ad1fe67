"""Combinatorial solvers: batches of costs in, batches of the best structures out; they know nothing of gradients."""

from distset.solvers.assignment import Assignment
from distset.solvers.base import FunctionSolver, Solved, Solver, Status, TensorSolver, TimeLimit
from distset.solvers.matching import ExactGraphMatching, GraphMatching
from distset.solvers.milp import MixedInteger
from distset.solvers.ranking import Ranking
from distset.solvers.shortest_path import ShortestPath
from distset.solvers.topk import TopK
from distset.solvers.tour import HeldKarp, Tour

__all__ = [
    "Assignment",
    "ExactGraphMatching",
    "FunctionSolver",
    "GraphMatching",
    "HeldKarp",
    "MixedInteger",
    "Ranking",
    "ShortestPath",
    "Solved",
    "Solver",
    "Status",
    "TensorSolver",
    "TimeLimit",
    "TopK",
    "Tour",
]
