"""A million small sets, and a table of ten million rows: what they take to write, to open and to read."""

from __future__ import annotations

import gzip
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch

from distset.data import Bag, Store, StoreWriter, ingest
from distset.data.readers import baskets, table


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def small_bags(count, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 20, count)
    rows = generator.standard_normal((int(sizes.sum()), 8)).astype(np.float32)
    for number, last in enumerate(sizes.cumsum()):
        yield Bag(f"s{number}", rows[last - sizes[number] : last], label=str(number % 2))


def write(path, count):
    with StoreWriter(path) as writer:
        for bag in small_bags(count):
            writer.add(bag)
        return writer.finish()


def test_many_small_sets_come_back(tmp_path):
    store = write(tmp_path, 3000)
    assert os.path.getsize(tmp_path / "shards" / "part-00000.parquet") < 3 * sum(store.sets["n"].to_pylist()) * 32
    for bag in list(small_bags(3000))[::7]:
        disk = store.open(bag.set_id)
        assert np.array_equal(disk.chunk(0).elements.numpy(), bag.elements[disk.rows().numpy()])
    assert list(store.verify()) == store.ids
    assert store.cases == {name: name for name in store.ids}


@pytest.mark.slow
def test_a_million_small_sets(tmp_path):
    before, began = megabytes(), time.process_time()
    store = write(tmp_path, 1_000_000)
    written, began = time.process_time() - began, time.process_time()
    wrote = megabytes() - before
    del store
    before = megabytes()
    store = Store(tmp_path)
    opened, took = time.process_time() - began, megabytes() - before
    began, order = time.process_time(), np.random.default_rng(0).permutation(len(store))[:50_000]
    total = sum(float(store.open(store.ids[i]).chunk(0).elements[0, 0]) for i in order)
    rate = len(order) / (time.process_time() - began)
    disk = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) / 2**20
    print(
        f"written in {written:.0f} s (+{wrote:.0f} MB), {disk:.0f} MB on disk, opened in {opened:.1f} s (+{took:.0f} MB), "
        f"{rate:,.0f} sets/s"
    )
    assert np.isfinite(total)
    assert disk < 3.5 * 9.5e6 * 32 / 2**20
    assert opened < 20
    assert took < 1200
    assert rate > 2000


# One set a line


def test_baskets_are_sets_of_their_items(tmp_path):
    lines = ["3 1 2", "7", "", "5 5 9 "]
    with gzip.open(tmp_path / "retail.dat.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    store = ingest(baskets(tmp_path / "retail.dat.gz"), tmp_path / "s")
    assert store.ids == ["basket-0000000", "basket-0000001", "basket-0000003"]
    found = [sorted(store.open(name).chunk(0).elements[:, 0].tolist()) for name in store.ids]
    assert found == [[1, 2, 3], [7], [5, 5, 9]]
    (tmp_path / "words.dat").write_text("1 2\nmilk 3\n")
    with pytest.raises(ValueError, match=r"words.dat: .*line 2 is 'milk 3', wanted numbers"):
        baskets(tmp_path / "words.dat")
    for word in ("-3", "16777217", "9" * 30):
        (tmp_path / "large.dat").write_text(f"1 2\n5 {word}\n")
        with pytest.raises(ValueError, match=f"line 2 is '5 {word}', wanted numbers of 0 to 16777216"):
            baskets(tmp_path / "large.dat")


def test_the_retail_baskets(data_folder, tmp_path):
    source = baskets(data_folder / "belgian_retail" / "retail.dat.gz")
    assert len(source.ids) == 88_162
    assert sum(len(source.read(name).elements) for name in source.ids[:3]) == 36
    sizes = np.diff(source.borders)
    assert (int(sizes.sum()), int(sizes.min()), int(sizes.max())) == (908_576, 1, 76)


# One table that is one set


def whole(path, n, *, groups=1000, dim=5, kind="parquet", seed=0):
    generator = np.random.default_rng(seed)
    fields = [pa.field(f"f{i}", pa.float32()) for i in range(dim)] + [
        pa.field("x", pa.float64()),
        pa.field("y", pa.float64()),
    ]
    schema = pa.schema(fields)
    rows = generator.standard_normal((n, dim)).astype(np.float32)
    columns = [*rows.T, np.arange(n, dtype=float), -np.arange(n, dtype=float)]
    content = pa.table([pa.array(np.ascontiguousarray(column)) for column in columns], schema=schema)
    if kind == "csv":
        pacsv.write_csv(content, path)
    else:
        pq.write_table(content, path, row_group_size=groups)
    return rows


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("spool", [0, 2**30])
def test_a_table_can_be_one_set(tmp_path, monkeypatch, kind, spool):
    """Shuffled through the disk or in memory, with the same bytes."""
    from distset.data.readers import tables

    monkeypatch.setattr(tables, "SPOOL_BYTES", spool)
    monkeypatch.setattr("distset.data.shuffle.BUCKET_BYTES", 40_000)
    rows = whole(tmp_path / f"all.{kind}", 20_000, kind=kind)
    store = ingest(table(tmp_path / f"all.{kind}", set_id=None), tmp_path / "s", dtype="float32")
    (bag,) = [store.open(name, 1000) for name in store.ids]
    assert store.ids == ["all"]
    order = bag.rows().numpy()
    assert np.array_equal(np.sort(order), np.arange(20_000))
    assert np.array_equal(torch.cat([chunk.elements for chunk in bag.map(lambda chunk: chunk)]).numpy(), rows[order])
    assert np.array_equal(bag.coords().numpy(), np.stack([order, -order], -1))
    assert store.record("all").checksum == CHECKSUMS.setdefault(kind, store.record("all").checksum)


CHECKSUMS: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table_larger_than_the_memory_it_takes(tmp_path, kind):
    """Ten million rows of 32 numbers, 1.2 GB, in 400 MB of memory; as CSV a million."""
    n, dim = (10_000_000, 32) if kind == "parquet" else (1_000_000, 32)
    fields = pa.schema([pa.field(f"f{i}", pa.float32()) for i in range(dim)])
    generator, path = np.random.default_rng(0), tmp_path / f"all.{kind}"
    with pq.ParquetWriter(path, fields) if kind == "parquet" else pacsv.CSVWriter(path, fields) as file:
        for _ in range(n // 100_000):
            block = generator.random((dim, 100_000), dtype=np.float32)
            file.write_table(pa.table(list(block), schema=fields))
    peak, before = [0.0], megabytes()
    write_group = pq.ParquetWriter.write_table

    def watched(self, *args, **kwargs):
        peak[0] = max(peak[0], megabytes() - before)
        return write_group(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", watched)
        began = time.process_time()
        store = ingest(table(path, set_id=None), tmp_path / "s")
        seconds = time.process_time() - began
    print(f"{kind}: {n:,} rows in {seconds:.0f} s of CPU, peak +{peak[0]:.0f} MB")
    assert store.info.num_elements == n
    assert peak[0] < 400
    first = store.open("all", 8192).chunk(0).elements
    assert abs(float(first.mean()) - 0.5) < 0.01
