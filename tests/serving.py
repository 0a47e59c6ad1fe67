"""A server of streams as tests use it: started, pushed to as a client would, its replica killed."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import torch

from distset.data.arrow_chunks import write_chunk


@contextmanager
def serving(run: Path, states: Path, **options) -> Iterator[str]:
    """The address of a server of a run folder's model, on a free port."""
    from ray import serve

    from distset.cluster.serve import serve_sets

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield serve_sets(str(run), str(states), cpus=0.5, port=port, **options)
    serve.shutdown()


def push(server: str, name: str, number: int, chunk: torch.Tensor) -> None:
    """Until it is acknowledged."""
    end = time.monotonic() + 120
    while True:
        try:
            answer = requests.post(f"{server}/sets/{name}/chunks/{number}", data=write_chunk(chunk), timeout=20)
        except requests.RequestException:
            answer = None
        if answer is not None and answer.status_code == 200:
            return
        assert answer is None or answer.status_code >= 500, answer.text
        assert time.monotonic() < end, "never acknowledged"
        time.sleep(0.2)


def kill_replica() -> None:
    """There is one."""
    (pid,) = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_replica(path)]
    os.kill(pid, signal.SIGKILL)


def _is_replica(path: Path) -> bool:
    try:
        return path.read_text().startswith("ray::ServeReplica:distset:SetServer")
    except OSError:
        return False
