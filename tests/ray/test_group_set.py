"""GroupSet: a set shared by ranks is the set in memory, and training by teams is training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_distributed_test
from shared_sets import DIM, GRADS, encoders, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distset import Exact, InMemory, Sampled, encode_set
from distset.cluster.config import Cluster
from distset.cluster.group_set import GroupSet, SetGroup
from distset.cluster.world import ClusterWorld, check_sharing, open_world
from distset.data import Bag, Store, write_store
from distset.fixed_point import Implicit, Stop, Unrolled
from distset.krylov import GMRES
from distset.large_offers import offer_logits, offer_loss, solve_offer
from distset.optim import Optimisation
from distset.set_functions import SumUtility
from distset.states import Sum
from distset.tasks.bag_models import umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, fit, predict_all
from distset.world import current_world, use_world

SIZE, CHUNK, RANKS = 200, 16, 4  # 13 chunks
PLAN = Plan(epochs=2, batch=5, seed=7, log_every=2, evaluate_every=3)


def memory(size: int = SIZE) -> InMemory:
    elements = torch.randn(size, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return InMemory(elements, CHUNK, name="a")


def bags() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    sets = [torch.randn(9 + i, DIM, dtype=torch.float64, generator=generator) + i % 2 for i in range(12)]
    return [Example(InMemory(x, chunk_size=4, name=f"bag-{i}"), i % 2) for i, x in enumerate(sets)]


def trained() -> dict[str, Any]:
    """A run in float64 with SGD, whose steps do not blow rounding up as Adam's do where a gradient is next to nothing."""
    torch.manual_seed(1)
    task = BagTask.of(
        *umbc(DIM, 1, slots=3, width=8, heads=2, random_slots=True, dropout=0.2), classes=["no", "yes"], grad=Exact()
    )
    task.model.double()
    fitted = fit(task, bags(), bags()[:5], plan=PLAN, optimisation=Optimisation(torch.optim.SGD, lr=0.1, clip=1.0))
    outputs, _ = predict_all(task, bags()[:3])
    return {"weights": task.model.state_dict(), "history": fitted.history, "outputs": outputs}


# What each rank does, and what it leaves for the tests below.


def on_a_rank(rank: int, folder: str) -> None:
    teams = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)}
    found: dict[str, Any] = {}
    for size, members in teams.items():
        if rank < size:
            found[f"laws of {size}"] = laws(SetGroup(members))
    three = SetGroup(teams[3]) if rank < 3 else None
    if three is not None:
        found["few chunks"] = few_chunks(three)
        found["maps"] = maps(three)
        found["errors"] = errors(three, rank)
        found["traffic"] = traffic(three)
        found["sum"] = sums(three)
        found["stored"] = stored(three, folder)
        found["offer"] = [offer(three, folder, steps=steps) for steps in (None, 3)]
    with open_world(Cluster(workers=RANKS, set_parallel=2)):
        world = current_world()
        found["world"] = (world.part, world.parts, world.team)
        found["trained"] = trained()
    found["averaged"] = averaged(rank)
    torch.save(found, f"{folder}/rank-{rank}.pt")


def laws(group: SetGroup) -> list[list[torch.Tensor]]:
    gradients = []
    for name, encoder in encoders().items():
        for grad in GRADS.values():
            value, gradient = step(encoder, memory(), grad)
            got, found = step(encoder, GroupSet(memory(), group), grad)
            assert torch.equal(got, value), (name, grad)
            for mine, wanted in zip(found, gradient):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
            again = step(encoder, GroupSet(memory(), group), grad)[1]
            assert all(torch.equal(x, y) for x, y in zip(found, again))
            gradients.append(found)
    return gradients


def stored(group: SetGroup, folder: str) -> bool:
    """A set on disk, of which each rank maps its own run, is the set in memory."""
    bag = Store(f"{folder}/store").open("a", CHUNK)
    elements = torch.cat(list(bag.map(lambda chunk: chunk.elements.clone())))  # a store has its own order
    assert elements.dtype == torch.float64
    for name, encoder in encoders().items():
        for grad in GRADS.values():
            value, gradient = step(encoder, InMemory(elements, CHUNK, name="a"), grad)
            got, found = step(encoder, GroupSet(bag, group), grad)
            assert torch.equal(got, value), (name, grad)
            for mine, wanted in zip(found, gradient):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    return True


