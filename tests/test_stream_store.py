"""Streams in a folder: what was taken is there for the next process, whatever the last one was doing."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from distset import SSE, InMemory, encode_set
from distset.data.arrow_chunks import read_chunk, write_chunk
from distset.stream_store import StreamStore, Taken
from distset.tasks.document_models import umbc_set_transformer

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
CHUNKS = X.split(4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SSE(5, 3).eval()


def test_chunks_in_any_order_from_many_threads_and_a_new_process(encoder, tmp_path):
    store = StreamStore(tmp_path, encoder, (5,))
    order = [*range(0, 16, 2), *range(15, 0, -2), 3, 7, 0]  # some twice
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: store.take("a/b", number, CHUNKS[number]), order[:10]))
    again = StreamStore(tmp_path, encoder, (5,))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: again.take("a/b", number, CHUNKS[number]), order[10:]))
    value, taken = again.value("a/b")
    stream = encoder.stream()
    for number, chunk in enumerate(CHUNKS):
        stream.add(chunk, number)
    assert torch.equal(value, stream.value())
    torch.testing.assert_close(value, encode_set(encoder, InMemory(X), seed=0), atol=1e-5, rtol=1e-5)
    assert taken == Taken(False, 16, 64)
    assert again.take("a/b", 5, CHUNKS[5]) == Taken(False, 16, 64)
    assert len(again.places("a/b")) == 1


def test_a_death_between_the_merge_and_the_cleaning_counts_nothing_twice(encoder, tmp_path):
    store = StreamStore(tmp_path, encoder, (5,))
    store.take("s", 0, CHUNKS[0])
    left = tmp_path / "sets" / "s" / "0-0.safetensors"
    shutil.copy(left, tmp_path / "kept")
    store.take("s", 1, CHUNKS[1])
    assert not left.exists()
    shutil.copy(tmp_path / "kept", left)  # as if the process had died before it deleted it
    assert store.places("s") == [(1, 0)]
    assert store.take("s", 0, CHUNKS[0]) == Taken(False, 2, 8)
    for number in (2, 3):
        store.take("s", number, CHUNKS[number])
    stream = encoder.stream()
    for chunk in CHUNKS[:4]:
        stream.add(chunk)
    assert torch.equal(store.value("s")[0], stream.value())


def test_sets_are_dropped_and_expire(encoder, tmp_path):
    store = StreamStore(tmp_path, encoder, (5,))
    for name in ("old", "new", "gone"):
        store.take(name, 0, CHUNKS[0])
    assert store.drop("gone")
    assert not store.drop("gone")
    os.utime(tmp_path / "sets" / "old", (time.time() - 100,) * 2)
    assert store.expire(50) == ["old"]
    assert store.value("new")[1].chunks == 1
    with pytest.raises(KeyError):
        store.value("old")
    assert not list((tmp_path / "dropped").iterdir())


def test_a_chunk_that_comes_while_a_set_expires_is_kept(encoder, tmp_path, monkeypatch):
    store, taking, go_on = StreamStore(tmp_path, encoder, (5,)), threading.Event(), threading.Event()
    store.take("s", 0, CHUNKS[0])
    os.utime(tmp_path / "sets" / "s", (time.time() - 100,) * 2)
    insert = store._insert

    def slowly(*args):
        taking.set()
        assert go_on.wait(20)
        insert(*args)

    monkeypatch.setattr(store, "_insert", slowly)
    with ThreadPoolExecutor(2) as threads:
        taken = threads.submit(store.take, "s", 1, CHUNKS[1])
        assert taking.wait(20)
        expired = threads.submit(store.expire, 50)
        time.sleep(0.2)  # it waits for the lock
        assert not expired.done()
        go_on.set()
        assert (taken.result(), expired.result()) == (Taken(True, 2, 8), [])
    assert store.value("s")[1].chunks == 2


def test_one_at_a_time_while_a_set_is_dropped_again_and_again(encoder, tmp_path, monkeypatch):
    store, inside, most = StreamStore(tmp_path, encoder, (5,)), [], []
    insert = store._insert

    def counted(*args):
        inside.append(1)
        most.append(len(inside))
        insert(*args)
        inside.pop()

    monkeypatch.setattr(store, "_insert", counted)

    def work(turn):
        if turn % 3 == 0:
            store.drop("s")
            return True
        return store.take("s", turn, CHUNKS[turn % 16]).chunks >= 1  # its own is there when it is acknowledged

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(150)))
    assert max(most) == 1
    store.drop("s")
    assert not any(list((tmp_path / folder).iterdir()) for folder in ("sets", "dropped"))


def test_words_are_kept_for_the_next_process(tmp_path):
    torch.manual_seed(0)
    words = torch.randint(0, 30, (12, 1))
    encoder = umbc_set_transformer(30, 2, width=8)[0].eval()
    for number in (2, 0, 1):  # each time a process of its own
        StreamStore(tmp_path, encoder, (1,)).take("s", number, words[4 * number : 4 * number + 4])
    stream = encoder.stream()
    for chunk in words.split(4):
        stream.add(chunk)
    assert torch.equal(StreamStore(tmp_path, encoder, (1,)).value("s")[0], stream.value())


@pytest.mark.parametrize("name", ["weights", "sets", "dropped", "a/b", "a/..", "é?#%2F", "x" * 200])
def test_names_of_sets(encoder, tmp_path, name):
    store = StreamStore(tmp_path, encoder, (5,))
    assert store.take(name, 0, CHUNKS[0]).new
    assert StreamStore(tmp_path, encoder, (5,)).value(name)[1].chunks == 1
    assert store.expire(-1) == [name]


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "x" * 201, "é" * 40])
def test_names_that_cannot_be(encoder, tmp_path, name):
    store = StreamStore(tmp_path / "states", encoder, (5,))
    for act in (store.value, store.drop, store.places, lambda name: store.take(name, 0, CHUNKS[0])):
        with pytest.raises(ValueError, match="set: got the id"):
            act(name)
    assert (tmp_path / "states" / "weights").is_file()


def test_other_weights_and_bad_chunks_are_refused(encoder, tmp_path):
    store = StreamStore(tmp_path, encoder, (5,))
    with pytest.raises(ValueError, match=r"got shape \(4, 6\), wanted \(N, 5\)"):
        store.take("s", 0, torch.zeros(4, 6))
    with pytest.raises(ValueError, match="number: got -1"):
        store.take("s", -1, CHUNKS[0])
    with pytest.raises(ValueError, match="NaN"):
        store.take("s", 0, CHUNKS[0] * torch.nan)
    with pytest.raises(ValueError, match=r"infinite as torch\.float32"):
        store.take("s", 0, CHUNKS[0].double() * 1e300)
    with pytest.raises(KeyError):
        store.value("s")
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="holds states of other weights"):
        StreamStore(tmp_path, encoder, (5,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_chunks_travel_as_arrow(dtype):
    chunk = torch.randn(7, 3).to(dtype)
    assert torch.equal(read_chunk(write_chunk(chunk)), chunk)


def test_chunks_of_bfloat16_and_of_a_graph_travel_as_arrow():
    chunk = torch.randn(7, 3).bfloat16().requires_grad_()
    assert torch.equal(read_chunk(write_chunk(chunk)), chunk.float())


def test_other_arrow_bodies():
    import pyarrow as pa

    def body(table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    columns = pa.table({"x": [1, 2], "y": [0.5, 1.5]})
    assert read_chunk(body(columns)).tolist() == [[1, 0.5], [2, 1.5]]
    with pytest.raises(ValueError, match="body: is no Arrow"):
        read_chunk(b"nothing of the kind")
    with pytest.raises(ValueError, match="missing values"):
        read_chunk(body(pa.table({"x": [1.0, None]})))
    for kind in (pa.list_(pa.float16()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 2), pa.list_(pa.int32(), 2)):
        assert read_chunk(body(pa.table({"x": pa.array([[1, 2], [3, 4]]).cast(kind)}))).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="missing values"):
        read_chunk(body(pa.table({"x": [[1.0, None]]})))
    structs = pa.array([[{"a": 1}], [{"a": 2}]], pa.list_(pa.struct([("a", pa.int32())]), 1))
    days = pa.array([1, 2], pa.timestamp("s"))
    for column in (structs, days, pa.array([[1], [2]], pa.list_(pa.timestamp("s"), 1)), [["1"], ["2"]], ["1", "2"]):
        with pytest.raises(ValueError, match="wanted numbers"):
            read_chunk(body(pa.table({"x": column})))
    with pytest.raises(ValueError, match="all as long"):
        read_chunk(body(pa.table({"x": [[1.0], [1.0, 2.0]]})))
    with pytest.raises(ValueError, match="at least one element"):
        read_chunk(body(pa.table({"x": pa.array([], pa.float32())})))
