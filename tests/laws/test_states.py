"""States against the laws of merging."""

import pytest
import torch
from laws.zoo import DIM, encoders

from distset import InMemory
from distset.encode import Sweep, _chunk_state, _Inputs, _Precision
from distset.seeds import generator_for
from distset.states import Max, Mean, Product, Softmax, Sum, TopK, merge_nodes, merge_siblings, merge_tree
from distset.testing import check_state


def states(kind: str) -> list:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    one = torch.ones((), dtype=torch.float64)
    made = {
        "sum": lambda i: Sum(draw(3), (i + 1) * one),
        "mean": lambda i: Mean(draw(3), (i + 1) * one),
        "softmax": lambda i: Softmax(draw(2, 3), draw(2, 1).exp(), 100 * draw(2, 1)),
        "softmax-with-an-empty-chunk": lambda i: (
            Softmax(draw(2, 3), draw(2, 1).exp(), draw(2, 1))
            if i
            else Softmax(
                torch.zeros(2, 3).double(),
                torch.zeros(2, 1).double(),
                torch.full((2, 1), torch.finfo(torch.float64).min, dtype=torch.float64),
            )
        ),
        "max": lambda i: Max(draw(3), torch.ones(3).double()),
        "max-with-ties": lambda i: Max(torch.tensor([1.0, float(i)]).double(), torch.tensor([i + 1.0, 1.0]).double()),
        "top-k": lambda i: TopK.of(draw(4), draw(4, 2), torch.arange(4 * i, 4 * i + 4), 3),
        "top-k-with-ties": lambda i: TopK.of(torch.ones(2).double(), draw(2, 2), torch.arange(2 * i, 2 * i + 2), 3),
        "product": lambda i: Product((Mean(draw(3), one), Max(draw(2), torch.ones(2).double()))),
    }
    return [made[kind](i) for i in range(4)]


@pytest.mark.parametrize(
    "kind",
    ["sum", "mean", "softmax", "softmax-with-an-empty-chunk", "max", "max-with-ties", "top-k", "top-k-with-ties", "product"],
)
def test_merge_laws(kind):
    assert check_state(states(kind)) <= 1e-10


def test_top_k_is_the_top_k_of_all():
    scores, payload = torch.randn(20), torch.randn(20, 3)
    whole = TopK.of(scores, payload, torch.arange(20), 5)
    parts = [TopK.of(scores[i : i + 4], payload[i : i + 4], torch.arange(i, i + 4), 5) for i in range(0, 20, 4)]
    merged = merge_tree(parts)
    assert merged.ids.tolist() == scores.argsort(descending=True)[:5].tolist() == whole.ids.tolist()
    assert torch.equal(merged.payload, payload[merged.ids])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_contiguous_runs_give_the_bits_of_the_whole(n):
    """Two workers with a run of chunks each send tree nodes up; the merged bits are those of one worker, at any cut."""
    parts = [Mean(torch.randn(4), torch.tensor(1.0)) for _ in range(n)]
    want = merge_tree(parts).total
    for cut in range(n + 1):
        nodes = [(0, id, part) for id, part in enumerate(parts)]
        left, right = merge_siblings(nodes[:cut]), merge_siblings(nodes[cut:])
        assert len(left) + len(right) <= 2 * n.bit_length()
        assert torch.equal(merge_nodes(left + right).total, want)


def test_no_states():
    with pytest.raises(ValueError, match="the set is empty"):
        merge_tree([])


@pytest.mark.parametrize("name", ["deepsets-max", "umbc-softmax-folded", "sse", "extractor-and-two"])
def test_states_of_real_encoders(name):
    encoder = encoders()[name].double().eval()
    query = encoder.query(torch.Size(), generator_for(0), None)
    inputs = _Inputs.of(encoder, query)
    sweep = Sweep(encoder, inputs.detached(), 0, _Precision.current(inputs))
    parts = list(InMemory(torch.randn(8, DIM, dtype=torch.float64), 2).map(_chunk_state, sweep))
    assert check_state(parts) <= 1e-10
