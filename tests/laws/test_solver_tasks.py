"""Globe tours and terrain paths: their data, their gradients, and (slow) that they learn."""

import numpy as np
import pytest
import torch

from distset.noise import TwoPoint
from distset.solve import Blackbox, Identity
from distset.solvers import ShortestPath, Tour
from distset.tasks import globe_tsp, terrain


@pytest.fixture(scope="module")
def made_globe():
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator), dim=-1)
    return globe_tsp.Globe(torch.rand(12, 3, 20, 40, generator=generator), points)


@pytest.fixture(scope="module")
def flags(data_folder):
    path = data_folder / "flags_capitals" / "flags_40x20.npz"
    if not path.is_file():
        pytest.skip(f"no flags at {path}")
    return globe_tsp.Globe.read(path)


def test_combinations_are_different_countries_and_a_pure_function_of_the_seed(made_globe):
    drawn = made_globe.combinations(200, 5, seed=1)
    assert drawn.shape == (200, 5)
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(drawn, made_globe.combinations(200, 5, seed=1))
    assert not torch.equal(drawn, made_globe.combinations(200, 5, seed=2))


def test_chords_and_tours(made_globe):
    countries = made_globe.combinations(6, 5, seed=0)
    points = made_globe.points[countries]
    torch.testing.assert_close(globe_tsp.chords(points), torch.cdist(points, points), atol=1e-3, rtol=1e-4)
    tours = made_globe.tours(countries)
    assert Tour().feasible(tours.numpy()).all()
    assert globe_tsp.hamming(tours, tours) == 0
    assert globe_tsp.perfect(tours, tours) == 1
    twin = torch.zeros(1, 4, 3, requires_grad=True)
    globe_tsp.chords(twin).sum().backward()
    assert (twin.grad == 0).all()


def test_the_network_sees_each_flag_once_and_gets_a_gradient(made_globe):
    model = globe_tsp.GlobeTour(globe_tsp.FlagLocator(), Identity())
    seen = []
    model.locator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    countries = made_globe.combinations(20, 5, seed=0)
    truth = made_globe.tours(countries)
    loss = globe_tsp.hamming(model(made_globe.flags, countries), truth)
    loss.backward()
    assert seen == [12]
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any((p.grad != 0).any() for p in model.parameters())


def test_reading_flags(tmp_path):
    flags = np.random.default_rng(0).integers(0, 255, (4, 20, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "flags.npz", flags=flags, lonlat=np.array([[0, 0], [90, 0], [0, 90], [180, 0]], np.float32))
    globe = globe_tsp.Globe.read(tmp_path / "flags.npz", countries=None)
    assert globe.flags.shape == (4, 3, 20, 40)
    torch.testing.assert_close(globe.points.norm(dim=1), torch.ones(4))
    wanted = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    assert (torch.cdist(globe.points, wanted).amin(1) < 1e-6).all()
    with pytest.raises(ValueError, match="countries: got 5, wanted at most 4"):
        globe_tsp.Globe.read(tmp_path / "flags.npz", countries=5)
    np.savez(tmp_path / "other.npz", flags=flags)
    with pytest.raises(ValueError, match=r"has no array .*lonlat"):
        globe_tsp.Globe.read(tmp_path / "other.npz")


def test_maps_are_a_pure_function_of_the_seed_and_their_paths_are_the_best():
    maps = terrain.draw_maps(8, 12, seed=3)
    assert maps.pictures.shape == (8, 3, 96, 96)
    assert ((maps.pictures >= 0) & (maps.pictures <= 1)).all()
    assert all(torch.equal(a, b) for a, b in zip(maps, terrain.draw_maps(8, 12, seed=3)))
    assert torch.equal(maps.paths, torch.from_numpy(ShortestPath().solve(maps.costs.numpy())))
    assert len(maps.costs.unique()) == 5
    assert terrain.cost_ratio(maps.paths, maps) == 1
    assert terrain.path_loss(maps.paths, maps.paths) == 0
    straight = torch.eye(12).expand(8, 12, 12)
    assert terrain.cost_ratio(straight, maps) > 1
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
    np.save(tmp_path / "test_shortest_paths.npy", maps.paths[:2].byte().numpy())
    with pytest.raises(ValueError, match="maps, weights and paths of shapes"):
        terrain.read_maps(tmp_path, "test")


def test_a_few_steps_on_maps_lower_the_loss():
    maps = terrain.draw_maps(32, 8)
    one, three = (terrain.train(maps, maps, Identity(), epochs=epochs, batch=16, lr=3e-3) for epochs in (1, 3))
    assert len(three.ratio) == 3
    assert three.ratio[0] == one.ratio[0]  # a run is a pure function of its seed
    assert three.ratio[-1] <= three.ratio[0]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "most"), [(Identity(), 1.01), (Blackbox(20.0, projection="norm"), 1.01)], ids=str)
def test_terrain_paths_cost_within_a_hundredth_of_the_best(strategy, most):
    maps, unseen = terrain.draw_maps(1000, 12, seed=0), terrain.draw_maps(200, 12, seed=1)
    assert terrain.train(maps, unseen, strategy, epochs=15, lr=3e-3).ratio[-1] <= most


@pytest.mark.slow
def test_globe_tours_with_noise_are_better_than_bare(flags):
    """400 steps: far from the published 99.7 %, and enough to tell them apart."""
    noisy = globe_tsp.train(flags, Identity(margin=TwoPoint(0.2)), examples=2000, epochs=10)
    bare = globe_tsp.train(flags, Identity("none"), examples=2000, epochs=10)
    assert noisy.accuracy[-1] > 0.55
    assert bare.accuracy[-1] < 0.45
