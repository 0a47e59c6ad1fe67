"""What travels between processes arrives bit for bit, and only what is looked at travels."""

import pytest
import torch
from torch import nn

from distset.cluster.layout import runs
from distset.cluster.wire import device_of, dumps, loads, pack, unpack
from distset.states import merge_siblings

TENSORS = {
    "transposed": torch.randn(3, 4).mT,
    "empty": torch.randn(5)[2:2],
    "scalar": torch.tensor(2.0),
    "expanded": torch.randn(2, 1).expand(2, 7),
    "bfloat16": torch.randn(3).bfloat16(),
    "complex": torch.randn(3, dtype=torch.complex128),
    "bool": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(2)),
    "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
    "leaf": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_keep_bits_strides_and_kind(name):
    sent = TENSORS[name]
    for got in (unpack(pack(sent)), loads(dumps(sent))):
        assert torch.equal(got, sent)
        assert got.stride() == sent.stride()
        assert got.requires_grad == sent.requires_grad
        assert type(got) is type(sent)
        assert got.data_ptr() != sent.data_ptr() or not sent.numel()


def test_a_view_travels_without_what_lies_under_it():
    large = torch.randn(1000, 1000)
    assert pack(large[:2]).nbytes < 10_000
    assert pack(large[:, 3]).nbytes < 10_000
    assert torch.equal(unpack(pack(large[:, 3])), large[:, 3])


def test_a_module_has_one_parameter_where_it_had_one():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    got = unpack(pack(tied))
    assert got[0].weight is got[1].weight
    assert torch.equal(got[0].bias, tied[0].bias)
    assert device_of({"a": [tied]}) == torch.device("cpu")
    assert unpack(pack(torch.device("cuda", 1)), torch.device("cpu")) == torch.device("cpu")


def test_a_graph_stays_where_it_is():
    with pytest.raises(ValueError, match="gradients do not follow it"):
        pack([torch.ones(2, requires_grad=True) * 2])


class Nothing:
    def merge(self, other):
        return self


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 12])
def test_runs_are_even_and_hold_few_whole_nodes(parts):
    nodes: list[int] = []
    for count in [*range(1, 300), 1_221, 12_207, 122_071]:
        found = runs(count, parts)
        assert [i for run in found for i in run] == list(range(count))
        assert len(found) == parts
        assert max(map(len, found)) <= count / parts * 1.125 + 1
        nodes += [len(merge_siblings((0, i, Nothing()) for i in run)) for run in found]
    assert max(nodes) <= 12
    assert sum(nodes) / len(nodes) <= 4