def offer(group: SetGroup, folder: str, steps: int | None) -> list[torch.Tensor]:
    """The mean field of an offer on disk that the ranks share, and the gradient of its loss: those of one process.

    ``steps``: unrolled ones; None for the fixed point and its implicit gradient.
    """
    bag = Store(f"{folder}/store").open("a", CHUNK)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    utility = SumUtility(nn.Sequential(nn.Linear(DIM, 4), nn.Tanh()), head, context=True).double()
    with torch.no_grad():
        head[0].weight.mul_(20 / len(bag))
        head[2].weight.mul_(len(bag) / 8)
    grad = Implicit(GMRES(1e-12)) if steps is None else Unrolled(steps)
    chosen, results = torch.tensor([0, 17, 18, 199]), []
    elements = torch.cat(list(bag.map(lambda chunk: chunk.elements.clone())))
    for kind in (InMemory(elements, CHUNK), GroupSet(bag, group), GroupSet(InMemory(elements, CHUNK), group)):
        field = solve_offer(utility, kind, seed=1, samples=3, grad=grad, stop=Stop(200, 1e-10, 1e-10))
        assert steps is not None or bool(field.solution.converged)
        loss = offer_loss(utility, kind, field, chosen, counted=torch.arange(0, 200, 2))
        gradient = torch.autograd.grad(loss, list(utility.parameters()))
        results.append([field.sums.detach(), loss.detach(), offer_logits(utility, kind, field), *gradient])
    for shared in results[1:]:
        for mine, wanted in zip(shared[:3], results[0][:3]):
            assert torch.equal(mine, wanted)
        for mine, wanted in zip(shared[3:], results[0][3:], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)
    return results[1]


def few_chunks(group: SetGroup) -> bool:
    """Two chunks for three ranks, and one."""
    encoder = encoders()["dropout-umbc"]
    for size in (CHUNK + 1, CHUNK - 1):
        for grad in (Exact(), Sampled(1)):
            value, gradient = step(encoder, memory(size), grad)
            got, found = step(encoder, GroupSet(memory(size), group, local=0), grad)
            assert torch.equal(got, value)
            for mine, wanted in zip(found, gradient):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    return True


def first_of(chunk):
    return chunk.id, chunk.elements[0]


def maps(group: SetGroup) -> bool:
    shared = GroupSet(memory(), group)
    for ids in (None, [0, 3, 4, 12], [2]):
        wanted = list(memory().map(first_of, ids=ids))
        got = list(shared.map(first_of, ids=ids))
        assert [i for i, _ in got] == [i for i, _ in wanted]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, wanted))
    large = list(GroupSet(memory(), group).map(lambda chunk: torch.zeros(5_000)))  # more than a first collective holds
    assert len(large) == 13
    assert large[12].shape == (5_000,)
    return True


def errors(group: SetGroup, rank: int) -> list[str]:
    def broken(chunk):
        if chunk.id == 9:
            raise KeyError("chunk 9")
        return Sum(chunk.elements.sum(0), torch.tensor(chunk.size))

    said = []
    for call in (GroupSet(memory(), group).merge, GroupSet(memory(), group).sum):
        try:
            call(broken)
        except KeyError as error:
            said.append(f"{error} {error.__notes__[0].splitlines()[0]}")
    try:
        encode_set(encoders()["deepsets"].eval(), GroupSet(memory(), group), seed=rank)
    except ValueError as error:
        said.append(str(error))
    return said


def traffic(group: SetGroup) -> list[tuple[int, ...]]:
    found = []
    for size in (1_000, 10_000, 10_000):
        before = group.traffic
        step(encoders()["dropout-umbc"], GroupSet(memory(size), group), Exact())
        found.append(tuple(group.traffic - before))
    return found[:1] + found[2:]  # the second one may have had to ask twice


def sums(group: SetGroup) -> bool:
    """None where nobody has a gradient, zeros from those who have none."""

    def parts(chunk):
        return chunk.elements.sum(0), None, torch.ones(2) if chunk.id < 2 else None

    first, none, some = GroupSet(memory(), group).sum(parts)
    torch.testing.assert_close(first, memory().elements.sum(0), rtol=0, atol=1e-12)
    assert none is None
    assert torch.equal(some, torch.full((2,), 2.0))
    alone = GroupSet(memory(), group, local=0)  # a chunk a rank, whose part comes as fn returned it
    (expanded,) = alone.sum(lambda chunk: (torch.ones(()).expand(3),), ids=range(group.size))
    assert expanded.tolist() == [group.size] * 3
    return True


