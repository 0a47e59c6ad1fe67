"""`encode_set` as a citizen of torch: hooks, several losses, several sets, autocast, compile, DDP, bad input."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from distset import (
    DSMIL,
    UMBC,
    ChunkEncoder,
    DeepSets,
    Exact,
    Features,
    Full,
    InMemory,
    Sampled,
    Subset,
    encode_set,
    encode_state,
)
from distset.states import TopK


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return Features(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout)), UMBC(8, 3, residual=True))


def gradients(encoder: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)
    return [g for g in grads if g is not None]


def assert_same(a, b, atol=1e-12):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_several_losses_on_one_encoding():
    encoder, x = model().double(), torch.randn(40, 5, dtype=torch.float64)
    z = encode_set(encoder, InMemory(x, 8), grad=Exact())
    first, second = z.square().sum(), z.sin().sum()
    first.backward(retain_graph=True)
    second.backward()
    got = [p.grad for p in encoder.parameters()]
    z = encode_set(encoder, InMemory(x), grad=Full())
    assert_same(got, gradients(encoder, z.square().sum() + z.sin().sum()))


def test_several_sets_in_one_step():
    encoder = model().double()
    sets = [torch.randn(n, 5, dtype=torch.float64) for n in (7, 30, 12)]
    loss = lambda grad, size: sum(encode_set(encoder, InMemory(x, size), grad=grad).sin().sum() for x in sets)  # noqa: E731
    assert_same(gradients(encoder, loss(Exact(), 4)), gradients(encoder, loss(Full(), None)))


@pytest.mark.parametrize("grad", [Exact(), Sampled(2), Sampled(2, "stratified"), Sampled(3, "weighted")])
def test_the_value_has_the_same_bits_whatever_the_gradient(grad):
    encoder, x = model(dropout=0.3).train(), torch.randn(50, 5)
    with torch.no_grad():
        want = encode_set(encoder, InMemory(x, 8), seed=3)
    assert torch.equal(encode_set(encoder, InMemory(x, 8), grad=grad, seed=3), want)
    full = encode_set(encoder, InMemory(x, 8), grad=Full(), seed=3)  # another order of additions: equal to rounding
    torch.testing.assert_close(full, want, rtol=1e-5, atol=1e-6)


def test_subset_looks_at_all_chunks_where_gradients_are_off():
    encoder, x = model(), torch.randn(50, 5)
    with torch.no_grad():
        assert torch.equal(encode_set(encoder, InMemory(x, 8), grad=Subset(1)), encode_set(encoder, InMemory(x, 8)))


def test_seeds_name_what_is_random():
    encoder, x = model(dropout=0.5).train(), torch.randn(20, 5)
    one, again, other = (encode_set(encoder, InMemory(x, 8), seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    state = torch.get_rng_state()
    encode_set(encoder, InMemory(x, 8), seed=1).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # torch's own stream is left alone


def test_unseeded_training_follows_torch_seed():
    encoder, x = model(dropout=0.5).train(), torch.randn(20, 5)
    torch.manual_seed(5)
    one = encode_set(encoder, InMemory(x, 8))
    two = encode_set(encoder, InMemory(x, 8))
    torch.manual_seed(5)
    assert torch.equal(encode_set(encoder, InMemory(x, 8)), one)
    assert not torch.equal(one, two)


def test_frozen_extractor_gets_no_gradient():
    encoder, x = model(), torch.randn(20, 5)
    encoder.extractor.requires_grad_(False)
    encode_set(encoder, InMemory(x, 8)).sum().backward()
    assert all(p.grad is None for p in encoder.extractor.parameters())
    assert encoder.encoder.mu.grad is not None


def test_parameter_changed_between_forward_and_backward():
    encoder = model()
    z = encode_set(encoder, InMemory(torch.randn(20, 5), 8))
    with torch.no_grad():
        encoder.encoder.to_value.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_float16_elements_meet_float32_parameters():
    encoder, x = model(), torch.randn(30, 5).half()
    want = encode_set(encoder, InMemory(x.float(), 8))
    assert torch.equal(encode_set(encoder, InMemory(x, 8)), want)


def test_autocast_bfloat16():
    """The replay runs under the forward's autocast even though backward is called outside of it; states are float32."""
    encoder, x = model(), torch.randn(64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, _ = encode_state(encoder, InMemory(x, 16), grad=Exact())
        full, _ = encode_state(encoder, InMemory(x, 16), grad=Full())
    assert state.total.dtype == state.mass.dtype == torch.float32
    got = gradients(encoder, state.value().square().sum())
    want = gradients(encoder, full.value().square().sum())
    assert_same(got, want, atol=2e-3)  # bfloat16 rounds the replayed chunks' gradients each on its own
    precise = gradients(encoder, encode_set(encoder, InMemory(x), grad=Full()).square().sum())
    assert any(not torch.equal(a, b) for a, b in zip(got, precise))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_encoder(backend):
    encoder, x = model(), torch.randn(64, 5)
    compiled = torch.compile(encoder, backend=backend, dynamic=True)
    for grad in (Exact(), Sampled(2), Full()):
        z = encode_set(compiled, InMemory(x, 16), grad=grad, seed=4)
        want = encode_set(encoder, InMemory(x, 16), grad=grad, seed=4)
        torch.testing.assert_close(z, want, rtol=0, atol=1e-5)
        assert_same(gradients(encoder, z.sin().sum()), gradients(encoder, want.sin().sum()), atol=1e-5)


def _ddp_worker(rank: int, port: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(Classifier(model().double()))
    x = torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net(InMemory(x[rank], 6)).backward()
    if rank == 0:
        queue.put([p.grad.tolist() for p in net.parameters()])
    dist.barrier()
    dist.destroy_process_group()


class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, set_):
        return encode_set(self.encoder, set_, grad=Exact()).sin().sum()


def test_ddp_averages_the_gradients(unused_port):
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_ddp_worker, args=(rank, unused_port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = queue.get(timeout=120)
    for worker in workers:
        worker.join(60)
    encoder = model().double()
    x = torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = gradients(encoder, sum(Classifier(encoder)(InMemory(x[i])) for i in range(2)) / 2)
    assert_same([torch.tensor(g, dtype=torch.float64) for g in got], want)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("encoder", [model(), UMBC(5, 3, fold=True), UMBC(5, 3, fold=False)], ids=["net", "folded", "not"])
def test_autocast_takes_float64_elements(encoder):
    """Autocast leaves doubles alone: they go to the parameters' precision, as without it."""
    x = torch.randn(40, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = encode_set(encoder, InMemory(x, 8), seed=0)
        narrow = encode_set(encoder, InMemory(x.float(), 8), seed=0)
    assert torch.equal(wide, narrow)
    wide.float().sum().backward()


class TopScores(ChunkEncoder):
    """The five best of a linear score."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(5, 1)

    def encode(self, chunk, query):
        ids = torch.arange(chunk.start, chunk.start + chunk.size)
        return TopK.of(self.score(chunk.elements).squeeze(-1), chunk.elements, ids, 5)


@pytest.mark.parametrize("grad", [Exact(), Full()])
def test_the_top_five_of_three_elements(grad):
    """With a gradient or without, what is not there has the score -inf."""
    encoder, three = TopScores(), InMemory(torch.randn(3, 5), 2)
    with torch.no_grad():
        want, _ = encode_set(encoder, three)
    scores, _ = encode_set(encoder, three, grad=grad)
    assert want.isneginf().tolist() == [False] * 3 + [True] * 2
    torch.testing.assert_close(scores, want)
    scores[:3].sum().backward()
    torch.testing.assert_close(encoder.score.weight.grad[0], three.elements.sum(0))


class TestBadInput:
    def test_a_tensor_for_a_set(self):
        with pytest.raises(ValueError, match=r"set: got Tensor.*InMemory"):
            encode_set(DeepSets(), torch.randn(3, 2))

    @pytest.mark.parametrize("grad", ["exact", Sampled, nn.Linear(2, 2)])
    def test_what_is_no_strategy(self, grad):
        with pytest.raises(ValueError, match=r"grad: got .*wanted a strategy"):
            encode_set(DeepSets(), InMemory(torch.randn(3, 2)), grad=grad)

    def test_what_is_no_encoder(self):
        with pytest.raises(ValueError, match="encoder: got Linear, wanted a ChunkEncoder"):
            encode_set(nn.Linear(2, 2), InMemory(torch.randn(3, 2)))

    def test_train_mode_batchnorm(self):
        encoder = Features(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), DeepSets())
        with pytest.raises(ValueError, match=r"extractor\.1 is a BatchNorm1d in training mode"):
            encode_set(encoder, InMemory(torch.randn(9, 5), 3))
        encode_set(encoder.eval(), InMemory(torch.randn(9, 5), 3))

    @pytest.mark.parametrize("grad", [Sampled(4), Sampled(4, "stratified"), Sampled(4, "weighted"), Subset(4)])
    def test_more_sampled_chunks_than_chunks(self, grad):
        with pytest.raises(ValueError, match="got 4 chunks to draw from a set of 3"):
            encode_set(model(), InMemory(torch.randn(9, 5), 3), grad=grad)

    def test_strategy_arguments(self):
        for make in (lambda: Sampled(0), lambda: Subset(0)):
            with pytest.raises(ValueError, match="m: got 0"):
                make()
        with pytest.raises(ValueError, match="'uniform', 'stratified' or 'weighted'"):
            Sampled(1, "even")

    def test_elements_that_want_a_gradient(self):
        x = torch.randn(9, 5, requires_grad=True)
        with pytest.raises(ValueError, match="which only Full"):
            encode_set(model(), InMemory(x, 3)).sum().backward()
        encode_set(model(), InMemory(x, 3), grad=Full()).sum().backward()
        assert x.grad is not None

    @pytest.mark.parametrize("encoder", [DeepSets(), model().requires_grad_(False)], ids=["none", "frozen"])
    def test_elements_that_want_a_gradient_alone(self, encoder):
        x = torch.randn(9, 5, requires_grad=True)
        with pytest.raises(ValueError, match="which only Full"):
            encode_set(encoder, InMemory(x, 3))
        with torch.no_grad():
            value = encode_set(encoder, InMemory(x, 3))
        z = encode_set(encoder, InMemory(x, 3), grad=Full())
        torch.testing.assert_close(z, value)
        z.sum().backward()
        assert x.grad.count_nonzero() == x.numel()

    def test_encoder_arguments(self):
        with pytest.raises(ValueError, match="activation: got 'relu'"):
            UMBC(4, 2, activation="relu")
        with pytest.raises(ValueError, match="heads dividing 5"):
            UMBC(5, 2, heads=2)
        with pytest.raises(ValueError, match="unbounded"):
            UMBC(4, 2, normalize=False)
        with pytest.raises(ValueError, match="pool: got 'median'"):
            DeepSets(pool="median")


def test_ds_mil_against_its_formula():
    """DS-MIL in two streams equals the paper's dense formula on the whole bag."""
    encoder, x = DSMIL(5, classes=2, hidden=4).double(), torch.randn(17, 5, dtype=torch.float64)
    scores, bags = encode_set(encoder, InMemory(x, 4))
    instance = encoder.stages[0].score(x)
    critical = x[instance.argmax(0)]
    attend = encoder.stages[1]
    logits = attend.to_query(critical) @ attend.to_query(x).T / 4**0.5
    torch.testing.assert_close(scores, instance.amax(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(bags, torch.softmax(logits, -1) @ attend.to_value(x), rtol=0, atol=1e-12)
