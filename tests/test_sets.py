"""Chunked sets: borders, masks, padding, and what is refused."""

import pytest
import torch

from distset import InMemory, pad_sets
from distset.sets import added


def test_chunks_cover_the_set_once():
    x = torch.arange(10.0).unsqueeze(-1)
    for size in (1, 3, 10, 99, None):
        chunks = list(InMemory(x, size).map(lambda chunk: chunk))
        assert torch.equal(torch.cat([c.elements for c in chunks]), x)
        assert [c.start for c in chunks] == [int(c.elements[0, 0]) for c in chunks]
        assert [c.id for c in chunks] == list(range(len(chunks)))


def test_whole_is_the_set_in_one_chunk():
    x, mask = torch.arange(20.0).reshape(2, 10, 1), torch.arange(10) < torch.tensor([[10], [7]])
    for size in (3, None):
        chunk = InMemory(x, size, mask=mask).whole()
        assert torch.equal(chunk.elements, x)
        assert torch.equal(chunk.mask, mask)
        assert (chunk.id, chunk.start, chunk.size) == (0, 0, 10)
    images = InMemory(torch.rand(5, 2, 3, 3), 2, element_ndim=3)
    assert torch.equal(images.whole().elements, images.elements)
    assert InMemory(images.elements, element_ndim=3).whole().elements.data_ptr() == images.elements.data_ptr()


def test_sum_adds_without_touching_its_parts():
    parts = [torch.ones(2).expand(3, 2), torch.ones(3, 2)]
    total = InMemory(torch.zeros(2, 1), 1).sum(lambda chunk: (parts[chunk.id], None))
    assert torch.equal(total[0], torch.full((3, 2), 2.0))
    assert total[1] is None
    assert torch.equal(parts[1], torch.ones(3, 2))


def test_one_tensor_in_two_places_is_added_to_once():
    """Parameters that are added up (a weight and its update) have one and the same gradient."""
    both = torch.ones(2)
    assert [total.tolist() for total in added(iter([(both, both), (both, both), (both, both)]))] == [[3, 3], [3, 3]]
    assert both.tolist() == [1, 1]


def test_pad_sets():
    elements, mask = pad_sets([torch.ones(2, 3), torch.ones(1, 3)])
    assert elements[1, 1].tolist() == [0, 0, 0]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InMemory([[1.0, 2.0]]), "elements: got list, wanted a tensor"),
        (lambda: InMemory(torch.zeros(0, 3)), "empty set"),
        (lambda: InMemory(torch.zeros(3)), r"wanted \(\*, N, ...\)"),
        (lambda: InMemory(torch.zeros(3, 2), 0), "chunk_size: got 0"),
        (lambda: InMemory(torch.zeros(3, 2), 2, bounds=[0, 3]), "wanted one of them"),
        (lambda: InMemory(torch.zeros(3, 2), bounds=[0, 2, 2, 3]), "ascending borders from 0 to 3"),
        (lambda: InMemory(torch.zeros(2, 3, 2), mask=torch.ones(2, 2, dtype=torch.bool)), r"shape \(2, 3\)"),
        (lambda: InMemory(torch.zeros(2, 3, 2), mask=torch.tensor([[True] * 3, [False] * 3])), "no element at all"),
        (lambda: pad_sets([]), "got none"),
        (lambda: pad_sets([torch.zeros(2, 3), torch.zeros(2, 4)]), "wanted one shape"),
        (lambda: pad_sets([torch.zeros(2, 3), torch.zeros(0, 3)]), "set 1 of the batch is empty"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
