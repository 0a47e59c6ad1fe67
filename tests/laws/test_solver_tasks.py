"""Tasks with a solver inside: their data, their gradients, and (slow) that they learn."""

import numpy as np
import pytest
import torch

from distset.noise import TwoPoint
from distset.problems import globe, keypoints, retrieval, terrain
from distset.seeds import seeded
from distset.sets import InMemory
from distset.solve import Blackbox, Identity
from distset.solvers import ShortestPath, Tour
from distset.tasks.globe_tsp import GlobeTask, chords, globe_task, hamming, perfect, squared
from distset.tasks.graph_matching import graph_matching_task, matcher, with_pairs
from distset.tasks.keypoints import matching_task
from distset.tasks.retrieval import retrieval_task
from distset.tasks.terrain import cost_ratio, path_loss, terrain_task
from distset.train import Example, Parts, Plan, fit, predict_all


@pytest.fixture(scope="module")
def made_globe():
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator), dim=-1)
    return globe.Globe(torch.rand(12, 3, 20, 40, generator=generator), points, torch.zeros(12, 2))


@pytest.fixture(scope="module")
def flags(data_folder):
    path = data_folder / "flags_capitals" / "flags_40x20.npz"
    if not path.is_file():
        pytest.skip(f"no flags at {path}")
    return str(path)


def learned(task, parts, *, epochs, batch, lr):
    """Test figures after training; the task's weights are drawn by the caller."""
    from distset.optim import Optimisation

    recipe = Optimisation(torch.optim.Adam, lr=lr, schedule="constant")
    fit(task, parts.train, parts.val, plan=Plan(epochs=epochs, batch=batch, monitor=None), optimisation=recipe)
    return task.metrics(*predict_all(task, parts.test))


def made(factory, **arguments):
    with seeded(0, torch.device("cpu")):
        return factory(**arguments)


def test_combinations_are_different_countries_and_a_pure_function_of_the_seed(made_globe):
    drawn = made_globe.combinations(200, 5, seed=1)
    assert drawn.shape == (200, 5)
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(drawn, made_globe.combinations(200, 5, seed=1))
    assert not torch.equal(drawn, made_globe.combinations(200, 5, seed=2))


def test_chords_and_tours(made_globe):
    countries = made_globe.combinations(6, 5, seed=0)
    points = made_globe.points[countries]
    torch.testing.assert_close(chords(points), torch.cdist(points, points), atol=1e-3, rtol=1e-4)
    tours = made_globe.tours(countries)
    assert Tour().feasible(tours.numpy()).all()
    other = made_globe.tours(countries.flip(0))
    assert hamming(tours, tours) == squared(tours, tours) == 0
    assert hamming(tours, other) == squared(tours, other) > 0
    found = tours.clone().requires_grad_()
    assert torch.autograd.grad(hamming(found, tours), found)[0].abs().min() > 0
    assert torch.autograd.grad(squared(found, tours), found)[0].abs().max() == 0  # what is right stays
    assert perfect(tours, tours) == 1
    twin = torch.zeros(1, 4, 3, requires_grad=True)
    chords(twin).sum().backward()
    assert (twin.grad == 0).all()


def test_chords_of_a_point_that_is_not_finite_are_not_finite_either():
    points = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    points[0, 1] = torch.nan
    lost = chords(points).isnan()
    assert lost[0, 1].all()
    assert lost[0, :, 1].all()
    assert lost.sum() == 7


def test_the_network_sees_each_flag_once_and_gets_a_gradient(made_globe):
    task = globe_task(size=(20, 40))
    seen = []
    task.model.locator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    countries = made_globe.combinations(20, 5, seed=0)
    examples = globe.Combinations(made_globe, countries, made_globe.tours(countries))
    task.batch_loss(list(examples), seed=0).backward()
    assert seen == [12]
    assert all(p.grad.isfinite().all() for p in task.model.parameters())
    assert any((p.grad != 0).any() for p in task.model.parameters())
    with torch.no_grad():
        together = task.model.costs(made_globe.flags[countries], countries)
        torch.testing.assert_close(task.model.costs(made_globe.flags[countries]), together, atol=1e-4, rtol=1e-4)


