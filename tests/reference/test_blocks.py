"""Blocks against loops written from the papers' formulas, one set, one head, one element at a time, in float64."""

import math

import pytest
import torch
from torch import nn

from distset import UMBC, InMemory, encode_set
from distset.blocks import ISAB, MAB, MLP, PMA, SAB, DiffEM, FSPool, Mixture, SetTransformer

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
DIM = 6


def sets(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A padded batch (2, 2) of sets of 1 to 5 elements, with rubbish where nothing is."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [5, 3, 1, 4]
    x = torch.randn(2, 2, 5, DIM, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(sizes).view(2, 2, 1)
    return x, mask, sizes


def each(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return [one[:n] for one, n in zip(x.flatten(0, 1), sizes, strict=True)]


def build(block: nn.Module) -> nn.Module:
    """In float64, with every parameter random: zeros and ones of an initialisation hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in block.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return block


def mab_by_loops(block: MAB, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """MAB of one set, query by query and head by head."""
    rows, x, y = [], x.detach(), y.detach()
    for query in block.to_query(x).detach():
        width = len(query) // block.heads
        attended = []
        for head in range(block.heads):
            own = slice(head * width, (head + 1) * width)
            logits = [float(query[own] @ key[own]) / math.sqrt(width) for key in block.to_key(y).detach()]
            weights = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
            attended.append(sum(w * value[own] for w, value in zip(weights, block.to_value(y), strict=True)))
        h = block.norm_attention(query + torch.cat(attended))
        rows.append(block.norm_out(h + torch.relu(block.to_out(h))))
    return torch.stack(rows)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_mab_is_its_formula(heads, layer_norm):
    block = build(MAB(3, DIM, dim_out=8, heads=heads, layer_norm=layer_norm))
    x, mask, sizes = sets()
    queries = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    got = block(queries, x, mask).flatten(0, 1)
    for out, query, elements in zip(got, queries.flatten(0, 1), each(x, sizes), strict=True):
        torch.testing.assert_close(out, mab_by_loops(block, query, elements), **CLOSE)


def test_sab_isab_pma_are_their_formulas():
    sab, isab = build(SAB(DIM, dim_out=8)), build(ISAB(DIM, 3, dim_out=8))
    pma = build(PMA(DIM, 2, dim_out=8))
    x, mask, sizes = sets()
    outs = sab(x, mask).flatten(0, 1), isab(x, mask).flatten(0, 1), pma(x, mask).flatten(0, 1)
    for i, one in enumerate(each(x, sizes)):
        torch.testing.assert_close(outs[0][i, : len(one)], mab_by_loops(sab.mab, one, one), **CLOSE)
        induced = mab_by_loops(isab.induce, isab.points, one)
        torch.testing.assert_close(outs[1][i, : len(one)], mab_by_loops(isab.spread, one, induced), **CLOSE)
        torch.testing.assert_close(outs[2][i], mab_by_loops(pma.mab, pma.seeds, one), **CLOSE)


@pytest.mark.parametrize("pieces", [1, 3, 20])
def test_fspool_is_its_formula(pieces):
    block = build(FSPool(DIM, pieces))
    x, mask, sizes = sets()
    got = block(x, mask).flatten(0, 1).detach()
    for i, one in enumerate(each(x, sizes)):
        for d in range(DIM):
            ordered = sorted(one[:, d].tolist(), reverse=True)
            total = 0.0
            for j, value in enumerate(ordered):
                r = j / max(len(one) - 1, 1)
                total += value * sum(
                    max(0.0, 1 - abs(pieces * r - p)) * float(block.knots.detach()[p, d]) for p in range(pieces + 1)
                )
            assert float(got[i, d]) == pytest.approx(total, rel=1e-10, abs=1e-11)


def em_by_loops(x: torch.Tensor, m: torch.Tensor, v: torch.Tensor, steps: int, tau: float) -> tuple[list, list, list]:
    """EM of one set and one head in plain numbers: one component, one feature at a time."""
    c, d = m.shape
    pi, mu, var = [1 / c] * c, m.tolist(), v.tolist()
    for _ in range(steps):
        q = []
        for row in x.tolist():
            likelihood = [
                pi[k]
                * math.prod(math.exp(-((row[j] - mu[k][j]) ** 2) / (2 * var[k][j])) / var[k][j] ** 0.5 for j in range(d))
                for k in range(c)
            ]
            q.append([one / sum(likelihood) for one in likelihood])
        n = [tau + sum(row[k] for row in q) for k in range(c)]
        pi = [one / sum(n) for one in n]
        old = m.tolist(), v.tolist()
        mu = [
            [(tau * old[0][k][j] + sum(w[k] * row[j] for w, row in zip(q, x.tolist()))) / n[k] for j in range(d)]
            for k in range(c)
        ]
        var = [
            [
                (
                    tau * (old[1][k][j] + (old[0][k][j] - mu[k][j]) ** 2)
                    + sum(w[k] * (row[j] - mu[k][j]) ** 2 for w, row in zip(q, x.tolist()))
                )
                / n[k]
                for j in range(d)
            ]
            for k in range(c)
        ]
    return pi, mu, var


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_diffem_is_expectation_maximization(tau):
    block = build(DiffEM(DIM, 3, heads=2, steps=4, tau=tau))
    x, mask, sizes = sets()
    rows = block(x, mask).flatten(0, 1)
    assert rows.shape == (4, 6, 1 + 2 * DIM)
    variance = nn.functional.softplus(block.rho)
    for i, one in enumerate(each(x, sizes)):
        for head in range(2):
            pi, mu, var = em_by_loops(one, block.mean[head], variance[head], 4, tau)
            got = rows[i, 3 * head : 3 * head + 3]
            wanted = torch.tensor([[p, *m, *v] for p, m, v in zip(pi, mu, var, strict=True)], dtype=torch.float64)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def objective(block: DiffEM, x: torch.Tensor) -> float:
    """The log-posterior of `DiffEM`'s docstring, by torch.distributions."""
    fitted = block.fit(x)
    mixture = Mixture(*(part[0] for part in fitted))
    each = torch.distributions.Independent(torch.distributions.Normal(mixture.mean, mixture.variance.sqrt()), 1)
    likelihood = (
        torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weight), each).log_prob(x).sum()
    )
    if block.tau == 0:
        return float(likelihood)
    m, v = block.mean[0], nn.functional.softplus(block.rho[0])
    expected = each.log_prob(m) - 0.5 * (v / mixture.variance).sum(-1)
    return float(likelihood + block.tau * (mixture.weight.log() + expected).sum())


@pytest.mark.parametrize("tau", [0.0, 0.3, 10.0])
def test_an_em_step_never_lowers_its_objective(tau):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x + 4 * torch.randint(3, (60, 1), generator=torch.Generator().manual_seed(4))
    values = []
    for steps in range(1, 30):
        block = build(DiffEM(2, 3, steps=steps, tau=tau))
        values.append(objective(block, x))
    rises = torch.tensor(values).diff()
    assert rises.min() > -1e-9 * abs(values[-1])
    assert values[-1] - values[0] > 1.0  # it went somewhere


def test_log_joint_is_the_density():
    x, mixture = (
        torch.randn(7, DIM).double(),
        Mixture(torch.rand(3).double(), torch.randn(3, DIM).double(), torch.rand(3, DIM).double()),
    )
    normal = torch.distributions.Normal(mixture.mean, mixture.variance.sqrt())
    wanted = mixture.weight.log() + normal.log_prob(x.unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(mixture.log_joint(x), wanted, **CLOSE)


def test_diffem_far_from_the_origin_and_after_a_collapse():
    far = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    block = DiffEM(2, 2, tau=0.1)
    near = block(far)
    block.mean.data += 1000.0
    there = block(far + 1000.0)
    torch.testing.assert_close(there[:, 3:], near[:, 3:], rtol=1e-3, atol=1e-3)
    collapsed = DiffEM(2, 4, tau=0.0, steps=20)
    out = collapsed(torch.ones(5, 2) * 100, None)
    out.sum().backward()
    assert out.isfinite().all()
    assert collapsed.mean.grad.isfinite().all()


BLOCKS = {
    "SAB": lambda: SAB(DIM, heads=2),
    "ISAB": lambda: ISAB(DIM, 3, heads=2),
    "PMA": lambda: PMA(DIM, 2, heads=2),
    "FSPool": lambda: FSPool(DIM, 4),
    "DiffEM": lambda: DiffEM(DIM, 3, heads=2, tau=1.0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_order_and_padding_do_not_matter(name):
    block = build(BLOCKS[name]())
    x, mask, sizes = sets()
    batched = block(x, mask).flatten(0, 1)
    for i, one in enumerate(each(x, sizes)):
        order = torch.randperm(len(one), generator=torch.Generator().manual_seed(i))
        alone, shuffled = block(one), block(one[order])
        if name in ("SAB", "ISAB"):
            torch.testing.assert_close(shuffled, alone[order], **CLOSE)
            torch.testing.assert_close(batched[i, : len(one)], alone, **CLOSE)
        else:
            torch.testing.assert_close(shuffled, alone, **CLOSE)
            torch.testing.assert_close(batched[i], alone, **CLOSE)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients(name):
    block = build(BLOCKS[name]())
    x, mask, _ = sets()
    x = x[0, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: block(t, mask[0, :1]), x)
    block(x, mask[0, :1]).square().sum().backward()
    missing = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize(
    "head",
    [
        lambda: SetTransformer(DIM, 2, blocks=2, heads=2),
        lambda: nn.Sequential(ISAB(DIM, 3, heads=2), FSPool(DIM), nn.Linear(DIM, 2)),
        lambda: nn.Sequential(DiffEM(DIM, 3), nn.Flatten(-2), MLP(3 * (1 + 2 * DIM), 16, 2, dropout=0.1)),
    ],
    ids=["SetTransformer", "FSPool", "DiffEM"],
)
def test_after_a_state_chunks_do_not_matter(head):
    torch.manual_seed(0)
    model, encoder = head().double().eval(), UMBC(DIM, 4).double()
    x = torch.randn(3, 50, DIM, dtype=torch.float64)
    whole = model(encode_set(encoder, InMemory(x)))
    parts = model(encode_set(encoder, InMemory(x, chunk_size=7)))
    assert whole.shape == (3, 2)
    torch.testing.assert_close(whole, parts, **CLOSE)


def test_dropout_is_off_in_evaluation():
    block = SAB(DIM, heads=2, dropout=0.5)
    x = torch.randn(4, 5, DIM)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_mlp_layers():
    kinds = [type(layer).__name__ for layer in MLP(4, 8, 8, 2, activation=nn.ReLU(), dropout=0.1)]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [type(layer).__name__ for layer in MLP(4, 2)] == ["Linear"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MAB(4, 6, heads=4), "heads: got 4, wanted a divisor"),
        (lambda: PMA(4, 0), "points, seeds: got 0"),
        (lambda: FSPool(4, 0), "pieces: got 0"),
        (lambda: DiffEM(4, 0), "components, heads, steps: got 0"),
        (lambda: DiffEM(4, 2, tau=-1.0), "tau, floor: got -1"),
        (lambda: MLP(4), r"widths: got \(4,\)"),
        (lambda: MLP(4, 0, 2), r"widths: got \(4, 0, 2\)"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
