"""Reading a shuffled epoch of bags from the store, against a copy of the same bytes from the page cache, and against h5.

    python -m benchmarks.read [--full] [--folder PATH]

Every reader brings all elements of each bag, bags in random order, into one buffer that stands ready, so that every byte is
moved once beyond what the reader itself does. The copy is the machine's bound: the same ranges of the same files, mapped
once for the whole run. The h5 files have one row a chunk, as TRIDENT writes them; their rate is measured on a tenth of the
bags (all of them with --full). On one thread, everything in the page cache.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset.data import Bag, Store, write_store

BAGS, SIZE, DIM = 200, (4000, 5000), 512
CHUNK = 1024


def bags(seed: int = 0) -> Iterator[Bag]:
    """Random halves; the sign and two bits of the exponent are cleared, so that all are finite and a hash is not fooled."""
    generator = np.random.default_rng(seed)
    for number in range(BAGS):
        n = int(generator.integers(*SIZE))
        bits = generator.integers(0, 2**14, (n, DIM), dtype=np.uint16)
        yield Bag(f"slide-{number}", bits.view(np.float16), generator.uniform(0, 1e5, (n, 2)), label=str(number % 2))


def write_h5(folder: Path, count: int) -> list[Path]:
    import h5py

    files = []
    for bag, _ in zip(bags(), range(count)):
        files.append(folder / f"{bag.set_id}.h5")
        with h5py.File(files[-1], "w") as file:
            file.create_dataset("features", data=bag.elements, chunks=(1, DIM))
    return files


def epochs(store: Store, h5_files: list[Path], generator: np.random.Generator) -> dict[str, Callable[[], object]]:
    """One function a reader, each a whole epoch in an order of its own."""
    import h5py

    buffer = torch.empty(SIZE[1] * DIM, dtype=torch.float16)
    width = DIM * 2
    maps = {}
    for name in store.info.shards:
        with open(store.path / name, "rb") as file:
            maps[name] = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    as_bytes = buffer.view(torch.uint8).numpy()

    def shuffled() -> list[str]:
        return [store.ids[i] for i in generator.permutation(len(store))]

    def copy() -> None:
        for set_id in shuffled():
            record = store.record(set_id)
            n = record.n * width
            np.copyto(as_bytes[:n], maps[record.file][record.offsets[0] : record.offsets[0] + n])

    def parquet_set(chunk_size: int | None) -> None:
        for set_id in shuffled():
            for chunk in store.open(set_id, chunk_size).map(lambda chunk: chunk):
                buffer[: chunk.elements.numel()].copy_(chunk.elements.view(-1))

    def h5() -> None:
        for i in generator.permutation(len(h5_files)):
            with h5py.File(h5_files[i], "r") as file:
                rows = torch.from_numpy(file["features"][()])
            buffer[: rows.numel()].copy_(rows.view(-1))

    return {
        "copy from the page cache": copy,
        "ParquetSet, whole bags": lambda: parquet_set(None),
        f"ParquetSet, chunks of {CHUNK}": lambda: parquet_set(CHUNK),
        "h5, one row a chunk": h5,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="all bags as h5, more rounds")
    parser.add_argument(
        "--folder", help="where to put the files (about 1 GB, 2 with --full); a temporary folder if left out"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"writing {BAGS} bags of {SIZE[0]:,} to {SIZE[1]:,} x {DIM} float16 ...", flush=True)
        store = write_store(Path(folder) / "store", bags())
        h5_files = write_h5(Path(folder), BAGS if args.full else BAGS // 10)
        readers = epochs(store, h5_files, np.random.default_rng(0))
        seconds = best_times(readers, rounds=9 if args.full else 5)
    elements = store.sets["n"].to_pylist()
    size = {name: sum(elements) * DIM * 2 for name in readers} | {
        "h5, one row a chunk": sum(elements[: len(h5_files)]) * DIM * 2
    }
    rate = {name: size[name] / seconds[name] / 1e9 for name in readers}
    copied, h5 = rate["copy from the page cache"], rate["h5, one row a chunk"]
    table(
        [
            {"reader": name, "GB/s": rate[name], "of the copy": rate[name] / copied, "times h5": rate[name] / h5}
            for name in rate
        ]
    )
    worst = min(value for name, value in rate.items() if name.startswith("ParquetSet"))
    figures = {
        **{f"{name} (GB/s)": value for name, value in rate.items()},
        "bytes an epoch": size["copy from the page cache"],
    }
    bars = {"share of the copy": (worst / copied, ">=", 0.35), "times h5": (worst / h5, ">=", 20.0)}
    return report("read", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