def test_noise_on_the_gradient_has_the_length_it_says(made_globe):
    countries = made_globe.combinations(50, 5, seed=0)
    examples = list(globe.Combinations(made_globe, countries, made_globe.tours(countries)))
    found = {}
    for level in (0.0, 1.0):
        task = made(globe_task, size=(20, 40), loss="hamming", gradient_noise=level, grad=Identity("none"))
        costs = []
        task.alarm = costs.append
        task.batch_loss(examples, seed=1)
        (costs[0].sum() * 0).backward(retain_graph=True)
        loss = task.batch_loss(examples, seed=1)
        found[level] = torch.autograd.grad(loss, costs[1])[0]
    noise = found[1.0] - found[0.0]
    assert noise.norm() / found[0.0].norm() == pytest.approx(1, rel=0.1)


def test_a_share_of_the_training_tours_can_be_wrong(tmp_path):
    path = tmp_path / "flags.npz"
    rng = np.random.default_rng(0)
    lonlat = rng.uniform(-80, 80, (9, 2)).astype(np.float32)
    np.savez(path, flags=rng.integers(0, 255, (9, 20, 40, 3), dtype=np.uint8), lonlat=lonlat)
    sizes = {"countries": None, "combinations": (400, 3, 3)}
    clean, other = globe.globe(str(path), **sizes), globe.globe(str(path), corrupted=0.5, **sizes)
    same = (clean.train.tours == other.train.tours).flatten(1).all(1).double().mean().item()
    assert 0.45 < same < 0.62  # half are untouched, and one order of twelve gives the same tour
    assert Tour().feasible(other.train.tours.numpy()).all()
    assert torch.equal(clean.test.tours, other.test.tours)


