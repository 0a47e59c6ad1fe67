"""RaySet: a set on actors is the set in memory, whoever computes what and whoever dies."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from shared_sets import DIM, GRADS, encoders, step
from torch import nn

from distset import DeepSets, Exact, Full, InMemory
from distset.cluster import set_actors
from distset.cluster.ray_set import RaySet
from distset.cluster.set_actors import SetActors
from distset.cluster.set_call import Call
from distset.data import Bag, write_store
from distset.fixed_point import Anderson
from distset.large_offers import offer_loss, solve_offer
from distset.set_functions import SumUtility

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
SIZE, CHUNK = 700, 16  # 44 chunks


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    elements = torch.randn(SIZE, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path_factory.mktemp("store") / "s", [Bag("a", elements.numpy())])
    return store.open("a", CHUNK)


@pytest.fixture(scope="module")
def elements(stored) -> torch.Tensor:
    return torch.cat([chunk.elements.clone() for chunk in stored.map(lambda chunk: chunk)])


@pytest.fixture(scope="module")
def crews(cluster):
    made = {count: SetActors(count, num_cpus=0.1) for count in (1, 2, 3)}
    yield made
    for crew in made.values():
        crew.close()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor has
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", encoders())
def test_values_have_the_bits_of_memory_and_gradients_its_digits(name, elements, stored, crews):
    encoder, memory = encoders()[name], InMemory(elements, CHUNK, name="a")
    for grad in GRADS.values():
        value, gradient = step(encoder, memory, grad)
        disk_value, disk_gradient = step(encoder, stored, grad)
        assert torch.equal(disk_value, value)
        assert same(disk_gradient, gradient)
        for count, crew in crews.items():
            on_actors = RaySet(stored, crew)
            got, found = step(encoder, on_actors, grad)
            assert torch.equal(got, value), (count, grad)
            for mine, wanted in zip(found, gradient):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
            again, repeated = step(encoder, RaySet(stored, crew), grad)
            assert torch.equal(again, value)
            assert same(repeated, found)


class Updated(nn.Module):
    """A weight and its update, whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.update = (nn.Parameter(torch.randn(6, DIM, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight + self.update).mT


def test_parameters_that_are_added_up(elements, crews):
    encoder = DeepSets(Updated(), "sum")
    _, wanted = step(encoder, InMemory(elements, CHUNK), Exact())
    _, found = step(encoder, RaySet(InMemory(elements, CHUNK), crews[1], slices=44), Exact())  # a chunk a slice
    for mine, theirs in zip(found, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_gradient_has_the_same_bits_for_the_same_slices(elements, stored, crews):
    encoder = encoders()["dropout-umbc"]
    one, two, three = (step(encoder, RaySet(stored, crew, slices=6), Exact())[1] for crew in crews.values())
    assert same(one, two)
    assert same(one, three)


def test_map_is_in_order_reads_ahead_within_bounds_and_may_be_left(elements, crews):
    memory = InMemory(elements, 2000 // 100)
    on_actors = RaySet(memory, crews[2])
    pairs = zip(on_actors.map(lambda c: (c.id, c.start)), on_actors.map(lambda c: c.elements), memory.map(lambda c: c))
    for (id, start), found, chunk in pairs:
        assert (id, start) == (chunk.id, chunk.start)
        assert torch.equal(found, chunk.elements)
    assert [c.id for c in on_actors.map(lambda c: c, ids=[3, 7, 20])] == [3, 7, 20]
    some = on_actors.map(lambda c: c.id)
    assert next(some) == 0
    some.close() if hasattr(some, "close") else None
    large = RaySet(InMemory(torch.zeros(100, 1), 1), crews[1])
    crew, before = crews[1], crews[1].traffic.calls
    large.actors.in_flight, ahead = 1, large.map(lambda c: time.sleep(0.01), ids=range(100))
    next(ahead)
    assert crew.traffic.calls - before <= 2
    crew.in_flight = 2


def test_few_named_chunks_are_worked_on_here(elements, crews):
    on_actors = RaySet(InMemory(elements, CHUNK), crews[2], local=2)

    def who(chunk):
        return (torch.tensor(os.getpid()),)

    assert on_actors.sum(who, ids=[5])[0] == os.getpid()
    assert on_actors.sum(who, ids=[5, 9])[0] == 2 * os.getpid()
    assert os.getpid() not in [int(pid) for (pid,) in on_actors.map(who)]
    assert os.getpid() not in [int(pid) for (pid,) in RaySet(on_actors.set, crews[2], local=0).map(who, ids=[5])]


def test_sets_of_a_step_share_one_copy_of_the_encoder(elements, crews):
    encoder, crew = encoders()["deepsets"], crews[2]
    sets = [RaySet(InMemory(elements, CHUNK), crew) for _ in range(3)]

    def bytes_down() -> int:
        before = crew.traffic
        for set_ in sets:
            step(encoder, set_, Exact())
        return (crew.traffic - before).down

    bytes_down()  # sends the sets
    apart = bytes_down()
    with crew.unchanged():
        together = bytes_down()
    encoder_bytes = set_actors.pack(encoder, set_actors.FunctionPickler).nbytes
    assert apart - together == 2 * encoder_bytes


def test_bytes_a_step_do_not_grow_with_the_set(crews):
    encoder, found = encoders()["dropout-umbc"], []
    for size in (1_000, 10_000):
        on_actors = RaySet(InMemory(torch.randn(size, DIM, dtype=torch.float64), CHUNK), crews[2])
        step(encoder, on_actors, Exact())
        before = on_actors.traffic
        step(encoder, on_actors, Exact())
        found.append(on_actors.traffic - before)
    small, large = found
    assert large.calls == small.calls
    assert large.down <= small.down + 64  # a longer integer here and there
    assert large.up <= 1.3 * small.up  # some slices hold more whole nodes of the tree than others


def kill_once(mark, at: int):
    """A function of a chunk that takes its actor down, the first time chunk ``at`` comes by."""

    def fn(chunk, *args):
        if chunk.id == at and not os.path.exists(mark):
            open(mark, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)

    return fn


class Mortal(nn.Module):
    """A layer that kills its process at the given passes over the actors, once each."""

    def __init__(self, folder, when: str) -> None:
        super().__init__()
        self.folder, self.when, self.home = str(folder), when, os.getpid()

    def forward(self, x):
        replaying = torch.is_grad_enabled()
        mark = f"{self.folder}/{self.when}"
        if os.getpid() != self.home and replaying == (self.when == "replay") and not os.path.exists(mark):
            open(mark, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


@pytest.mark.parametrize("when", ["sweep", "replay"])
def test_an_actor_killed_in_a_step_is_replaced_and_no_bit_is_lost(when, tmp_path, stored, crews):
    torch.manual_seed(0)
    plain = DeepSets(nn.Sequential(nn.Linear(DIM, 6), nn.Tanh()), "mean").double()
    value, gradient = step(plain, RaySet(stored, crews[2]), Exact())
    plain.phi.append(Mortal(tmp_path, when))
    with pytest.warns(UserWarning, match="a new one takes its place"):
        got, found = step(plain, RaySet(stored, crews[2]), Exact())
    assert (tmp_path / when).exists()
    assert torch.equal(got, value)
    assert same(found, gradient)
    assert torch.equal(step(plain, RaySet(stored, crews[2]), Exact())[0], value)


@pytest.mark.parametrize("error", ["OutOfMemoryError", "ActorDiedError", "OwnerDiedError", "ObjectFetchTimedOutError"])
def test_an_actor_lost_in_whatever_way_is_replaced(error, elements, crews, monkeypatch):
    """Ray ends an actor where memory runs out, and loses an answer with the node that held it."""
    kind = getattr(ray.exceptions, error)
    raised = (
        kind("no memory") if error == "OutOfMemoryError" else kind() if error == "ActorDiedError" else kind("a", "b", "c")
    )
    take, left = Call._take, [raised]

    def lose(call, flight, answer):
        if left:
            raise left.pop()
        take(call, flight, answer)

    monkeypatch.setattr(Call, "_take", lose)
    encoder, memory = encoders()["umbc"], InMemory(elements, CHUNK, name="a")
    with pytest.warns(UserWarning, match=r"set actor \d died; a new one takes its place"):
        got, _ = step(encoder, RaySet(memory, crews[2]), Exact())
    assert torch.equal(got, step(encoder, memory, Exact())[0])


def test_a_chunk_that_always_kills_is_given_up(elements):
    def kill(chunk):
        os.kill(os.getpid(), signal.SIGKILL)

    with RaySet(InMemory(elements, CHUNK), SetActors(1, num_cpus=0.1, retries=0)) as on_actors, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"working on chunks \d+ to \d+ was lost 1 times"):
            list(on_actors.map(kill))


def test_what_a_silent_actor_has_is_taken_over(tmp_path, elements, crews):
    memory = InMemory(elements, CHUNK)

    def slow_once(chunk):
        mark = f"{tmp_path}/slow"
        if chunk.id == 20 and not os.path.exists(mark):
            open(mark, "x").close()
            time.sleep(60)
        return (chunk.elements.sum(0),)

    started = time.monotonic()
    crew = SetActors(2, num_cpus=0.1)
    with RaySet(memory, crew) as on_actors:
        crew.start()
        (found,) = on_actors.sum(slow_once)
        (again,) = on_actors.sum(slow_once)  # by the other actor alone
        assert time.monotonic() - started < 40
    assert (tmp_path / "slow").exists()
    (wanted,) = RaySet(memory, crews[2]).sum(slow_once)
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


def test_errors_come_back_as_what_they_are(tmp_path, elements, stored, crews):
    def broken(chunk):
        raise KeyError(f"chunk {chunk.id}")

    with pytest.raises(KeyError, match="chunk 0") as error:
        list(RaySet(InMemory(elements, CHUNK), crews[1]).map(broken))
    assert "on a set actor of node" in error.value.__notes__[0]
    assert "in broken" in error.value.__notes__[0]
    moved = write_store(tmp_path / "s", [Bag("a", np.zeros((99, 2), np.float32))]).open("a", 8)
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^set: cannot be read on node .*No such file.*every actor must see its files"):
        RaySet(moved, crews[1]).merge(lambda chunk: None)
    with pytest.raises(ValueError, match=r"gradients do not follow it; use grad=Exact\(\)"):
        step(encoders()["deepsets"], RaySet(stored, crews[1]), Full())
    value, _ = step(encoders()["deepsets"], RaySet(stored, crews[1]), Exact())  # the crew is as good as before
    assert value.isfinite().all()


def test_a_cluster_too_small_says_what_is_missing(elements):
    crew = SetActors(2, num_cpus=500, start_seconds=1)
    lacks = r"2 of 2 set actors did not start within 1 s; each asks for 500 CPU, the cluster has 4 CPU"
    with pytest.raises(ValueError, match=lacks):
        RaySet(InMemory(elements, CHUNK), crew).merge(lambda chunk: None)
    assert not crew.members


def test_an_actor_with_other_versions_is_refused(monkeypatch, elements):
    monkeypatch.setattr(set_actors, "installed", lambda: {"distset": "0.1.0", "torch": "1.0"})
    with pytest.raises(ValueError, match=r"a set actor has torch 2\..* instead of 1\.0, which this process has"):
        SetActors(1, num_cpus=0.1).start()


@pytest.mark.parametrize("bad", [{"actors": 0}, {"local": -1}, {"slices": 0}, {"set": torch.zeros(3)}])
def test_arguments_out_of_range(bad, elements):
    with pytest.raises(ValueError, match=r"(count|set|local|slices).*wanted"):
        RaySet(**{"set": InMemory(elements), **bad})


def solved(offer, chosen):
    """The field of an offer, its loss and gradient; codes are scaled so that gains are of order 1 at any size."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    utility = SumUtility(nn.Sequential(nn.Linear(2, 4), nn.Tanh()), head).double()
    with torch.no_grad():
        head[0].weight.mul_(20 / len(offer))
        head[2].weight.mul_(len(offer) / 8)
    field = solve_offer(utility, offer, seed=1, samples=2, iteration=Anderson())
    loss = offer_loss(utility, offer, field, chosen)
    loss.backward()
    return field, loss.detach(), [p.grad for p in utility.parameters()]


@pytest.mark.parametrize("size", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_large_offer_is_solved_and_differentiated_on_two_actors(size, crews):
    generator = torch.Generator().manual_seed(0)
    memory = InMemory(torch.randn(size, 2, dtype=torch.float64, generator=generator), size // 16)
    chosen = torch.arange(10) * (size // 11)
    on_actors = RaySet(memory, crews[2])
    list(on_actors.map(lambda chunk: None))  # sends the set
    before = on_actors.traffic
    field, loss, gradient = solved(on_actors, chosen)
    used = on_actors.traffic - before
    wanted_field, wanted_loss, wanted = solved(memory, chosen)
    assert bool(field.solution.converged.all())
    assert torch.equal(field.sums, wanted_field.sums)
    assert torch.equal(loss, wanted_loss)
    for mine, theirs in zip(gradient, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    sweeps = used.calls / on_actors.slices
    assert (used.down + used.up) / sweeps < 8_000  # whatever the size; the offer has 16 bytes an element


def allow(mib: int):
    """For an actor: no more than ``mib`` of memory beyond what it has now."""

    def limit(actor):
        import resource

        status = Path("/proc/self/status").read_text()
        now = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData"))) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + mib * 2**20, -1))

    return limit


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which is Linux's")
def test_a_set_larger_than_its_workers_streams(tmp_path, cluster):
    """100 MB on two actors that may take 32 MiB each: a chunk at a time goes through, the whole set does not."""
    generator = np.random.default_rng(0)
    large = write_store(tmp_path / "s", [Bag("a", generator.standard_normal((200_000, 128), dtype=np.float32))])
    encoder = DeepSets(nn.Linear(128, 4))
    with SetActors(2, num_cpus=0.1, retries=0) as crew:
        step(encoder, RaySet(large.open("a", 4096), crew), Exact())
        cluster.get([member.actor.__ray_call__.remote(allow(32)) for member in crew.members])
        value, _ = step(encoder, RaySet(large.open("a", 4096), crew), Exact())
        torch.testing.assert_close(value, step(encoder, large.open("a", 4096), Exact())[0], rtol=0, atol=0)
        with pytest.raises((ValueError, RuntimeError), match=r"allocate memory"):
            step(encoder, RaySet(large.open("a"), crew, local=0), Exact())
