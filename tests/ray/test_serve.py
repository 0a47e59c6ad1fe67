"""The server of streams: concurrent clients, retries, a replica that is killed; every bad request is told why."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from serving import kill_replica, push, serving
from small_run import WIDTH, small_run

from distset import InMemory
from distset.data.arrow_chunks import write_chunk
from distset.runs import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder of a small bag classifier."""
    return small_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with serving(trained, tmp_path_factory.mktemp("states"), idle_seconds=3600) as address:
        yield address


def run_to_the_end(server: str, trained: Path, elements: int, chunk: int, name: str) -> None:
    """Four clients push all chunks in a random order, some twice, and the replica is killed: the answer does not care."""
    x = torch.randn(elements, WIDTH, generator=torch.Generator().manual_seed(1))
    chunks = x.split(chunk)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(2)).tolist()
    order += order[: len(order) // 10]
    done = []
    with ThreadPoolExecutor(4) as clients:
        jobs = [clients.submit(lambda n: done.append(push(server, name, n, chunks[n])), number) for number in order]
        while len(done) < len(order) // 3:
            assert not any(job.done() and job.exception() for job in jobs)
            time.sleep(0.01)
        kill_replica()
        for job in jobs:
            job.result()
    answer = requests.get(f"{server}/sets/{name}", timeout=60).json()
    assert (answer["chunks"], answer["elements"]) == (len(chunks), elements)
    task = RunFolder(trained).load_task()
    with torch.no_grad():
        offline = task.predict(InMemory(x, chunk))
    assert list(answer["probabilities"].values()) == pytest.approx(offline.tolist(), abs=1e-5)


def test_clients_retries_and_a_killed_replica(server, trained):
    run_to_the_end(server, trained, 4000, 100, "set%2Fone")


@pytest.mark.slow
def test_a_million_elements(server, trained):
    run_to_the_end(server, trained, 1_000_000, 4096, "million")


def test_bad_requests_are_told_why(server):
    good = write_chunk(torch.zeros(2, WIDTH))
    for method, path, body, status, said in [
        ("post", "/sets/a/chunks/0", b"", 400, "body: is no Arrow stream or file"),
        ("post", "/sets/a/chunks/0", b"junk", 400, "body: is no Arrow stream or file"),
        (
            "post",
            "/sets/a/chunks/0",
            write_chunk(torch.zeros(2, WIDTH + 1)),
            400,
            "has elements of 7 values, the model takes 6",
        ),
        ("post", "/sets/a/chunks/0", write_chunk(torch.full((2, WIDTH), torch.nan)), 400, "NaN or infinite"),
        ("post", "/sets/.a/chunks/0", good, 400, "wanted a name that does not start with a dot"),
        ("post", "/sets/a/chunks/x", good, 404, "wanted /sets/ID or /sets/ID/chunks/NUMBER"),
        ("get", "/sets/unknown", None, 404, "nothing has come for it"),
        ("put", "/sets/a/chunks/0", good, 405, "is not offered"),
        ("delete", "/sets/unknown", None, 404, None),
    ]:
        answer = requests.request(method, server + path, data=body, timeout=30)
        assert answer.status_code == status, (path, answer.text)
        if said is not None:
            assert said in answer.json()["error"]
    assert requests.get(f"{server}/sets/a", timeout=30).status_code == 404  # nothing of it was taken
    assert requests.get(server, timeout=30).json() == {"classes": ["no", "yes"], "element_shape": [WIDTH]}


def test_a_set_is_forgotten_when_asked(server):
    push(server, "short", 0, torch.zeros(3, WIDTH))
    assert requests.get(f"{server}/sets/short", timeout=30).json()["elements"] == 3
    assert requests.delete(f"{server}/sets/short", timeout=30).json() == {"deleted": True}
    assert requests.get(f"{server}/sets/short", timeout=30).status_code == 404
