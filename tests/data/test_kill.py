"""A killed ingest goes on with the same call and ends with the same bytes, wherever the kill came."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distset.data import Bag, Labelled, SplitPlan, Store, StoreWriter, ingest, write_store
from distset.files import DiskFull


class Numbers:
    """Twelve small bags; shards of 2 kB make several files of them."""

    splits = ()
    ids = tuple(f"s{i}" for i in range(12))

    def read(self, set_id):
        generator = np.random.default_rng(int(set_id[1:]))
        x = generator.standard_normal((20 + int(set_id[1:]), 8)).astype(np.float32)
        return Bag(set_id, x, generator.uniform(0, 9, (len(x), 2)), label=str(int(set_id[1:]) % 2))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    whole = StoreWriter.__init__
    monkeypatch.setattr(StoreWriter, "__init__", lambda self, *a, **k: whole(self, *a, **{**k, "shard_bytes": 2000}))


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def killed_at(moment, path):
    """Run the ingest in a child that kills itself (SIGKILL) at the given moment; False where it ended before."""
    child = os.fork()
    if child == 0:
        left = iter(range(moment))

        def counted(fn):
            def call(*args, **kwargs):
                for _ in range(2):  # before it, and after it
                    if next(left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if _ == 0:
                        result = fn(*args, **kwargs)
                return result

            return call

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)
        Path.write_bytes, Path.open = counted(Path.write_bytes), counted(Path.open)
        pq.ParquetWriter.write_table = counted(pq.ParquetWriter.write_table)
        pq.ParquetWriter.close = counted(pq.ParquetWriter.close)
        code = 1
        try:
            ingest(Numbers(), path)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_moment_of_a_kill(tmp_path, step):
    expected_store = ingest(Numbers(), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected_store.info.shards) > 3
    moment, unfinished = 0, 0
    while killed_at(moment, path := tmp_path / str(moment)):
        if not (path / "store.json").exists():
            unfinished += 1
            with pytest.raises(ValueError, match=r"cut off: run the same ingest again|run jobs.ingest first"):
                Store(path)
        ingest(Numbers(), path)
        assert contents(path) == expected, f"killed at moment {moment}"
        moment += step
    assert moment > 100
    assert unfinished > 90 // step
    assert contents(path) == expected


def test_killed_again_and_again(tmp_path):
    expected = ingest(Numbers(), tmp_path / "whole") and contents(tmp_path / "whole")
    kills = 0
    while killed_at(45, tmp_path / "again"):
        kills += 1
        assert kills < 20
    assert kills > 2
    assert contents(tmp_path / "again") == expected


def test_an_ingest_does_not_read_again_what_is_written(tmp_path):
    assert killed_at(60, tmp_path)
    read = []

    class Watched(Numbers):
        def read(self, set_id):
            read.append(set_id)
            return super().read(set_id)

    seen = []
    ingest(Watched(), tmp_path, progress=lambda done, total, elements: seen.append((done, total)))
    assert 0 < len(read) < 12
    assert read == list(Numbers.ids[12 - len(read) :])
    assert seen == [(done, 12) for done in range(12 - len(read), 13)]
    ingest(Watched(), tmp_path)
    assert len(read) < 12, "a finished store is not read for"


def test_a_bad_bag_loses_no_whole_shard(tmp_path):
    class Broken(Numbers):
        def read(self, set_id):
            bag = super().read(set_id)
            return bag._replace(elements=bag.elements * np.nan) if set_id == "s9" else bag

    with pytest.raises(ValueError, match=r"set 's9': row 0 is not finite .and 28 more of the 29 rows"):
        ingest(Broken(), tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*.tmp"))
    with StoreWriter(tmp_path / "b") as writer:
        assert writer.done == []
    ingest(Numbers(), tmp_path / "a")
    ingest(Numbers(), tmp_path / "whole")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_another_start_is_refused(tmp_path):
    assert killed_at(60, tmp_path)
    with pytest.raises(ValueError, match=r"started with other settings .*dtype was None, now 'float16'"):
        ingest(Numbers(), tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        ingest(Numbers(), tmp_path, seed=1)

    class Others(Numbers):
        ids = tuple(f"s{i}" for i in range(1, 12))

    with pytest.raises(ValueError, match="source was"):
        ingest(Others(), tmp_path)
    ingest(Numbers(), tmp_path)
    with pytest.raises(ValueError, match="finished store of another source"):
        ingest(Others(), tmp_path)
    with pytest.raises(ValueError, match="holds a finished store"), StoreWriter(tmp_path):
        pass


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        StoreWriter(tmp_path),
        pytest.raises(ValueError, match="another process is writing this store"),
        StoreWriter(tmp_path),
    ):
        pass


def test_bags_in_another_order_are_refused(tmp_path):
    bags = [Numbers().read(set_id) for set_id in Numbers.ids]

    def cut_off():
        yield from bags[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, cut_off())
    with pytest.raises(ValueError, match="set 0 is 's11', was 's0'"):
        write_store(tmp_path, bags[::-1])
    assert write_store(tmp_path, bags).ids == list(Numbers.ids)


def test_other_labels_only_write_the_index_again(tmp_path, monkeypatch):
    first = ingest(Numbers(), tmp_path)
    shards = {file: os.stat(tmp_path / file).st_mtime_ns for file in first.info.shards}
    monkeypatch.setattr(Numbers, "read", None)
    labels = {set_id: Labelled(f"p{int(set_id[1:]) // 2}", "AB"[int(set_id[1:]) % 4 // 2]) for set_id in Numbers.ids}
    again = ingest(Numbers(), tmp_path, labels=labels)
    assert again.classes == ["A", "B"]
    assert again.sets["case_id"].to_pylist()[:3] == ["p0", "p0", "p1"]
    cases = dict(zip(again.ids, again.sets["case_id"].to_pylist()))
    assert all({cases[i] for i in part}.isdisjoint(cases[i] for i in again.ids if i not in part) for part in again.split())
    assert {file: os.stat(tmp_path / file).st_mtime_ns for file in again.info.shards} == shards
    assert ingest(Numbers(), tmp_path, labels=labels, splits=SplitPlan(folds=0)).splits == []


def test_ingest_takes_the_memory_of_one_bag(tmp_path):
    megabytes = []

    class Large(Numbers):
        ids = tuple(f"s{i}" for i in range(40))

        def read(self, set_id):
            with open("/proc/self/statm") as file:
                megabytes.append(int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20)
            return Bag(set_id, np.ones((1000, 256), np.float32), label=str(int(set_id[1:]) % 2))

    ingest(Large(), tmp_path)
    assert max(megabytes[10:]) - megabytes[9] < 10, "30 bags of 1 MB came in between"


def test_a_full_disk_is_named_and_the_ingest_goes_on_once_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(DiskFull, match=r"disk.*: no space is left on its disk .*start the same command again"):
            ingest(Numbers(), disk / "s")
        assert not list(disk.rglob("*.parquet.tmp"))
        with pytest.raises(ValueError, match="cut off"):
            Store(disk / "s")
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert contents(ingest(Numbers(), disk / "s").path) == contents(ingest(Numbers(), tmp_path / "t").path)
    finally:
        subprocess.run(["umount", disk], check=True)