def averaged(rank: int) -> list[torch.Tensor]:
    """Plain DistributedDataParallel over teams of two: the mean over ranks is the mean over the two sets."""
    group = SetGroup.split(2)
    model = Model(encoders()["deepsets"])
    ddp = DistributedDataParallel(model)
    bag = bags()[rank // 2].set
    ddp(GroupSet(bag, group)).backward()
    return [p.grad for p in model.parameters()]


class Model(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.encoder, self.head = encoder, nn.Linear(6, 1).double()

    def forward(self, set_) -> torch.Tensor:
        return self.head(encode_set(self.encoder, set_, seed=1)).square().sum()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_store(folder / "store", [Bag("a", memory().elements.numpy())])
    run_distributed_test(on_a_rank, RANKS, str(folder))
    return [torch.load(Path(folder) / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_have_the_bits_of_memory_and_gradients_are_alike_on_all_ranks(found, size):
    key = f"laws of {size}"
    assert all(key in found[rank] for rank in range(size))
    for rank in range(1, size):
        for mine, first in zip(found[rank][key], found[0][key], strict=True):
            assert same(mine, first)


def test_more_ranks_than_chunks_and_maps_and_sums(found):
    for rank in range(3):
        assert found[rank]["few chunks"]
        assert found[rank]["maps"]
        assert found[rank]["sum"]


def test_a_stored_set_is_the_set_in_memory(found):
    assert all(found[rank]["stored"] for rank in range(3))


def test_an_offer_that_ranks_share_is_solved_and_differentiated_as_in_memory(found):
    """Held on each rank; here, that all ranks have the same bits."""
    for rank in range(3):
        for mine, first in zip(found[rank]["offer"], found[0]["offer"], strict=True):
            assert same(mine, first)


def test_an_error_on_one_rank_is_raised_on_all(found):
    for rank in range(3):
        merge, total, seeds = found[rank]["errors"]
        assert merge == total == "'chunk 9' on rank 2:"
        assert seeds == "seed: the ranks that share a set drew different ones ([0, 1, 2]); pass encode_set(..., seed=)"


def test_bytes_a_step_do_not_grow_with_the_set(found):
    small, large = found[0]["traffic"]
    assert large == small


def test_training_by_teams_is_training(found):
    """Two teams of two workers; the batches of 5, 5 and 2 bags divide unevenly."""
    assert [found[rank]["world"] for rank in range(RANKS)] == [(0, 2, 2), (0, 2, 2), (1, 2, 2), (1, 2, 2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = trained()
    torch.set_num_threads(threads)
    for rank in range(RANKS):
        got = found[rank]["trained"]
        assert same(got["weights"].values(), found[0]["trained"]["weights"].values())
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=1e-12)
        for mine, theirs in zip(got["history"], wanted["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)  # a logged loss travels as float32
        for mine, theirs in zip(got["outputs"], wanted["outputs"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_the_mean_that_ddp_takes_is_right(found):
    model = Model(encoders()["deepsets"])
    (sum(model(bag.set) for bag in bags()[:2]) / 2).backward()
    for rank in range(RANKS):
        for mine, wanted in zip(found[rank]["averaged"], model.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted.grad, rtol=0, atol=1e-12)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised"):
        GroupSet(memory())
    with pytest.raises(ValueError, match=r"set_parallel: got 2 ranks a set, which do not divide the 1 ranks"):
        SetGroup.split(2)
    with pytest.raises(ValueError, match=r"cluster.set_parallel: got 2 workers a set, which do not divide the 3 of"):
        check_sharing(Cluster(workers=3, set_parallel=2))
    with pytest.raises(ValueError, match=r"cluster.actors: got 2 with cluster.set_parallel=2"):
        check_sharing(Cluster(workers=2, set_parallel=2, actors=2))
    with pytest.raises(ValueError, match=r"cluster.actors: got -1, wanted at least 0"):
        check_sharing(Cluster(actors=-1))
    with pytest.raises(ValueError, match=r"got 2 workers a set, which do not divide the 1 workers of this run"):
        ClusterWorld(Cluster(set_parallel=2))
    with use_world(ClusterWorld(Cluster())) as world:
        assert current_world() is world
    assert current_world() is not world
