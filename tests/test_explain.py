"""Explanations against autograd in per-element weights, and against formulas written densely, in float64."""

import pytest
import torch
from laws.zoo import DIM, encoders
from torch import nn

import distset.explain
from distset import DSMIL, UMBC, AttentionPool, DeepSets, Features, InMemory, MaxInstance, Parallel, encode_set, encode_state
from distset.encoders import CriticalInstances
from distset.explain import explain_set, score_alone
from distset.seeds import seed_for
from distset.sets import Chunk
from distset.states import merge_tree

ZOO = encoders() | {"critical": CriticalInstances(nn.Linear(DIM, 2))}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def score(encoding) -> torch.Tensor:
    """Three smooth scores that look at every entry of any encoding, after its batch dimensions."""
    parts = encoding if isinstance(encoding, tuple) else (encoding,)
    flat = torch.cat([part.reshape(-1) for part in parts])
    mix = torch.sin(torch.arange(3 * len(flat), dtype=flat.dtype, device=flat.device)).view(3, -1)
    return torch.tanh(mix @ flat) + mix @ flat.square() / 10


def elements(n: int = 13) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def explained(encoder, bag, score=score):
    parts = list(explain_set(encoder, bag, score))
    starts = [part.start for part in parts]
    assert starts == sorted(starts)
    return torch.cat([part.attention for part in parts]), torch.cat([part.contribution for part in parts])


def last_stage(encoder, bag):
    stages = getattr(encoder, "stages", None)
    if stages is None:
        return encoder, None, 0
    found = encode_set(stages[0], bag, seed=seed_for(0, "stage", 0))
    return stages[1], found, seed_for(0, "stage", 1)


@pytest.mark.parametrize("name", ZOO)
def test_contribution_is_the_derivative_in_the_weight_of_an_element(name):
    """Each element is encoded as a chunk of its own and enters the sums with a weight; autograd does the rest."""
    encoder, x = ZOO[name].double().eval(), elements()
    bag = InMemory(x)
    stage, found, seed = last_stage(encoder, bag)
    _, query = encode_state(stage, bag, seed=seed, condition=found)
    states = [stage.encode(Chunk(x[i : i + 1], None, i, i), query) for i in range(len(x))]
    total = merge_tree(states)
    singles = [state.summands(total) for state in states]
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    sums = tuple(sum(w * s for w, s in zip(weights, column)) for column in zip(*singles))
    scores = score(stage.readout(total.with_sums(sums), query))
    wanted = torch.stack([torch.autograd.grad(one, weights, retain_graph=True)[0] for one in scores], -1)
    _, contribution = explained(encoder, InMemory(x, chunk_size=4))
    torch.testing.assert_close(contribution, wanted, **CLOSE)


@pytest.mark.parametrize("name", ZOO)
def test_chunks_do_not_matter_and_attention_sums_to_one(name):
    encoder, x = ZOO[name].double().eval(), elements()
    attention, contribution = explained(encoder, InMemory(x))
    for bounds in ([0, 1, 2, 13], [0, 6, 12, 13]):
        parts = explained(encoder, InMemory(x, bounds=bounds))
        torch.testing.assert_close(parts, (attention, contribution), **CLOSE)
    torch.testing.assert_close(attention.sum(0), torch.ones_like(attention[0]), **CLOSE)
    assert (attention >= 0).all()


@pytest.mark.parametrize("name", ZOO)
def test_few_elements_at_once_give_the_same(name, monkeypatch):
    encoder, bag = ZOO[name].double().eval(), InMemory(elements(), chunk_size=6)
    whole, alone = explained(encoder, bag), torch.cat(list(score_alone(encoder, bag, flat)))
    monkeypatch.setattr(distset.explain, "BUDGET", 40)
    torch.testing.assert_close(explained(encoder, bag), whole, **CLOSE)
    torch.testing.assert_close(torch.cat(list(score_alone(encoder, bag, flat))), alone, **CLOSE)


def test_contributions_sum_to_the_cotangent_on_the_sums():
    encoder, x = UMBC(DIM, 3).double().eval(), elements()
    total, query = encode_state(encoder, InMemory(x))
    sums = tuple(s.detach().requires_grad_() for s in total.summands(total))
    scores = score(encoder.readout(total.with_sums(sums), query))
    grads = [torch.autograd.grad(one, sums, retain_graph=True) for one in scores]
    wanted = torch.stack([sum((g * s).sum() for g, s in zip(grad, sums)) for grad in grads])
    _, contribution = explained(encoder, InMemory(x, chunk_size=5))
    torch.testing.assert_close(contribution.sum(0), wanted, **CLOSE)
    torch.testing.assert_close(contribution.sum(0), torch.zeros(3, dtype=torch.float64), **CLOSE)  # softmax: a mean


def test_attention_and_contribution_of_ab_mil_written_densely():
    encoder, head, x = AttentionPool(DIM, 7).double().eval(), nn.Linear(DIM, 2).double(), elements()
    a = encoder.score(torch.tanh(encoder.to_tanh(x)) * torch.sigmoid(encoder.to_gate(x))).softmax(0)
    z = (a * x).sum(0)
    attention, contribution = explained(encoder, InMemory(x, chunk_size=4), head)
    torch.testing.assert_close(attention, a, **CLOSE)
    torch.testing.assert_close(contribution, a * ((x - z) @ head.weight.T), **CLOSE)


