"""Each solver against brute force or an independent library, on seeded small instances."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from scipy.optimize import Bounds, LinearConstraint

from distset.solvers import (
    Assignment,
    ExactGraphMatching,
    GraphMatching,
    HeldKarp,
    MixedInteger,
    Ranking,
    ShortestPath,
    Status,
    TimeLimit,
    TopK,
    Tour,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def brute_force(costs, structures, sense="min"):
    """The best of all structures ``(V, *instance)`` for each instance."""
    flat = np.asarray(structures, float).reshape(len(structures), -1)
    values = costs.reshape(len(costs), -1) @ flat.T
    best = values.argmin(1) if sense == "min" else values.argmax(1)
    return flat[best].reshape(costs.shape)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (6, 3), (7, 7)])
def test_topk_is_the_best_subset(n, k):
    subsets = [v for v in itertools.product((0, 1), repeat=n) if sum(v) == k]
    costs = rng().normal(size=(1000, n))
    assert np.array_equal(TopK(k).solve(costs), brute_force(costs, subsets, "max"))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ranking_is_the_best_permutation(n):
    permutations = list(itertools.permutations(range(1, n + 1)))
    costs = rng().normal(size=(1000, n))
    assert np.array_equal(Ranking().solve(costs), brute_force(costs, permutations))


def test_ranking_is_scipys():
    costs = rng().normal(size=(200, 50))
    assert np.array_equal(Ranking().solve(costs), scipy.stats.rankdata(-costs, axis=-1))


def test_ties_go_to_the_lower_index():
    tied = np.array([[1.0, 2.0, 2.0, 1.0, 2.0]])
    assert TopK(2).solve(tied).tolist() == [[0, 1, 1, 0, 0]]
    assert TopK(4).solve(tied).tolist() == [[1, 1, 1, 0, 1]]
    assert Ranking().solve(tied).tolist() == [[4, 1, 2, 5, 3]]


@pytest.mark.parametrize("solver", [TopK(3), Ranking()], ids=repr)
def test_tensors_and_arrays_agree(solver):
    costs = rng().normal(size=(20, 9)).astype(np.float32)
    before = costs.copy()
    found = solver.solve(costs)
    assert found.dtype == np.float32
    assert np.array_equal(costs, before)
    assert np.array_equal(found, solver.solve_tensor(torch.from_numpy(costs)).numpy())
    assert solver.feasible(found).all()
    assert not solver.feasible(found + 1).any()
    assert solver.feasible_tensor(torch.from_numpy(found)).all()


@pytest.mark.parametrize("wrong", [-1, 0, 2.5, 2, 9, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("solver", [TopK(3), Ranking()], ids=repr)
def test_one_wrong_entry_is_no_structure(solver, wrong):
    found = solver.solve(np.arange(8.0)[None])
    found[0, 7] = wrong  # 1 for both: the highest score
    assert not solver.feasible(found)[0]


# Assignment


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (3, 5), (5, 3), (1, 6)])
def test_assignment_is_the_best_permutation(n, m):
    short, long = sorted((n, m))
    structures = []
    for columns in itertools.permutations(range(long), short):
        y = np.zeros((short, long))
        y[np.arange(short), columns] = 1
        structures.append(y if n <= m else y.T)
    costs = rng().normal(size=(500, n, m))
    found = Assignment().solve(costs)
    assert np.array_equal(found, brute_force(costs, structures))
    assert Assignment().feasible(found).all()
    assert not Assignment().feasible(1 - found).any()


# Shortest paths


def networkx_path_cost(cost, neighbours, start, end, walls):
    import networkx

    graph = networkx.DiGraph()
    shape = cost.shape
    for r, c in itertools.product(*map(range, shape)):
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            near = (r + i, c + j)
            inside = 0 <= near[0] < shape[0] and 0 <= near[1] < shape[1]
            if inside and (i, j) != (0, 0) and (neighbours == 8 or 0 in (i, j)) and not (walls[r, c] or walls[near]):
                graph.add_edge((r, c), near, weight=cost[near])
    if start == end:
        return cost[start]
    return cost[start] + networkx.dijkstra_path_length(graph, start, end)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize(
    ("shape", "start", "end"), [((5, 5), (0, 0), (4, 4)), ((3, 6), (2, 1), (0, 5)), ((2, 2), (0, 0), (0, 0))]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_paths_cost_what_networkx_finds(neighbours, shape, start, end, zeros):
    costs = rng().uniform(size=(60, *shape))
    costs *= (rng(1).uniform(size=costs.shape) < 0.6) if zeros else 1
    solver = ShortestPath(neighbours, start, end)
    paths = solver.solve(costs)
    assert solver.feasible(paths).all()
    found = (paths * costs).sum((1, 2))
    wanted = [networkx_path_cost(cost, neighbours, start, end, np.zeros(shape, bool)) for cost in costs]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_paths_around_walls():
    walls = np.zeros((6, 6), bool)
    walls[2, :5] = walls[4, 1:] = True
    costs = rng().uniform(0.1, 1, size=(60, 6, 6))
    for neighbours in (4, 8):
        solver = ShortestPath(neighbours, walls=walls)
        paths = solver.solve(np.where(walls, 0.0, costs))
        assert solver.feasible(paths).all()
        assert (paths[:, walls] == 0).all()
        wanted = [networkx_path_cost(cost, neighbours, (0, 0), (5, 5), walls) for cost in costs]
        np.testing.assert_allclose((paths * costs).sum((1, 2)), wanted, rtol=1e-12)


def test_paths_by_hand():
    corner = np.array([[[1.0, 1.0], [1.0, 1.0]]])
    assert ShortestPath(8).solve(corner).tolist() == [[[1, 0], [0, 1]]]
    assert ShortestPath(4).solve(corner).sum() == 3
    assert ShortestPath().solve(np.ones((1, 1, 1))).tolist() == [[[1]]]
    assert not ShortestPath(4).feasible(np.eye(2)[None]).any()
    assert not ShortestPath(8).feasible(np.zeros((1, 3, 3))).any()


@pytest.mark.parametrize("neighbours", [4, 8])
def test_what_a_path_may_look_like(neighbours):
    """Cells with too few neighbours, counted one by one, for masks in a batch that is mostly no path."""
    masks = (rng().uniform(size=(300, 4, 5)) < 0.7).astype(float)
    masks[:, 0, 0] = masks[:250, -1, -1] = 1
    masks[0, 1, 1] = 0.5

    def near(mask, cell):
        steps = [(i, j) for i, j in itertools.product((-1, 0, 1), repeat=2) if neighbours == 8 or abs(i) + abs(j) == 1]
        around = [(cell[0] + i, cell[1] + j) for i, j in steps if (i, j) != (0, 0)]
        return sum(mask[r, c] == 1 for r, c in around if 0 <= r < 4 and 0 <= c < 5)

    def good(mask):
        ends = ((0, 0), (3, 4))
        inside = all(near(mask, tuple(cell)) >= (1 if tuple(cell) in ends else 2) for cell in np.argwhere(mask == 1))
        return inside and all(mask[end] == 1 for end in ends) and np.isin(mask, (0, 1)).all()

    wanted = [good(mask) for mask in masks]
    assert 20 < sum(wanted) < 280
    assert ShortestPath(neighbours).feasible(masks).tolist() == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShortestPath(6), "neighbours: got 6, wanted 4 or 8"),
        (lambda: ShortestPath(walls=np.ones(3)), "walls: got shape"),
        (lambda: ShortestPath(walls=np.eye(3)), "walls: got a wall on the start"),
        (lambda: ShortestPath(walls=np.array([[0, 1, 0]] * 3)), "walls: they cut the end"),
        (lambda: ShortestPath(4, walls=np.fliplr(np.eye(3))), "walls: they cut the end"),
        (lambda: ShortestPath(end=(5, 0)).solve(np.ones((1, 3, 3))), r"end: got \(5, 0\), wanted a cell"),
        (lambda: ShortestPath().solve(-np.ones((1, 3, 3))), "cost: got -1, wanted costs of at least 0"),
        (lambda: ShortestPath().check_shape((3,)), r"wanted grids of shape \(H, W\)"),
        (lambda: Tour().check_shape((2, 2)), "at least 3 cities"),
        (lambda: Tour().check_shape((4, 5)), r"wanted \(n, n\)"),
        (lambda: Tour(dynamic=30), "dynamic: got 30"),
        (lambda: HeldKarp().solve(np.zeros((1, 17, 17))), "cost: got 17 cities, wanted at most 16"),
        (lambda: Assignment().check_shape((2,)), r"wanted matrices of shape \(n, m\)"),
        (lambda: GraphMatching((3, 2)), "nodes: got"),
        (lambda: GraphMatching((2, 2), ([[0, 2]], [[0, 1]])), "edges: got a node 2"),
        (lambda: GraphMatching((2, 2), ([[0, 0]], [[0, 1]])), "from a node to itself"),
        (lambda: GraphMatching((2, 2), ([[0, 1], [0, 1]], [[0, 1]])), "the same edge twice"),
        (lambda: GraphMatching((2, 2)).pack(torch.ones(2, 3), torch.ones(2, 2)), "node, edge: got shapes"),
        (lambda: GraphMatching((2, 2)).check_shape((3,)), "made by GraphMatching.pack"),
        (lambda: MixedInteger(KNAPSACK, sense="most"), "sense: got 'most'"),
        (lambda: MixedInteger(KNAPSACK).check_shape((2,)), r"wanted \(4,\), the columns"),
        (lambda: MixedInteger(LinearConstraint(np.ones((1, 2)), lb=3)).solve(np.ones((1, 2))), "HiGHS says: .* infeasible"),
        (
            lambda: MixedInteger(LinearConstraint(np.ones((1, 2)), lb=0), bounds=Bounds(-np.inf, np.inf)).solve(
                np.array([[1.0, -1.0]])
            ),
            "HiGHS says: .* unbounded",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Tours


def tours(n):
    """All adjacency matrices of round trips through n cities."""
    found = []
    for order in itertools.permutations(range(1, n)):
        if order[0] < order[-1] or n == 3:
            trip, y = [0, *order], np.zeros((n, n))
            y[trip, np.roll(trip, -1)] = y[np.roll(trip, -1), trip] = 1
            found.append(y)
    return found


@pytest.mark.parametrize("n", [3, 4, 5, 7])
def test_tours_are_the_best_of_all(n):
    costs = rng().normal(size=(400, n, n))  # neither symmetric nor positive
    wanted = brute_force(costs * ~np.eye(n, dtype=bool), tours(n))
    assert np.array_equal(Tour().solve(costs), wanted)
    assert np.array_equal(Tour(dynamic=2).solve(costs[:20]), wanted[:20])
    assert Tour().feasible(wanted).all()


def on_a_sphere(batch, n, seed=0):
    points = rng(seed).normal(size=(batch, n, 3))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    return np.arccos(np.clip(np.einsum("bik,bjk->bij", points, points), -1, 1))


@pytest.mark.parametrize("n", [9, 12])
def test_dynamic_program_and_cutting_planes_agree(n):
    costs = on_a_sphere(6, n)
    both = [Tour(dynamic=dynamic).solve(costs) for dynamic in (12, 2)]
    np.testing.assert_allclose(*((costs * y).sum((1, 2)) for y in both), rtol=1e-12)


def test_two_round_trips_are_no_tour():
    twice = np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3))[None]
    assert (twice.sum(2) == 2).all()
    assert not Tour().feasible(twice).any()


@pytest.mark.parametrize("longest", [1e2, 1e8, 1e12])
def test_a_road_that_is_far_too_long_hides_nothing(longest):
    costs = on_a_sphere(12, 9, seed=3) - 0.5
    costs[:, 0, 1] = costs[:, 1, 0] = longest
    found = Tour(dynamic=2).solve(costs)
    assert np.allclose((found * costs).sum((1, 2)), (HeldKarp().solve(costs) * costs).sum((1, 2)), atol=1e-9)


@pytest.mark.parametrize(("n", "seed"), [(9, 9), (14, 0), (14, 3), (24, 5)])
def test_a_tour_of_shortest_edges_alone_is_found(n, seed):
    random = np.random.default_rng(seed)
    order, more = random.permutation(n), random.uniform(size=(n, n)) < 0.08
    costs = np.where(more | more.T, 2.0, 3.0)[None]
    costs[0, order, np.roll(order, -1)] = costs[0, np.roll(order, -1), order] = 2.0
    assert (Tour(dynamic=2).solve(costs) * costs).sum() == 2 * n * 2.0


def test_paths_may_be_looked_for_by_many_threads():
    costs = np.random.default_rng(0).uniform(size=(64, 3, 6, 7))
    solver = ShortestPath()
    alone = [solver.solve(part) for part in costs]
    with ThreadPoolExecutor(4) as threads:
        assert np.array_equal(list(threads.map(ShortestPath().solve, costs)), alone)


def test_a_tour_at_the_time_limit_is_still_a_tour():
    solver = Tour(limit=TimeLimit(1e-4, "best"))
    costs = on_a_sphere(3, 20)
    solutions, status = solver.solve_status(costs)
    assert (status == Status.BEST_FOUND).all()
    assert solver.feasible(solutions).all()


# Graph matching


def matchings(solver):
    n, m = solver.nodes
    return np.stack([solver._vector(np.array(onto)) for onto in itertools.permutations(range(m), n)])


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5)])
def test_exact_matching_is_the_best_of_all(n, m):
    solver = ExactGraphMatching((n, m))
    costs = rng().normal(size=(8, solver.size))
    found = solver.solve(costs)
    assert np.array_equal(found, brute_force(costs, matchings(solver)))
    assert solver.feasible(found).all()


def some_edges(n, generator):
    """Directed edges of a random graph of n nodes, at least one."""
    pairs = np.argwhere(~np.eye(n, dtype=bool))
    return generator.permutation(pairs)[: generator.integers(1, min(len(pairs), 5) + 1)]


def check_exact_matchings(instances, seed):
    """Graphs of different sizes, a new pair for every 8 costs: the program against all matchings."""
    generator, met = rng(seed), set()
    for _ in range(instances // 8):
        m = int(generator.integers(2, 6))
        n = int(generator.integers(1, m))
        solver = ExactGraphMatching((n, m), (some_edges(n, generator) if n > 1 else [], some_edges(m, generator)))
        costs = generator.normal(size=(8, solver.size))
        found = solver.solve(costs)
        assert solver.feasible(found).all()
        assert np.array_equal(found, brute_force(costs, matchings(solver)))
        met.add((n, m))
    return met


def test_300_exact_matchings_of_unequal_graphs():
    assert check_exact_matchings(304, seed=5) == {(n, m) for m in range(2, 6) for n in range(1, m)}


def test_exact_matching_of_sparse_graphs():
    ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    solver = ExactGraphMatching((4, 4), (ring, ring[:, ::-1]))
    costs = rng().normal(size=(8, solver.size))
    assert np.array_equal(solver.solve(costs), brute_force(costs, matchings(solver)))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6)])
def test_heuristic_matching_is_mostly_the_best_and_never_far(n, m):
    solver = GraphMatching((n, m))
    costs = rng().normal(size=(300, solver.size))
    found = solver.solve(costs)
    assert solver.feasible(found).all()
    value, best = ((costs * y).sum(1) for y in (found, brute_force(costs, matchings(solver))))
    mean = np.stack([(costs @ matchings(solver).T).mean(1)])[0]
    assert (value >= best - 1e-9).all()
    assert np.mean(value <= best + 1e-9) > 0.9
    assert (((value - best) / (mean - best)).max()) < 0.5  # at worst half as far from the best as a random matching


def test_matching_finds_a_hidden_isomorphism():
    n, solver = 8, GraphMatching((8, 8))
    weights = rng().uniform(size=(20, n, n))
    hidden = np.stack([rng(i).permutation(n) for i in range(20)])
    moved = np.empty_like(weights)
    for w, p, out in zip(weights, hidden, moved):
        out[np.ix_(p, p)] = w
    first, second = solver.first.T, solver.second.T
    edge = np.abs(weights[:, first[0], first[1]][:, :, None] - moved[:, second[0], second[1]][:, None])
    cost = solver.pack(torch.zeros(20, n, n, dtype=torch.float64), torch.from_numpy(edge))
    nodes, _ = solver.unpack(torch.from_numpy(solver.solve(cost.numpy())))
    assert np.mean((nodes.argmax(-1).numpy() == hidden).all(1)) > 0.9


# Mixed-integer programs

KNAPSACK = LinearConstraint(np.array([[3.0, 4, 5, 6], [1, 1, 1, 0]]), ub=[9, 2])


def test_knapsacks_are_the_best_of_all():
    structures = [y for y in itertools.product((0, 1), repeat=4) if (KNAPSACK.A @ y <= KNAPSACK.ub).all()]
    costs = rng().normal(0.5, 1, size=(200, 4))
    solver = MixedInteger(KNAPSACK, sense="max")
    found = solver.solve(costs)
    assert np.array_equal(found, brute_force(costs, structures, "max"))
    assert solver.feasible(found).all()
    assert not solver.feasible(np.ones((1, 4))).any()
    assert np.array_equal(MixedInteger(KNAPSACK).solve(-costs), found)


def test_the_scale_of_costs_does_not_matter():
    costs = rng().normal(size=(20, 4))
    solver = MixedInteger(KNAPSACK)
    for scale in (1e-12, 1e12):
        assert np.array_equal(solver.solve(scale * costs), solver.solve(costs))


def test_mixed_programs_round_integers_only():
    solver = MixedInteger(
        LinearConstraint(np.array([[1.0, 1.0]]), ub=1.5), integrality=np.array([1, 0]), bounds=Bounds(0, 2), sense="max"
    )
    assert solver.solve(np.array([[2.0, 1.0], [1.0, 3.0]])).tolist() == [[1, 0.5], [0, 1.5]]
    assert solver.solve(np.array([[2, 1], [1, 3]])).tolist() == [[1, 0.5], [0, 1.5]]  # of whole costs too


def mixed_program(generator):
    """Two to four integers and one or two reals with bounds of their own, two to four rows of constraints; 0 is feasible."""
    integers, reals, rows = (int(generator.integers(*span)) for span in ((2, 5), (1, 3), (2, 5)))
    matrix = generator.normal(size=(rows, integers + reals)).round(2)
    upper = generator.uniform(0, 3, rows)
    lower = np.where(generator.random(rows) < 0.5, -generator.uniform(0, 3, rows), -np.inf)
    low, high = -generator.integers(0, 2, integers + reals), generator.integers(1, 3, integers + reals)
    integrality = generator.permutation([1] * integers + [0] * reals)
    return matrix, lower, upper, low, high, integrality


def best_by_enumeration(cost, matrix, lower, upper, low, high, integrality):
    """The least cost: for each choice of the integers that could be the best, a linear program of the reals."""
    whole, sides, best = integrality == 1, np.isfinite(lower), np.inf
    rows = np.concatenate([matrix, -matrix[sides]])
    ends = np.concatenate([upper, -lower[sides]])
    bounds = np.stack([low, high], 1)[~whole]
    choices = np.array(list(itertools.product(*(range(a, b + 1) for a, b in zip(low[whole], high[whole])))))
    least = choices @ cost[whole] + np.minimum(cost * low, cost * high)[~whole].sum()
    for choice, bound in sorted(zip(choices.tolist(), least), key=lambda pair: pair[1]):
        if bound >= best:
            break
        left = ends - rows[:, whole] @ choice
        found = scipy.optimize.linprog(cost[~whole], A_ub=rows[:, ~whole], b_ub=left, bounds=bounds)
        if found.success:
            best = min(best, cost[whole] @ choice + found.fun)
    return best


def check_mixed_programs(instances, seed):
    generator = rng(seed)
    for number in range(instances):
        matrix, lower, upper, low, high, integrality = program = mixed_program(generator)
        cost = generator.normal(size=len(low))
        sense, sign = (("min", 1), ("max", -1))[number % 2]
        cut = len(matrix) // 2
        parts = [LinearConstraint(matrix[own], lower[own], upper[own]) for own in (slice(cut), slice(cut, None))]
        solver = MixedInteger(parts, integrality=integrality, bounds=Bounds(low, high), sense=sense)
        (found,) = solver.solve(sign * cost[None])
        assert solver.feasible(found[None]).all()
        assert (found[integrality == 1] % 1 == 0).all()
        # HiGHS keeps rows and integers to 1e-6; a row's slack is worth its price, a few units of cost here.
        assert cost @ found == pytest.approx(best_by_enumeration(cost, *program), abs=1e-5)


def test_200_mixed_programs():
    check_mixed_programs(200, seed=6)


# Every solver


def every_solver():
    return [
        (TopK(3), (8,)),
        (Ranking(), (8,)),
        (Assignment(), (4, 6)),
        (ShortestPath(8), (6, 7)),
        (ShortestPath(4), (6, 7)),
        (Tour(), (7, 7)),
        (HeldKarp(), (7, 7)),
        (Tour(dynamic=2), (7, 7)),
        (GraphMatching((3, 4)), (GraphMatching((3, 4)).size,)),
        (ExactGraphMatching((3, 3)), (ExactGraphMatching((3, 3)).size,)),
        (MixedInteger(KNAPSACK, sense="max"), (4,)),
    ]


@pytest.mark.parametrize(("solver", "shape"), every_solver(), ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_types_and_inputs_are_kept(solver, shape, dtype):
    costs = rng().uniform(0.1, 1, size=(3, *shape)).astype(dtype)
    costs.flags.writeable = False
    found = solver.solve(costs)
    assert found.shape == costs.shape
    assert found.dtype == dtype
    assert np.array_equal(found[1:2], solver.solve(costs[1:2]))
    assert solver.solve(costs[:0]).shape == (0, *shape)
    assert solver.feasible(found).all()