def test_reading_flags(tmp_path):
    flags = np.random.default_rng(0).integers(0, 255, (4, 20, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "flags.npz", flags=flags, lonlat=np.array([[0, 0], [90, 0], [0, 90], [180, 0]], np.float32))
    world = globe.Globe.read(tmp_path / "flags.npz", countries=None)
    assert world.flags.shape == (4, 3, 20, 40)
    torch.testing.assert_close(world.points.norm(dim=1), torch.ones(4))
    wanted = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    assert (torch.cdist(world.points, wanted).amin(1) < 1e-6).all()
    for countries in (5, 2, -1):
        with pytest.raises(ValueError, match=f"countries: got {countries}, wanted at least 3 and at most 4"):
            globe.Globe.read(tmp_path / "flags.npz", countries=countries)
    twice = np.concatenate([flags, flags[:1] ^ 1])  # another country with the flag of the first
    np.savez(tmp_path / "twice.npz", flags=twice, lonlat=np.arange(10, dtype=np.float32).reshape(5, 2))
    assert sorted(globe.Globe.read(tmp_path / "twice.npz", countries=4).lonlat[:, 0].tolist()) == [0, 2, 4, 6]
    np.savez(tmp_path / "other.npz", flags=flags)
    with pytest.raises(ValueError, match=r"has no array .*lonlat"):
        globe.Globe.read(tmp_path / "other.npz")


@pytest.mark.parametrize("k", [2, 7, 3.5])
def test_a_tour_is_of_three_countries_at_least_and_of_all_at_most(made_globe, k):
    with pytest.raises(ValueError, match=rf"k: got {k}, wanted a whole number of at least 3 and at most 6"):
        globe.Globe(*(part[:6] for part in made_globe)).combinations(4, k, seed=0)


@pytest.mark.parametrize("corrupted", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(corrupted):
    with pytest.raises(ValueError, match=f"corrupted: got {corrupted}, wanted a share"):
        globe.globe("unread", corrupted=corrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lonlat": np.zeros((3, 2))}, r"flags of shape \(4, 5, 6, 3\) and lonlat of shape \(3, 2\), wanted"),
        ({"lonlat": np.zeros((4, 3))}, r"lonlat of shape \(4, 3\), wanted"),
        ({"flags": np.zeros((4, 5, 6), np.uint8)}, r"flags of shape \(4, 5, 6\)"),
        ({"flags": np.zeros((4, 5, 6, 3))}, "flags of torch.float64, wanted torch.uint8"),
        ({"lonlat": np.array([[0, 0], [1, 1], [2, np.nan], [3, 3]])}, r"lonlat \[2.0, nan\] in row 2, wanted degrees"),
    ],
)
def test_a_file_of_flags_that_do_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "flags.npz"
    np.savez(path, **({"flags": np.zeros((4, 5, 6, 3), np.uint8), "lonlat": np.zeros((4, 2))} | change))
    with pytest.raises(ValueError, match=rf"^path: {path} has .*{message}"):
        globe.Globe.read(path)


def test_maps_are_a_pure_function_of_the_seed_and_their_paths_are_the_best():
    maps = terrain.draw_maps(8, 12, seed=3)
    assert maps.pictures.shape == (8, 3, 96, 96)
    assert ((maps.pictures >= 0) & (maps.pictures <= 1)).all()
    assert all(torch.equal(a, b) for a, b in zip(maps, terrain.draw_maps(8, 12, seed=3)))
    assert torch.equal(maps.paths, torch.from_numpy(ShortestPath().solve(maps.costs.numpy())))
    assert len(maps.costs.unique()) == 5
    assert cost_ratio(maps.paths, maps.costs, maps.paths) == 1
    assert path_loss(maps.paths, maps.paths) == 0
    straight = torch.eye(12).expand(8, 12, 12)
    assert cost_ratio(straight, maps.costs, maps.paths) > 1
    with pytest.raises(ValueError, match="size: got 3"):
        terrain.draw_maps(2, 3)


def test_reading_published_maps(tmp_path):
    maps = terrain.draw_maps(3, 12)
    np.save(tmp_path / "test_maps.npy", (maps.pictures * 255).byte().permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "test_vertex_weights.npy", maps.costs.half().numpy())
    with pytest.raises(ValueError, match=r"no file .*test_shortest_paths.npy"):
        terrain.read_maps(tmp_path, "test")
    np.save(tmp_path / "test_shortest_paths.npy", maps.paths.byte().numpy())
    found = terrain.read_maps(tmp_path, "test")
    torch.testing.assert_close(found.pictures, maps.pictures, atol=1 / 255, rtol=0)
    assert torch.equal(found.paths, maps.paths)


@pytest.mark.parametrize(
    "change",
    [
        {"maps": np.zeros((2, 48, 48, 3), np.uint8)},
        {"shortest_paths": np.ones((2, 6, 6))},
        {"maps": np.zeros((2, 48, 48, 3), np.uint8), "shortest_paths": np.ones((2, 6, 6))},
        {"maps": np.zeros((3, 3, 48, 48), np.uint8)},
        {"maps": np.zeros((3, 48, 40, 3), np.uint8)},
        {"vertex_weights": np.ones((3, 36)), "shortest_paths": np.ones((3, 36))},
    ],
)
def test_published_maps_that_do_not_fit_are_refused(tmp_path, change):
    fit = {
        "maps": np.zeros((3, 48, 48, 3), np.uint8),
        "vertex_weights": np.ones((3, 6, 6)),
        "shortest_paths": np.ones((3, 6, 6)),
    }
    for name, array in (fit | change).items():
        np.save(tmp_path / f"test_{name}.npy", array)
    with pytest.raises(
        ValueError, match=r"^folder: .* has test maps, weights and paths of shapes \(.*wanted \(B, 8 H, 8 W, 3\)"
    ):
        terrain.read_maps(tmp_path, "test")


@pytest.mark.parametrize("neighbours", [4, 8])
def test_true_paths_step_to_the_neighbours_that_found_ones_do(neighbours):
    parts = terrain.drawn((4, 1, 1), size=6, neighbours=neighbours)
    assert ShortestPath(neighbours).feasible(torch.cat([example.target[1] for example in parts.train]).numpy()).all()
    made(terrain_task, neighbours=neighbours).batch_loss(list(parts.train), seed=0).backward()


def test_diagonal_paths_are_none_to_four_neighbours():
    parts = terrain.drawn((4, 1, 1), size=6)
    with pytest.raises(ValueError, match=r"target: got a true path .* that is none to ShortestPath\(neighbours=4"):
        made(terrain_task, neighbours=4).batch_loss(list(parts.train), seed=0)


def test_a_few_steps_on_maps_lower_the_loss():
    parts = terrain.drawn((32, 8, 8), size=8)
    untrained, trained = (learned(made(terrain_task), parts, epochs=epochs, batch=16, lr=3e-3)["loss"] for epochs in (1, 8))
    assert trained < untrained


def test_retrieval_learns_classes_it_has_not_met():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 16
    x = torch.randn(16, 12, generator=generator)[labels] + 0.5 * torch.randn(800, 12, generator=generator)
    x[:, 6:] += 4 * torch.randn(800, 6, generator=generator)  # half of the features only disturb
    known = labels < 8
    train = [Example(InMemory(x[known][i : i + 1], name=str(i)), labels[known][i : i + 1]) for i in range(int(known.sum()))]
    held = [Example(InMemory(x[~known]), labels[~known])]
    task = made(retrieval_task, shape=(12,), width=8)
    before = task.metrics(*predict_all(task, held))["recall@1"]
    parts = Parts(train, [], held, {})
    assert learned(task, parts, epochs=40, batch=100, lr=3e-3)["recall@1"] > before + 0.2


def test_images_held_out_are_of_other_classes(data_folder):
    folder = data_folder / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no idx files at {folder}")
    parts = retrieval.digits(str(folder), images=50, tested=40)
    assert {int(example.target) for example in parts.train} <= {0, 1, 2, 3, 4}
    assert set(parts.val[0].target.tolist()) <= {0, 1, 2, 3, 4}
    assert set(parts.test[0].target.tolist()) <= {5, 6, 7, 8, 9}
    assert parts.train[0].set.elements.shape == (1, 1, 28, 28)
    assert parts.facts == {"shape": (1, 28, 28)}


def test_clouds_match_up_to_turning_and_noise():
    points, match = keypoints.draw_clouds(50, 8, 3, 0.0, seed=0)
    first, second = points[:, :8], points[:, 8:]
    assert (match.sum(2) == 1).all()
    assert match.sum(1).max() == 1
    matched = match @ second
    torch.testing.assert_close(torch.cdist(matched, matched), torch.cdist(first, first), atol=1e-3, rtol=1e-3)


def test_keypoints_are_learned_and_the_description_does_not_see_turning():
    parts = keypoints.clouds((300, 100, 100), n=6, outliers=1, noise=0.01)
    found = learned(made(matching_task, **parts.facts), parts, epochs=4, batch=30, lr=3e-3)
    assert found["accuracy"] > 0.5  # by chance one in seven
    task = made(matching_task, n=6)
    points = parts.test[0].set.elements[:, :6]
    turned = points @ torch.tensor([[0.0, -1.0], [1.0, 0.0]]).T
    torch.testing.assert_close(task.model(points), task.model(turned), atol=1e-4, rtol=1e-4)


def test_pairs_of_points_are_matched_where_points_alone_say_nothing():
    """Point costs of 0: the true match has every pair on its like, counted pair by pair."""
    _, match = keypoints.draw_clouds(20, 5, 1, 0.0, seed=0)
    parts = keypoints.clouds((4, 4, 20), n=5, outliers=1, noise=0.0)
    task = made(graph_matching_task, **parts.facts)
    with torch.no_grad():
        for parameter in task.model.points.parameters():
            parameter.zero_()
        found, costs = task.predict(parts.test[0].set)
    solver = matcher(5, 6)
    assert (solver.unpack(costs)[0] == 0).all()
    assert ((solver.unpack(found)[0] * parts.test[0].target).sum((1, 2)) / 5).mean() > 0.9
    node, edge = solver.unpack(with_pairs(solver, match))
    assert torch.equal(node, match)
    onto = match.argmax(2)
    for row in range(20):
        for e, (a, b) in enumerate(solver.first):
            (f,) = np.flatnonzero((solver.second == [int(onto[row, a]), int(onto[row, b])]).all(1))
            assert edge[row, e].argmax() == f
            assert edge[row, e].sum() == 1


def test_graph_matching_is_learned():
    parts = keypoints.clouds((200, 10, 150), n=5, outliers=2, noise=0.15)
    task = made(graph_matching_task, **parts.facts)
    before = task.metrics(*predict_all(task, parts.test))
    found = learned(task, parts, epochs=3, batch=25, lr=3e-3)
    assert found["accuracy"] > before["accuracy"] + 0.05
    assert found["collapsed"] == 0


def test_keypoint_files(tmp_path):
    first, second = np.random.default_rng(0).random((10, 4, 3)), np.random.default_rng(1).random((10, 5, 3))
    np.savez(tmp_path / "pairs.npz", first=first, second=second, match=np.tile(np.arange(4), (10, 1)))
    parts = keypoints.keypoints(str(tmp_path / "pairs.npz"))
    assert parts.facts == {"n": 4, "features": 1}
    assert [sum(len(example.target) for example in part) for part in parts[:3]] == [6, 2, 2]
    np.savez(tmp_path / "bad.npz", first=first, second=second, match=np.full((10, 4), 7))
    with pytest.raises(ValueError, match="matches points from 7 to 7, wanted 0 to 4"):
        keypoints.keypoints(str(tmp_path / "bad.npz"))


PAIRS = {"first": np.zeros((6, 3, 2)), "second": np.zeros((6, 4, 2)), "match": np.tile(np.arange(3), (6, 1))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": np.zeros((6, 4, 5))}, r"has shapes \(6, 3, 2\), \(6, 4, 5\), \(6, 3\), wanted .* as wide"),
        ({"second": np.zeros((5, 4, 2))}, r"has shapes \(6, 3, 2\), \(5, 4, 2\), \(6, 3\), wanted"),
        ({"first": np.zeros((6, 3, 1)), "second": np.zeros((6, 4, 1))}, r"has shapes \(6, 3, 1\)"),
        ({"match": np.full((6, 3), 0.5)}, "matches points from 0.5 to 0.5, wanted 0 to 3, whole numbers"),
        ({"match": np.tile([0, 1, 1], (6, 1))}, r"matches \[0, 1, 1\] in pair 0, wanted each point of the second once"),
        ({"first": np.full((6, 3, 2), np.nan)}, "has points of first in pair 0 that are NaN or infinite"),
        ({"second": np.full((6, 4, 2), np.inf)}, "has points of second in pair 0 that are NaN or infinite"),
    ],
)
def test_a_file_of_keypoints_that_do_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "pairs.npz"
    np.savez(path, **(PAIRS | change))
    with pytest.raises(ValueError, match=rf"^path: {path} {message}"):
        keypoints.keypoints(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Identity(), Blackbox(20.0, projection="norm")], ids=str)
def test_terrain_paths_cost_within_a_hundredth_of_the_best(strategy):
    task = made(terrain_task, grad=strategy)
    assert learned(task, terrain.drawn(), epochs=15, batch=32, lr=3e-3)["cost_ratio"] <= 1.01


@pytest.mark.slow
def test_globe_tours_with_noise_are_better_than_bare(flags):
    """400 steps: far from the published 99.7 %, and enough to tell them apart."""
    parts = globe.globe(flags, combinations=(2000, 100, 1000))
    figures = {}
    for name, strategy in {"noise": Identity(margin=TwoPoint(0.2)), "bare": Identity("none")}.items():
        task: GlobeTask = made(globe_task, **parts.facts, grad=strategy)
        figures[name] = learned(task, parts, epochs=10, batch=50, lr=1e-3)["accuracy"]
    assert figures["noise"] > 0.55
    assert figures["bare"] < 0.45