def test_attention_of_umbc_written_densely():
    for fold in (True, False):
        encoder, x = UMBC(DIM, 3, dim_out=4, heads=2, fold=fold).double().eval(), elements()
        query = encoder.to_query(encoder.mu).unflatten(-1, (2, 2)).transpose(0, 1)
        logits = query @ encoder.to_key(x).unflatten(-1, (2, 2)).transpose(0, 1).mT / 2**0.5
        attention, _ = explained(encoder, InMemory(x, chunk_size=4))
        torch.testing.assert_close(attention, logits.softmax(-1).flatten(0, 1).T, **CLOSE)


def test_shares_of_a_sum_a_mean_and_a_maximum():
    x, head = elements(), nn.Linear(DIM, 1, bias=False).double()
    attention, contribution = explained(DeepSets(pool="sum").eval(), InMemory(x, chunk_size=3), head)
    torch.testing.assert_close(attention, torch.full((13, 1), 1 / 13, dtype=torch.float64))
    torch.testing.assert_close(contribution, head(x), **CLOSE)
    _, contribution = explained(DeepSets(pool="mean").eval(), InMemory(x, chunk_size=3), head)
    torch.testing.assert_close(contribution.sum(0), head(x.mean(0)), **CLOSE)
    top = x.clone()
    top[4] = top[7] = 10.0
    attention, contribution = explained(DeepSets(pool="max").eval(), InMemory(top, chunk_size=3), head)
    torch.testing.assert_close(attention[[4, 7]], torch.full((2, DIM), 0.5, dtype=torch.float64))
    torch.testing.assert_close(contribution.sum(0), head(top.amax(0)), **CLOSE)


def test_masked_elements_get_nothing():
    x, mask = elements(), torch.arange(13) < 9
    for encoder in (UMBC(DIM, 3), DeepSets(), MaxInstance(nn.Linear(DIM, 2)), DSMIL(DIM, 2)):
        encoder = encoder.double().eval()
        attention, contribution = explained(encoder, InMemory(x, chunk_size=4, mask=mask))
        alone = explained(encoder, InMemory(x[:9], chunk_size=4))
        torch.testing.assert_close((attention[:9], contribution[:9]), alone, **CLOSE)
        assert not attention[9:].any()
        assert not contribution[9:].any()


def test_images_through_a_network_inside_the_encoder():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, DIM))
    encoder = Features(network, Parallel(UMBC(DIM, 2), MaxInstance(nn.Linear(DIM, 1)))).double().eval()
    x = torch.randn(9, 1, 4, 4, dtype=torch.float64)
    attention, contribution = explained(encoder, InMemory(x, chunk_size=4, element_ndim=3))
    features = InMemory(network(x).detach(), chunk_size=4)
    torch.testing.assert_close((attention, contribution), explained(encoder.encoder, features), **CLOSE)
    assert attention.shape == (9, 3)


def flat(encoding) -> torch.Tensor:
    """Scores with batch dimensions: the encoding itself, in a row."""
    parts = encoding if isinstance(encoding, tuple) else (encoding,)
    batched = [part.flatten(1) if part.dim() > 1 else part.unsqueeze(-1) for part in parts]
    return torch.cat(batched, -1)


@pytest.mark.parametrize("name", ZOO)
def test_score_alone_is_the_score_of_a_set_of_one(name):
    encoder, x = ZOO[name].double().eval(), elements()
    got = torch.cat(list(score_alone(encoder, InMemory(x, chunk_size=5), flat)))
    for i in range(len(x)):
        encoding = encode_set(encoder, InMemory(x[i : i + 1]), seed=0)
        parts = encoding if isinstance(encoding, tuple) else (encoding,)
        torch.testing.assert_close(got[i], torch.cat([part.reshape(-1) for part in parts]), **CLOSE)


def test_no_graph_is_left_behind():
    encoder = UMBC(DIM, 3).eval()
    part = next(iter(explain_set(encoder, InMemory(torch.randn(20, DIM)), lambda z: z.sum(-1))))
    assert not part.attention.requires_grad
    assert not part.contribution.requires_grad
    assert encoder.to_value.weight.grad is None


def test_also_where_gradients_are_off():
    encoder, bag = UMBC(DIM, 3).double().eval(), InMemory(elements(), chunk_size=4)
    with torch.no_grad():
        there = explained(encoder, bag)
    torch.testing.assert_close(there, explained(encoder, bag), **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ZOO)
def test_on_a_gpu_it_is_the_same(name):
    encoder, bag = ZOO[name].double().eval(), InMemory(elements(), chunk_size=4)
    wanted, alone = explained(encoder, bag), torch.cat(list(score_alone(encoder, bag, flat)))
    encoder.cuda()
    try:
        there = explained(encoder, bag)
        alone_there = torch.cat(list(score_alone(encoder, bag, flat)))
    finally:
        encoder.cpu()
    assert there[0].is_cuda
    torch.testing.assert_close((there[0].cpu(), there[1].cpu(), alone_there.cpu()), (*wanted, alone), **CLOSE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e, x: explain_set(e.train(), InMemory(x), score), "training mode"),
        (lambda e, x: explain_set(e, InMemory(x.expand(2, 13, DIM)), score), r"batch of shape \(2,\)"),
        (lambda e, x: explain_set(e, x, score), "wanted a ChunkedSet"),
        (lambda e, x: explain_set(e, InMemory(x), lambda z: z), r"scores of shape \(3, 5\), wanted \(C\)"),
        (lambda e, x: score_alone(e.train(), InMemory(x), score), "training mode"),
    ],
)
def test_bad_use(call, words):
    with pytest.raises(ValueError, match=words):
        call(UMBC(DIM, 3).double().eval(), elements())
