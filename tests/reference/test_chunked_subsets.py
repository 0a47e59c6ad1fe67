"""k-subsets of sets in chunks: the numbers and the samples of `KSubset`, whatever the chunks are."""

import itertools
import math

import pytest
import torch
from small_subsets import randn
from torch import Tensor
from torch.distributions import kl_divergence

from distset.sets import Chunk, InMemory
from distset.states import merge_tree
from distset.subsets import ChunkedKSubset, CountPmf, KSubset, LogitTable

PARTITIONS: list[dict] = [
    {"chunk_size": None},
    {"chunk_size": 128},
    {"chunk_size": 77},
    {"bounds": [0, 1, 2, 130, 131, 512, 999, 1000]},
]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_equal_to_in_memory_for_any_partition(partition: dict) -> None:
    logits = randn(1000)
    whole, parts = KSubset(logits, 90), ChunkedKSubset(InMemory(logits.unsqueeze(-1), **partition), 90)
    torch.testing.assert_close(parts.log_normalizer(), whole.log_normalizer(), rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.entropy(), whole.entropy(), rtol=1e-13, atol=0)
    pi = torch.cat(list(parts.inclusion_probabilities()), -1)
    torch.testing.assert_close(pi, whole.inclusion_probabilities(), rtol=1e-12, atol=1e-14)
    z = torch.cat(list(parts.sample((40,), seed=3)), -1)
    assert (z == whole.sample((40,), seed=3)).all()
    indices = parts.sample_indices((40,), seed=3)
    assert (indices == whole.sample_indices((40,), seed=3)).all()
    torch.testing.assert_close(parts.log_prob(indices), whole.log_prob(z), rtol=1e-13, atol=0)
    assert (torch.cat(list(parts.mode()), -1) == whole.mode).all()
    assert (parts.mode_indices() == whole.mode.nonzero().squeeze(-1)).all()
    logits = torch.stack([logits, randn(1000, seed=1)], -1)
    both = InMemory(logits, **partition)
    p, q = (ChunkedKSubset(both, 90, logits=Column(i)) for i in range(2))
    exact = kl_divergence(whole, KSubset(logits[:, 1], 90))
    torch.testing.assert_close(p.kl_divergence(q), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("partition", PARTITIONS[1:])
def test_batches_masks_and_infinite_logits(partition: dict) -> None:
    logits = randn(3, 1000)
    logits[0, 5], logits[1, 700:] = math.inf, -math.inf
    mask = torch.ones(3, 1000, dtype=torch.bool)
    mask[2, 400:] = False
    k = torch.tensor([120, 700, 9])
    parts = ChunkedKSubset(InMemory(logits.unsqueeze(-1), mask=mask, **partition), k)
    whole = KSubset(logits.masked_fill(~mask, -math.inf), k)
    torch.testing.assert_close(parts.log_normalizer(), whole.log_normalizer())
    pi = torch.cat(list(parts.inclusion_probabilities()), -1)
    torch.testing.assert_close(pi, whole.inclusion_probabilities(), rtol=1e-12, atol=1e-14)
    z = torch.cat(list(parts.sample((10,), seed=1)), -1)
    assert (z == whole.sample((10,), seed=1)).all()
    assert (z.sum(-1) == k).all()
    assert (torch.cat(list(parts.mode()), -1) == whole.mode).all()
    torch.testing.assert_close(parts.kl_divergence(parts), torch.zeros(3).double(), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="k: differs between rows"):
        parts.mode_indices()


class Column:
    """Scores elements by one of their numbers."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, chunk: Chunk) -> Tensor:
        return chunk.elements[..., self.number]


def test_subsets_that_cannot_be_and_ties() -> None:
    logits = torch.tensor([[0.0, math.inf, 1.0, 1.0, -math.inf, 1.0, 0.5], [0.0] * 7], dtype=torch.float64)
    set = InMemory(logits.unsqueeze(-1), chunk_size=3)
    parts, whole = ChunkedKSubset(set, 3), KSubset(logits, 3)
    assert parts.mode_indices().tolist() == [[1, 2, 3], [0, 1, 2]]
    tries = torch.tensor([[1, 2, 6], [0, 2, 3], [1, 2, 4], [1, 2, 2]])  # right; 1 missing; 4 impossible; 2 twice
    z = torch.zeros(4, 7).scatter(-1, tries, 1.0)
    both = tries.unsqueeze(1).expand(4, 2, 3)
    torch.testing.assert_close(parts.log_prob(both), whole.log_prob(z.unsqueeze(1).expand(4, 2, 7)))
    assert parts.log_prob(both)[1:, 0].tolist() == [-math.inf] * 3
    free = ChunkedKSubset(set, 3, logits=lambda chunk: torch.zeros(2, chunk.size))
    assert free.kl_divergence(parts).tolist() == [math.inf, 0.0]
    torch.testing.assert_close(parts.kl_divergence(free), kl_divergence(whole, KSubset(torch.zeros(2, 7).double(), 3)))
    assert parts.kl_divergence(ChunkedKSubset(set, 2)).tolist() == [math.inf] * 2
    for call, message in (
        (lambda: parts.log_prob(both + 1), "indices: got 1 to 7, wanted 0 to 6"),
        (lambda: parts.log_prob(tries[0]), "indices: got torch.int64 .3,., wanted"),
        (lambda: parts.log_prob(both.float()), "indices: got torch.float32"),
        (
            lambda: parts.kl_divergence(ChunkedKSubset(InMemory(logits.unsqueeze(-1)), 3)),
            "other: .* wanted one over the same",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_few_elements_are_sampled_as_in_memory() -> None:
    logits = randn(20)
    parts = ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=6), 7)
    assert (parts.sample_indices((30,), seed=2) == KSubset(logits, 7).sample_indices((30,), seed=2)).all()


@pytest.mark.parametrize("k", [0, 100])
def test_nothing_and_everything(k: int) -> None:
    logits = randn(100)
    parts = ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=30), k)
    assert (torch.cat(list(parts.sample((2,), seed=0)), -1) == float(k > 0)).all()
    assert (torch.cat(list(parts.mode()), -1) == float(k > 0)).all()
    assert parts.log_prob(parts.mode_indices()) == 0
    torch.testing.assert_close(parts.log_normalizer(), logits.sum() if k else torch.tensor(0.0).double())


def test_logits_are_a_function_of_chunks() -> None:
    elements, weight = randn(300, 4), randn(4, seed=1)
    parts = ChunkedKSubset(InMemory(elements, chunk_size=64), 12, logits=lambda chunk: chunk.elements @ weight)
    torch.testing.assert_close(parts.log_normalizer(), KSubset(elements @ weight, 12).log_normalizer())


def test_bad_input() -> None:
    elements = randn(50, 1)
    with pytest.raises(ValueError, match="k: got 51"):
        ChunkedKSubset(InMemory(elements, 20), 51)
    with pytest.raises(ValueError, match="width 3, wanted 1"):
        ChunkedKSubset(InMemory(randn(50, 3), 20), 5)
    with pytest.raises(ValueError, match="logits: got shape"):
        ChunkedKSubset(InMemory(elements, 20), 5, logits=lambda chunk: chunk.elements)
    with pytest.raises(ValueError, match="logits: got a table of 51, wanted 50"):
        ChunkedKSubset(InMemory(elements, 20), 5, logits=LogitTable(torch.zeros(51)))
    with pytest.raises(ValueError, match=r"logits: got shape \(50, 1\), wanted a tensor \(n\)"):
        LogitTable(elements)
    elements[33] = math.nan
    with pytest.raises(ValueError, match="NaN in chunk 1"):
        ChunkedKSubset(InMemory(elements, 20), 5)
    elements[33] = -math.inf
    with pytest.raises(ValueError, match="1 are -inf or masked"):
        ChunkedKSubset(InMemory(elements, 20), 50)


def test_what_a_chunk_sends_up_is_small() -> None:
    from distset.subsets.chunked import _exports

    parts = ChunkedKSubset(InMemory(randn(1 << 16, 1), chunk_size=1 << 13), 1000)
    for chunk in (0, 5):
        exports = _exports(parts.set.chunk(chunk), parts._rows, parts._rule.tilt)  # type: ignore[attr-defined]
        assert sum(level.counts.pmf.numel() for level in exports.values()) * 8 < 8192
    odd = Chunk(randn(1000, 1), id=1, start=4097)
    exports = _exports(odd, parts._rows, parts._rule.tilt)
    covered = sorted((int(p) << n, (int(p) + 1) << n) for n, level in exports.items() for p in level.positions)
    assert covered[0][0] == 4097
    assert covered[-1][1] == 5097
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


def test_count_pmfs_merge_as_states_do() -> None:
    p = torch.sigmoid(randn(37))
    states = [CountPmf.of(x, 1 - x) for x in p]
    one, other = merge_tree(states), merge_tree(states[:20]).merge(merge_tree(states[20:]))
    exact = torch.ones(1, dtype=torch.float64)
    for x in p:
        exact = torch.nn.functional.pad(exact, (0, 1)) * (1 - x) + torch.nn.functional.pad(exact, (1, 0)) * x
    for state in (one, other):
        counts = torch.arange(int(state.low), min(int(state.low) + len(state.pmf), 38))
        torch.testing.assert_close(state.pmf[: len(counts)], exact[counts], rtol=1e-13, atol=1e-17)
        torch.testing.assert_close(state.mean, p.sum())


def test_windows_hold_all_but_nothing_of_the_mass() -> None:
    p = torch.sigmoid(randn(4000) - 2)
    state = merge_tree([CountPmf.of(x, 1 - x) for x in p])
    assert len(state.pmf) < 500
    torch.testing.assert_close(state.pmf.sum(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
