"""Elements a second through the server of streams, against encoding alone.

    python -m benchmarks.serve [--full]

One replica, four clients that push chunks of one set in a random order over HTTP, against one process that takes the same
chunks from memory by `Stream.add`. The model is that of `jobs.train` (UMBC, 16 slots, width 128) on vectors of 256 halves.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from benchmarks.report import report, table
from distset.cluster.config import Cluster
from distset.cluster.serve import serve_sets
from distset.cluster.train import start_ray
from distset.data import Bag, StoreWriter, make_splits
from distset.data.arrow_chunks import write_chunk
from distset.runs import RunFolder
from distset.training import train_run

WIDTH, CHUNK, CLIENTS = 256, 8192, 4


def trained(root: Path) -> RunFolder:
    """A run of two steps: what it learned does not matter here."""
    rng = np.random.default_rng(0)
    labels = {f"bag-{i}": ["no", "yes"][i % 2] for i in range(12)}
    with StoreWriter(root / "store") as writer:
        for name, label in labels.items():
            writer.add(Bag(name, rng.standard_normal((8, WIDTH)).astype(np.float32), label=label))
        writer.finish(splits=make_splits(labels, folds=3))
    overrides = [
        "data=store",
        f"data.path={root / 'store'}",
        "plan.epochs=1",
        "run.bar=false",
        "run.plots=false",
        "cluster=none",
    ]
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    train_run(config, root / "run")  # type: ignore[arg-type]
    return RunFolder(root / "run")


def alone(run: RunFolder, chunks: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds of one process, and the probabilities."""
    task = run.load_task()
    stream = task.model.encoder.stream()
    begin = time.perf_counter()
    for chunk in chunks:
        stream.add(chunk)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        return seconds, task.predict_encoding(stream.value())


def served(address: str, name: str, bodies: list[bytes]) -> tuple[float, list[float]]:
    """Seconds from the first chunk to the answer, and the probabilities."""
    order = np.random.default_rng(0).permutation(len(bodies)).tolist()

    def push(numbers: list[int]) -> None:
        with requests.Session() as session:
            for number in numbers:
                session.post(f"{address}/sets/{name}/chunks/{number}", data=bodies[number], timeout=120).raise_for_status()

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(push, [order[i::CLIENTS] for i in range(CLIENTS)]))
    answer = requests.get(f"{address}/sets/{name}", timeout=120).json()
    return time.perf_counter() - begin, list(answer["probabilities"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="10^6 elements")
    elements = 1_000_000 if parser.parse_args().full else 200_000
    torch.set_num_threads(1)
    chunks = list(torch.randn(elements, WIDTH, generator=torch.Generator().manual_seed(0)).half().split(CHUNK))
    bodies = [write_chunk(chunk) for chunk in chunks]
    start_ray(Cluster())
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        run = trained(Path(name))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        address = serve_sets(str(run.path), f"{name}/states", cpus=1, port=port)
        served(address, "warm-up", bodies[: 2 * CLIENTS])
        rounds = [(alone(run, chunks), served(address, f"set-{i}", bodies)) for i in range(3)]
    base = min(seconds for (seconds, _), _ in rounds)
    through = min(seconds for _, (seconds, _) in rounds)
    difference = max(abs(p - q) for (_, ps), (_, qs) in rounds for p, q in zip(ps.tolist(), qs))
    rows = [{"way": way, "elements/s": elements / seconds} for way, seconds in (("alone", base), ("served", through))]
    table(rows, title=f"{elements:,} elements of {WIDTH} halves in chunks of {CHUNK:,}, best of 3")
    figures = {"served / alone": base / through, "largest difference of a probability": difference}
    bars = {
        "served / alone": (base / through, ">=", 0.5),
        "largest difference of a probability": (difference, "<=", 1e-4),
    }
    raise SystemExit(report("serve", figures, bars))


if __name__ == "__main__":
    main()
