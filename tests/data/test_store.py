"""The store: what goes in comes out, as the same chunks and the same bits as the same rows in memory."""

from __future__ import annotations

import io
import pickle
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distset import UMBC, Exact, InMemory, encode_set
from distset.data import Bag, Labelled, Store, StoreWriter, gaussian_bags, write_store
from distset.data.schema import DTYPES


def rows_of(n, shape, dtype, seed=0):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)) * 40
    return (x.abs() if dtype == "uint8" else x).to(DTYPES[dtype])


def stored(path, elements, *, group_rows=8192, shard_bytes=2**28, **bag):
    with StoreWriter(path, group_rows=group_rows, shard_bytes=shard_bytes) as writer:
        writer.add(Bag("a", elements, label="0", **bag))
        writer.add(Bag("b", elements, label="1"))
        return writer.finish()


def bits(x):
    return x.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (512,), (1, 8, 8), (3, 5, 4)])
def test_chunks_equal_those_of_the_same_rows_in_memory(tmp_path, dtype, shape):
    x = rows_of(103, shape, dtype)
    opened = stored(tmp_path, x, group_rows=40).open("a")
    memory = x[opened.rows()]
    for chunk_size in (None, 1, 7, 40, 64, 103, 500):
        disk = Store(tmp_path).open("a", chunk_size)
        twin = InMemory(memory, chunk_size, element_ndim=len(shape))
        assert disk.sizes == twin.sizes
        for ours, theirs in zip(disk.map(lambda c: c), twin.map(lambda c: c), strict=True):
            assert (ours.id, ours.start, ours.element_ndim) == (theirs.id, theirs.start, theirs.element_ndim)
            assert ours.elements.dtype == theirs.elements.dtype
            assert torch.equal(bits(ours.elements), bits(theirs.elements))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_encoding_and_gradient_have_the_bits_of_memory(tmp_path, dtype, prefetch):
    x = rows_of(1000, (12,), dtype) / 40
    torch.manual_seed(0)
    encoder = UMBC(dim=12, slots=4, heads=2)
    disk = stored(tmp_path, x, group_rows=256).open("a", 100, prefetch=prefetch)
    memory = InMemory(x[disk.rows()], 100, name="a")
    found = []
    for source in (disk, memory):
        encoder.zero_grad()
        z = encode_set(encoder.to(torch.float64 if dtype == "float64" else torch.float32), source, grad=Exact(), seed=3)
        z.square().sum().backward()
        found.append([bits(z.detach()), *(bits(p.grad) for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_the_asked_chunks_are_given(tmp_path):
    disk = stored(tmp_path, rows_of(50, (3,), "float32")).open("a", 8)
    assert list(disk.map(lambda c: (c.id, c.start), ids=[1, 4, 6])) == [(1, 8), (4, 32), (6, 48)]


def test_rows_are_a_seeded_permutation_and_everything_follows_it(tmp_path):
    n = 300
    x = torch.arange(n, dtype=torch.float32).unsqueeze(-1)
    coords = np.stack([np.arange(n), -np.arange(n)], -1).astype(float)
    store = stored(tmp_path / "s", x, group_rows=64, coords=coords, instance_labels=np.arange(n) % 7)
    bag = store.open("a", 50)
    rows = bag.rows()
    values = torch.cat([c.elements[:, 0] for c in bag.map(lambda c: c)])
    assert not torch.equal(rows, torch.arange(n))
    assert torch.equal(rows.sort().values, torch.arange(n))
    assert torch.equal(values, rows.float())
    assert torch.equal(bag.coords(), torch.stack([rows, -rows], -1).double())
    assert torch.equal(bag.instance_labels(), rows % 7)
    again = stored(tmp_path / "t", x, group_rows=64, coords=coords, instance_labels=np.arange(n) % 7)
    assert torch.equal(again.open("a").rows(), rows)


def test_a_set_without_coordinates_says_so(tmp_path):
    bag = stored(tmp_path, rows_of(5, (3,), "float32")).open("a")
    assert bag.coords() is None
    assert bag.instance_labels() is None


def test_changing_a_chunk_in_place_leaves_the_file_alone(tmp_path):
    store = stored(tmp_path, rows_of(50, (3,), "float32"))
    before = store.open("a").chunk(0).elements.clone()
    store.open("a").chunk(0).elements.zero_()
    assert torch.equal(store.open("a").chunk(0).elements, before)
    assert list(store.verify()) == ["a", "b"]


@pytest.mark.parametrize("dim", [33, 600])  # sets that share row groups, and sets that have their own
def test_elements_lie_in_one_block_that_any_parquet_reader_reads(tmp_path, dim):
    store = write_store(tmp_path, gaussian_bags(num_sets=9, size=(30, 300), dim=dim, dtype="float32"))
    for set_id in store.ids:
        record = store.record(set_id)
        assert dim == 33 or all(offset % 64 == 0 for offset in record.offsets)
        assert store.open(set_id).chunk(0).elements.data_ptr() % 64 == 0
        table = pq.read_table(tmp_path / record.file, filters=[("set_id", "==", set_id)])
        plain = np.stack([np.frombuffer(row, np.float32) for row in table["feature"].to_pylist()])
        assert np.array_equal(plain, store.open(set_id).chunk(0).elements.numpy())


def test_small_sets_share_row_groups(tmp_path):
    """Whatever they say of themselves: sizes, coordinates and labels are each set's own, large sets lie between them."""
    generator = np.random.default_rng(0)
    bags = []
    for number in range(60):
        n = 9000 if number == 30 else int(generator.integers(1, 60))
        coords = generator.uniform(0, 9, (n, 2)) if number % 3 else None
        labels = generator.integers(0, 5, n) if number % 4 else None
        bags.append(
            Bag(f"s{number}", generator.standard_normal((n, 4)).astype(np.float32), coords, labels, "ab"[number % 2])
        )
    with StoreWriter(tmp_path, group_rows=300) as writer:
        for bag in bags:
            writer.add(bag)
        store = writer.finish()
    assert pq.ParquetFile(tmp_path / "shards" / "part-00000.parquet").num_row_groups < 30 + 10
    assert list(store.verify()) == store.ids == [bag.set_id for bag in bags]
    for bag in bags:
        disk = store.open(bag.set_id, 7)
        rows = disk.rows().numpy()
        assert np.array_equal(torch.cat([c.elements for c in disk.map(lambda c: c)]).numpy(), bag.elements[rows])
        assert (disk.coords() is None) == (bag.coords is None)
        assert bag.coords is None or np.array_equal(disk.coords().numpy(), bag.coords[rows])
        assert (disk.instance_labels() is None) == (bag.instance_labels is None)
        assert bag.instance_labels is None or np.array_equal(disk.instance_labels().numpy(), bag.instance_labels[rows])


@pytest.mark.parametrize("n", [3, 20_000])  # a small set, a large one
def test_foreign_byte_orders_keep_their_values(tmp_path, n):
    x = rows_of(n, (4,), "float32").numpy()
    bag = stored(tmp_path, x.astype(">f4")).open("a")
    assert torch.equal(next(bag.map(lambda c: c.elements)), torch.from_numpy(x)[bag.rows()])


def test_a_set_can_be_pickled(tmp_path):
    bag = stored(tmp_path, rows_of(50, (3,), "float32")).open("a", 20)
    copy = pickle.loads(pickle.dumps(bag))
    assert torch.equal(copy.chunk(1).elements, bag.chunk(1).elements)


PIXELS = np.random.default_rng(0).integers(0, 256, (600, 6, 5, 3), dtype=np.uint8)


class Patches:
    """The bytes of PNG files."""

    def __len__(self):
        return len(PIXELS)

    def take(self, positions):
        return [self.encoded(PIXELS[i]) for i in positions]

    @staticmethod
    def encoded(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()


@pytest.mark.parametrize("prefetch", [True, False])
def test_images_are_decoded_from_their_files(tmp_path, prefetch):
    store = stored(tmp_path, Patches(), group_rows=128)
    assert (store.kind, store.element_shape, store.dtype) == ("images", (3, 6, 5), torch.uint8)
    bag = store.open("a", 250, prefetch=prefetch)
    chunks = list(bag.map(lambda c: c))
    assert [(c.id, c.start, c.size, c.element_ndim) for c in chunks] == [(0, 0, 250, 3), (1, 250, 250, 3), (2, 500, 100, 3)]
    found = torch.cat([c.elements for c in chunks])
    assert torch.equal(found, torch.from_numpy(PIXELS).permute(0, 3, 1, 2)[bag.rows()])
    assert [c.id for c in bag.map(lambda c: c, ids=[0, 2])] == [0, 2]
    assert list(store.verify()) == ["a", "b"]


def test_images_of_16_bits_are_refused_and_not_cut(tmp_path):
    class Deep(Patches):
        def take(self, positions):
            return [self.encoded(PIXELS[i, ..., 0].astype(np.uint16) << 8) for i in positions]

    with pytest.raises(ValueError, match="a: holds an image of mode I;16, whose values 8 bits would cut"):
        stored(tmp_path, Deep())


def test_a_sweep_of_images_that_is_given_up_leaves_no_thread(tmp_path):
    before = threading.active_count()
    sweep = stored(tmp_path, Patches()).open("a", 200).map(lambda c: c.id)
    assert next(sweep) == 0
    assert threading.active_count() > before
    sweep.close()
    assert threading.active_count() == before


def test_the_index_knows_labels_cases_and_what_the_reader_said(tmp_path):
    bags = [Bag(f"s{i}", np.ones((2, 3), np.float32), label="ab"[i % 2], extra={"patch_size": 256}) for i in range(4)]
    with StoreWriter(tmp_path) as writer:
        for bag in bags:
            writer.add(bag)
        store = writer.finish(labels={"s0": Labelled("p", "b"), "s1": Labelled("p", None)}, classes=["b", "a"])
    assert store.ids == ["s0", "s1", "s2", "s3"]
    assert store.sets["case_id"].to_pylist() == ["p", "p", "s2", "s3"]
    assert store.labels(["s0", "s2", "s3"]).tolist() == [0, 1, 0]
    assert store.record("s3").extra == {"patch_size": 256}
    with pytest.raises(ValueError, match=r"labels: 1 sets have none, the first is 's1'"):
        store.labels(store.ids)


def test_memory_does_not_grow_with_the_set(tmp_path):
    """Views of the file go with their chunk: the mappings that stand are those of the chunks in use."""
    bag = stored(tmp_path, rows_of(4000, (64,), "float32"), group_rows=500).open("a", 100)

    def mapped():
        with open("/proc/self/maps") as lines:
            return sum(str(tmp_path) in line for line in lines)

    counts = [mapped() for _ in bag.map(lambda c: float(c.elements.sum()))]
    assert max(counts) <= 3
    assert mapped() == 0
