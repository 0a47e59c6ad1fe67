"""One replica of the server of streams, asked as Ray Serve would: bad requests are told why, idle sets are forgotten."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable

import pytest
import torch
from small_run import WIDTH, small_run

from distset.data.arrow_chunks import write_chunk

pytest.importorskip("ray.serve")
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def server(trained, tmp_path):
    from distset.cluster.serve import SetServer

    return SetServer(str(trained), str(tmp_path))


def ask(server, method: str, path: str, parts: Iterable[bytes] = ()) -> tuple[int, dict]:
    """A request whose body comes in parts, of a length that was not said; its status and answer."""
    from starlette.requests import Request

    coming = iter(parts)

    async def receive():
        part = next(coming, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    scope = {"type": "http", "method": method, "raw_path": path.encode(), "headers": []}
    answer = asyncio.run(server(Request(scope, receive)))
    return answer.status_code, json.loads(answer.body)


def push(server, name: str, chunk: torch.Tensor, number: int = 0) -> tuple[int, dict]:
    return ask(server, "POST", f"/sets/{name}/chunks/{number}", [write_chunk(chunk)])


@pytest.mark.parametrize("name", ["weights", "sets", "a%2Fb", "a%3Fb", "a%253Fb", "sch%C3%B6n", "x" * 200])
def test_any_name_is_a_set_of_its_own(server, name):
    assert push(server, name, X) == (200, {"new": True, "chunks": 1, "elements": 8})
    assert push(server, "a", X[:1])[1]["elements"] == 1
    assert ask(server, "GET", f"/sets/{name}")[1]["elements"] == 8
    assert ask(server, "DELETE", f"/sets/{name}") == (200, {"deleted": True})
    assert ask(server, "GET", f"/sets/{name}")[0] == 404


@pytest.mark.parametrize("name", ["..", ".", "%2E%2E", "%2e", "..%2F..%2Fother", ".lock", "y" * 300, "%ff"])
def test_names_that_cannot_be_are_refused_and_touch_nothing(server, tmp_path, name):
    push(server, "a", X)
    before = sorted(tmp_path.rglob("*"))
    for status, answer in (
        push(server, name, X),
        ask(server, "GET", f"/sets/{name}"),
        ask(server, "DELETE", f"/sets/{name}"),
    ):
        assert status == 400
        assert "set: got the id" in answer["error"] or "can't decode" in answer["error"]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_infinite_to_the_model_is_not_acknowledged(server):
    status, answer = push(server, "a", X.double() * 1e300)
    assert (status, answer["error"]) == (400, "elements: some are NaN or infinite as torch.float32; clean or drop them")
    status, answer = push(server, "a", torch.full((2, WIDTH), 3e38))
    assert (status, "the encoder makes NaN or infinities of them" in answer["error"]) == (400, True)
    assert push(server, "a", X)[0] == 200
    assert sum(ask(server, "GET", "/sets/a")[1]["probabilities"].values()) == pytest.approx(1)
    assert push(server, "large", X * 1e37)[0] == 200  # finite, and so is its state; the head's layers are not
    status, answer = ask(server, "GET", "/sets/large")
    assert (status, "is too large for the model's precision" in answer["error"]) == (400, True)


def test_a_body_is_counted_as_it_comes(server, monkeypatch):
    monkeypatch.setattr("distset.cluster.serve.LARGEST", 1000)
    come = []

    def endless():
        while True:
            come.append(100)
            yield b"x" * 100

    status, answer = ask(server, "POST", "/sets/a/chunks/0", endless())
    assert (status, sum(come)) == (413, 1100)
    assert "larger than 1,000 bytes" in answer["error"]


def test_idle_sets_are_forgotten_while_it_runs(trained, tmp_path):
    from distset.cluster.serve import SetServer

    server = SetServer(str(trained), str(tmp_path), idle_seconds=0.3)
    try:
        assert push(server, "short", X)[0] == 200
        end = time.monotonic() + 20
        while ask(server, "GET", "/sets/short")[0] == 200:
            assert time.monotonic() < end, "never forgotten"
            time.sleep(0.1)
        assert push(server, "short", X[:1]) == (200, {"new": True, "chunks": 1, "elements": 1})
    finally:
        server.close()
