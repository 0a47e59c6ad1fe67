"""The long form of test_solvers.py: thousands of instances a solver, and TSPLIB's small instances."""

import itertools
import zipfile

import numpy as np
import pytest

from distset.solvers import Assignment, ExactGraphMatching, GraphMatching, MixedInteger, ShortestPath, Tour
from tests.reference.test_solvers import (
    KNAPSACK,
    brute_force,
    check_exact_matchings,
    check_mixed_programs,
    matchings,
    networkx_path_cost,
    on_a_sphere,
    tours,
)
from tests.reference.tsplib import distances

pytestmark = pytest.mark.slow
# Within the promise of the cutting planes (some 60 cities); the larger ones of the library are left to its own codes.
TSPLIB = ["burma14", "ulysses16", "gr17", "gr21", "ulysses22", "gr24", "fri26", "bayg29", "bays29", "dantzig42", "swiss42"]
TSPLIB += ["att48", "gr48", "hk48", "eil51", "berlin52", "brazil58"]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_3000_paths(neighbours):
    for shape in ((4, 4), (3, 7), (8, 8)):
        costs = rng(1).exponential(size=(1000, *shape))
        solver = ShortestPath(neighbours)
        paths = solver.solve(costs)
        assert solver.feasible(paths).all()
        ends = (0, 0), (shape[0] - 1, shape[1] - 1)
        wanted = [networkx_path_cost(cost, neighbours, *ends, np.zeros(shape, bool)) for cost in costs]
        np.testing.assert_allclose((paths * costs).sum((1, 2)), wanted, rtol=1e-12)


def test_5000_tours():
    for n in (4, 5, 6, 7, 8):
        costs = rng(n).normal(size=(1000, n, n))
        assert np.array_equal(Tour().solve(costs), brute_force(costs * ~np.eye(n, dtype=bool), tours(n)))


def test_1000_cut_tours():
    for n in (5, 6, 7):
        costs = rng(n).normal(size=(334, n, n))
        assert np.array_equal(Tour(dynamic=2).solve(costs), brute_force(costs * ~np.eye(n, dtype=bool), tours(n)))
    for n in (10, 13, 15):
        costs = on_a_sphere(40, n)
        both = [Tour(dynamic=dynamic).solve(costs) for dynamic in (15, 2)]
        np.testing.assert_allclose(*((costs * y).sum((1, 2)) for y in both), rtol=1e-12)


def test_3000_assignments():
    for n, m in ((5, 5), (4, 6), (6, 4)):
        short, long = sorted((n, m))
        columns = np.array(list(itertools.permutations(range(long), short)))
        structures = np.zeros((len(columns), short, long))
        structures[np.arange(len(columns))[:, None], np.arange(short), columns] = 1
        structures = structures if n <= m else structures.transpose(0, 2, 1)
        costs = rng(n).normal(size=(1000, n, m))
        assert np.array_equal(Assignment().solve(costs), brute_force(costs, structures))


def test_2000_programs():
    structures = [y for y in itertools.product((0, 1), repeat=4) if (KNAPSACK.A @ y <= KNAPSACK.ub).all()]
    costs = rng(2).normal(0.5, 1, size=(2000, 4))
    assert np.array_equal(MixedInteger(KNAPSACK, sense="max").solve(costs), brute_force(costs, structures, "max"))


def test_300_exact_matchings():
    solver = ExactGraphMatching((4, 4))
    costs = rng(3).normal(size=(300, solver.size))
    assert np.array_equal(solver.solve(costs), brute_force(costs, matchings(solver)))


def test_2000_exact_matchings_of_unequal_graphs():
    check_exact_matchings(2000, seed=7)


def test_2000_mixed_programs():
    check_mixed_programs(2000, seed=8)


def test_1000_heuristic_matchings():
    solver = GraphMatching((5, 5))
    costs = rng(4).normal(size=(1000, solver.size))
    best = (costs * brute_force(costs, matchings(solver))).sum(1)
    assert np.mean((costs * solver.solve(costs)).sum(1) <= best + 1e-9) > 0.9


@pytest.mark.parametrize("name", TSPLIB)
def test_tsplib_tours_are_as_short_as_the_best_known(name, data_folder):
    with zipfile.ZipFile(data_folder / "tsplib" / "tsplib.zip") as archive:
        names = {entry.rsplit("/", 1)[-1]: entry for entry in archive.namelist()}
        known = dict(line.split(":") for line in archive.read(names["solutions"]).decode().splitlines() if ":" in line)
        best = {key.strip(): int(value.split()[0]) for key, value in known.items()}
        distance = distances(archive.read(names[f"{name}.tsp"]).decode())
    tour = Tour().solve(distance[None])[0]
    assert (tour * distance).sum() / 2 == best[name]
