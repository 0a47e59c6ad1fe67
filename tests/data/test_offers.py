"""Offers: the published laws, the registries with both rules, pickles refused."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from distset.choose import by_size, overlap
from distset.data.published_offers import published_gaussian_offers, published_moons_offers
from distset.data.registry import convert_features, cooccurrence, factors, read_features, read_registries, registry_offers
from distset.data.synthetic_offers import anomaly_offers, gaussian_offers, gaussian_ratio, moons_offers, moons_ratio
from distset.offers import Offers, check_offer


def jaccard_of(scores, offers):
    chosen = by_size(scores, offers.chosen.sum(-1)).chosen
    return float(overlap(chosen, offers.chosen)["jaccard"].mean())


def test_gaussian_offers_follow_the_published_law():
    offers = gaussian_offers(1000)
    check_offer(offers.elements, offers.chosen)
    assert (offers.chosen.sum(-1) == 10).all()
    majority = (offers.elements * ~offers.chosen.unsqueeze(-1)).sum(1) / 90
    side = majority.sign()
    assert (side[:, 0] == side[:, 1]).all()
    assert 400 < (side[:, 0] > 0).sum() < 600
    centred = offers.elements - side.unsqueeze(1) * torch.where(offers.chosen, -1.0, 1.0).unsqueeze(-1) / 2**0.5
    assert abs(float(centred.mean())) < 0.01
    assert abs(float(centred.std()) - 0.5) < 0.005
    ceiling = jaccard_of(-(offers.elements * side.unsqueeze(1)).sum(-1), offers)  # the true likelihood ratio
    assert abs(ceiling - 0.910) < 0.02


def test_moons_offers_lie_on_the_published_half_circles():
    offers = moons_offers(200)
    check_offer(offers.elements, offers.chosen)
    point = (offers.elements - torch.tensor([-1, -0.2])) / 2
    upper = (point.norm(dim=-1) - 1).abs()
    lower = ((point - torch.tensor([1.0, 0.5])).norm(dim=-1) - 1).abs()
    flip = (upper * ~offers.chosen).sum(1, keepdim=True) > (lower * ~offers.chosen).sum(1, keepdim=True)
    majority, minority = torch.where(flip, lower, upper), torch.where(flip, upper, lower)
    for own in (majority[~offers.chosen], minority[offers.chosen]):  # the radius is off by the noise alone
        assert abs(float(own.mean()) - 0.1 * (2 / torch.pi) ** 0.5) < 0.005


@pytest.mark.parametrize("name", ["gaussian", "moons"])
def test_published_offers_are_drawn_as_the_authors_loader_draws(name):
    """Offer by offer by the loader's own steps, with numpy's global stream; and the ceiling on the test part."""
    published = {"gaussian": published_gaussian_offers, "moons": published_moons_offers}[name]
    ratio = {"gaussian": gaussian_ratio, "moons": moons_ratio}[name]
    parts = published()
    state = np.random.get_state()
    np.random.seed(1)
    try:
        for number in range(1001 if name == "moons" else 3):
            if name == "gaussian":
                rows = [(np.random.randn(2) * 0.5, np.random.randint(2)) for _ in range(400)]
                kinds = np.array([kind for _, kind in rows])
                points = np.array([point + (1 - 2 * kind) / np.sqrt(2) for point, kind in rows])
            else:
                points, kinds = make_moons(n_samples=200, noise=0.1, random_state=number)
                points = points * 2 + np.array([-1, -0.2])
            label = np.random.randint(2)
            offer = points[kinds == 1 - label][:100]
            places = np.random.choice(list(range(100)), 10, replace=False)
            offer[places] = points[kinds == label][:10]
            found = parts[number // 1000]
            np.testing.assert_allclose(found.elements[number % 1000], offer, rtol=1e-5, atol=1e-6)
            assert sorted(places) == found.chosen[number % 1000].nonzero().flatten().tolist()
    finally:
        np.random.set_state(state)
    test = Offers(parts[2].elements[:300], parts[2].chosen[:300]) if name == "moons" else parts[2]
    ceiling = jaccard_of(torch.cat([ratio(x) for x in test.elements.split(100)]).float(), test)
    assert ceiling == pytest.approx({"gaussian": 0.9102, "moons": 0.9998}[name], abs=3e-4)
    with pytest.raises(ValueError, match="sets: got 1001, wanted 1 to 1000"):
        published(1001)


def test_seeds_make_the_offers():
    for make in (gaussian_offers, moons_offers):
        assert torch.equal(make(3, seed=1).elements, make(3, seed=1).elements)
        assert not torch.equal(make(3, seed=1).elements, make(3, seed=2).elements)
    with pytest.raises(ValueError, match="sets, size, chosen: got 5, 10, 10"):
        moons_offers(5, size=10, chosen=10)


def test_the_odd_ones_out_are_of_other_classes():
    elements, labels = torch.arange(60.0).view(60, 1), torch.arange(60) % 3
    offers = anomaly_offers(elements, labels, sets=20, size=8, chosen=(2, 3))
    kinds = labels[offers.elements.long().squeeze(-1)]
    for own, picked in zip(kinds, offers.chosen):
        assert len(own[~picked].unique()) == 1
        assert (own[picked] != own[~picked][0]).all()
    assert set(offers.chosen.sum(-1).tolist()) == {2, 3}
    with pytest.raises(ValueError, match="labels: no class has 28 elements"):
        anomaly_offers(elements, labels, sets=1, size=30, chosen=(2, 3))
    with pytest.raises(ValueError, match="chosen: got 0 to 3"):
        anomaly_offers(elements, labels, sets=1, size=8, chosen=(0, 3))
    with pytest.raises(ValueError, match="sets: got 0, wanted at least 1"):
        anomaly_offers(elements, labels, sets=0, size=8, chosen=(2, 3))


REGISTRIES = [[0, 1, 2], [1, 2, 3], [0, 4, 5, 6], [7, 8, 9], [2, 3, 4], [5, 8, 9]] * 5


@pytest.mark.parametrize("rest", ["random", "least-similar"])
def test_registries_become_offers_that_hold_them(rest):
    parts = registry_offers(REGISTRIES, rest=rest, size=8, features="ids")
    for offers in parts[:3]:
        check_offer(offers.elements, offers.chosen)
        assert rest in offers.rule
        items = offers.elements.argmax(-1)
        assert all(len(set(row.tolist())) == 8 for row in items)
        assert all(sorted(row[own].tolist()) in REGISTRIES for row, own in zip(items, offers.chosen))
    assert parts.popular.shape == parts.test.chosen.shape


def test_the_three_thirds_change_places_and_do_not_meet():
    tests = [registry_offers(REGISTRIES, rest="random", size=8, features="ids", fold=f).test for f in range(3)]
    assert sum(len(t.chosen) for t in tests) == len(REGISTRIES)


def test_the_least_similar_rest_is_the_least_similar():
    features = torch.eye(10)[:, :2] + torch.arange(10).unsqueeze(-1) * 0.01
    offers = registry_offers(REGISTRIES, rest="least-similar", size=8, features=features).train
    for row, own in zip(offers.elements, offers.chosen):
        mean = torch.nn.functional.normalize(row[own].mean(0), dim=-1)
        similarity = torch.nn.functional.normalize(row, dim=-1) @ mean
        left_out = [f for f in features if not (row == f).all(-1).any()]
        out = torch.stack([torch.nn.functional.normalize(f, dim=-1) @ mean for f in left_out])
        assert similarity[~own].max() <= out.min() + 1e-6


@pytest.mark.parametrize("rest", ["random", "least-similar"])
def test_items_that_no_registry_names_are_offered_beside_them(rest):
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    parts = registry_offers(REGISTRIES, rest=rest, size=12, features=features)
    named = (parts.test.elements.unsqueeze(-2) == features[:10]).all(-1).any(-1)
    assert named[parts.test.chosen].all()
    assert not named.all()
    assert (parts.popular[~named] == 0).all()
    assert (parts.popular[parts.test.chosen] > 0).any()
    with pytest.raises(ValueError, match="features: got 9 rows for 10 items"):
        registry_offers(REGISTRIES, rest=rest, size=8, features=features[:9])


def test_cooccurrence_looks_at_its_registries_alone():
    features = cooccurrence([[0, 1], [0, 1], [2, 3]], 5)
    assert features[0, 1] > 0
    assert features[0, 2] == 0
    assert (features[4] == 0).all()


def test_factors_give_back_the_lift_of_pairs_and_look_at_their_registries_alone():
    registries = [[0, 1], [0, 1], [0, 2], [2, 3], [1]]
    features = factors(registries, 5, rank=5)
    count = torch.tensor([3.0, 3.0, 2.0, 1.0, 0.0])
    popular = torch.log1p(count)
    torch.testing.assert_close(features[:, 0], (popular - popular.mean()) / popular.std(correction=0))
    together = torch.zeros(5, 5)
    for i, j, times in ((0, 1, 2), (0, 2, 1), (2, 3, 1)):
        together[i, j] = together[j, i] = times
    lift = ((together + 1) / (count.outer(count) / 5 + 1)).log().fill_diagonal_(0)
    scaled = features[:, 1:]
    squared = scaled.square().sum(0)  # |eigenvalue|; the sign is that of the quadratic form
    signs = torch.sign((scaled * (lift @ scaled)).sum(0))
    torch.testing.assert_close(scaled * signs @ scaled.T, lift, atol=1e-5, rtol=0)
    assert (squared[:-1] >= squared[1:] - 1e-6).all()
    assert factors(registries, 5, rank=2).shape == (5, 3)


def test_pickles_are_refused_and_converted_without_running_them(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    plain, evil = tmp_path / "features.pkl", tmp_path / "evil.pkl"
    plain.write_bytes(pickle.dumps({1: [1.0, 2.0], 2: [3.0, 4.0]}))
    evil.write_bytes(pickle.dumps({1: Evil()}))
    with pytest.raises(ValueError, match=r"is a pickle.*convert_features"):
        read_registries(plain)
    with pytest.raises(ValueError, match=r"is a pickle.*convert_features"):
        read_features(plain)
    with pytest.raises(ValueError, match=r"asks to import .*open, which could run anything"):
        convert_features(evil, tmp_path / "evil.parquet")
    assert not (tmp_path / "ran").exists()
    assert read_features(convert_features(plain, tmp_path / "f.parquet")).tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(("content", "message"), [
    (pickle.dumps({1: [1.0, 2.0], 2: [3.0, float("nan")]}), r"NaN or infinite for 1 of 2 items, id 2 the first"),
    (pickle.dumps({1: [1.0, 2.0]})[:-4], "cannot be read .*damaged, cut off, or no pickle"),
    (b"id,feature", "cannot be read .*damaged, cut off, or no pickle"),
    (b"", "cannot be read .EOFError"),
    (pickle.dumps({1: 1.0}), "does not map ids 1..M to vectors of one length, but to"),
    (pickle.dumps([[1.0], [2.0]]), "does not map ids 1..M"),
    (pickle.dumps(7), "does not map ids 1..M"),
])  # fmt: skip
def test_bad_pickles_are_named(tmp_path, content, message):
    path = tmp_path / "features.pkl"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"pickled: .*features.pkl {message}|pickled: .*features.pkl has features .*{message}"
    ):
        convert_features(path, tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("1 2 x\n", "line 1 of .* is '1 2 x', wanted ids from 1"),
    ("1 2 3\n0 1 2\n", "line 2"),
    ("1 2 \u00b2\n", "line 1 of .* wanted ids from 1"),
    ("1 2\n", "has no registry of 3 to 29 items"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "registries.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_registries(path)


def test_the_files_here_hold_the_published_numbers(data_folder):
    for name, count in (("apparel", 4675), ("diaper", 6108)):
        registries = read_registries(data_folder / "amazon_registry" / f"{name}_regs.csv")
        assert len(registries) == count
    parts = registry_offers(registries, rest="random")
    chance = jaccard_of(torch.rand(parts.test.chosen.shape), parts.test)
    assert jaccard_of(parts.popular, parts.test) > chance + 0.1
