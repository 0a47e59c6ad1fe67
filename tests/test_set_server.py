"""One replica of the server of streams, asked as Ray Serve would: bad requests are told why, idle sets are forgotten."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable

import pytest
import torch
from idx_files import write_idx
from small_run import WIDTH, small_documents, small_problem, small_run

from distset import InMemory
from distset.data.arrow_chunks import write_chunk
from distset.problems.runs import load_problem
from distset.runs import RunFolder
from distset.served import load_served

pytest.importorskip("ray.serve")
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))


def encoded(table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def pa_body(values: list, kind: str, *, lists: bool = False) -> bytes:
    """One column x."""
    import pyarrow as pa

    own = getattr(pa, {"bool": "bool_"}.get(kind, kind))()
    return encoded(pa.table({"x": pa.array(values, pa.list_(own) if lists else own)}))


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


def replica(run, folder):
    from distset.cluster.serve import SetServer

    return SetServer(str(run), str(folder))


WORDS = torch.randint(0, 10, (30, 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return small_documents(tmp_path_factory.mktemp("documents"))


def test_words_in_any_order_are_answered_as_the_whole_document(documents, tmp_path):
    server = replica(documents, tmp_path)
    about = {"classes": ["negative", "positive"], "element_shape": [1], "words": 10}
    assert ask(server, "GET", "/") == (200, about)
    chunks = WORDS.split(7)
    for number in (3, 0, 4, 1, 0, 2):
        assert push(server, "text", chunks[number], number)[0] == 200
    status, answer = ask(server, "GET", "/sets/text")
    offline = load_problem(RunFolder(documents)).predict(InMemory(WORDS, 7)).softmax(-1)
    assert (status, answer["chunks"], answer["elements"]) == (200, 5, 30)
    assert list(answer["probabilities"].values()) == pytest.approx(offline.tolist(), abs=1e-6)
    again = replica(documents, tmp_path)  # another process: the words are there
    assert ask(again, "GET", "/sets/text") == (status, answer)


@pytest.mark.parametrize("body", [
    pa_body([3, 1, 4], "int8"), pa_body([3, 1, 4], "uint64"), pa_body([[3], [1], [4]], "int32", lists=True),
    pa_body([[3, 1], [], [4]], "int16", lists=True), write_chunk(torch.tensor([[3], [1], [4]])),
])  # fmt: skip
def test_words_come_as_a_column_or_as_lists(documents, tmp_path, body):
    server = replica(documents, tmp_path)
    assert ask(server, "POST", "/sets/a/chunks/0", [body]) == (200, {"new": True, "chunks": 1, "elements": 3})
    answer = ask(server, "GET", "/sets/a")[1]
    push(server, "b", torch.tensor([[3], [1], [4]]))
    assert ask(server, "GET", "/sets/b")[1] == answer


@pytest.mark.parametrize(("body", "said"), [
    (pa_body([3, 10], "int64"), "has the word 10, wanted numbers of the model's vocabulary, 0 to 9"),
    (pa_body([3, -1], "int64"), "has the word -1"),
    (pa_body([2**64 - 1], "uint64"), f"has the word {2**64 - 1}"),
    (pa_body([3.0, 1.0], "float32"), "columns x: float, wanted one column of integers"),
    (pa_body([[3.0]], "float64", lists=True), "wanted one column of integers"),
    (pa_body(["film"], "string"), "columns x: string, wanted one column of integers"),
    (pa_body([True], "bool"), "wanted one column of integers"),
    (pa_body([3, None], "int64"), "missing values"),
    (pa_body([[3], None], "int64", lists=True), "missing values"),
    (pa_body([[], []], "int64", lists=True), "no words in its lists"),
    (pa_body([], "int64"), "at least one element"),
    (write_chunk(torch.ones(2, 3, dtype=torch.int64))[:-40], "no Arrow stream"),
    (b"film", "no Arrow stream"),
])  # fmt: skip
def test_what_is_no_word_of_the_vocabulary_is_refused(documents, tmp_path, body, said):
    server = replica(documents, tmp_path)
    status, answer = ask(server, "POST", "/sets/a/chunks/0", [body])
    assert (status, said in answer["error"]) == (400, True), answer
    assert ask(server, "GET", "/sets/a")[0] == 404


def test_several_columns_of_words_are_refused(documents, tmp_path):
    import pyarrow as pa

    body = encoded(pa.table({"x": [1, 2], "y": [3, 4]}))
    status, answer = ask(replica(documents, tmp_path), "POST", "/sets/a/chunks/0", [body])
    assert (status, "has the columns x: int64, y: int64, wanted one column" in answer["error"]) == (400, True)


def test_a_document_of_several_classes_is_asked_for_each(tmp_path):
    from distset.tasks.document_models import deepsets
    from distset.tasks.documents import document_task

    task = document_task(10, ["4", "9"], True, model=lambda words, outputs: deepsets(words, outputs, width=8))
    task.model.eval()
    stream = task.model.encoder.stream()
    stream.add(WORDS)
    found = task.answer(stream.value())["probabilities"]
    assert list(found) == ["4", "9"]
    assert list(found.values()) == pytest.approx(task.predict(InMemory(WORDS)).sigmoid().tolist(), abs=1e-6)


def test_points_are_answered_by_their_mixture(tmp_path):
    points = ["data.examples.sets=[4,2,2]", "data.examples.size=32", "model.width=16"]
    run = small_problem(tmp_path / "run", "task=clustering", *points)
    server = replica(run, tmp_path / "states")
    assert ask(server, "GET", "/") == (200, {"element_shape": [2]})
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for number in (1, 0):
        assert push(server, "a", x[10 * number : 10 * number + 10], number)[0] == 200
    answer = ask(server, "GET", "/sets/a")[1]
    task = load_problem(RunFolder(run))
    raw = task.predict(InMemory(x, 10))
    assert torch.allclose(torch.tensor(answer["means"]), raw[:, 1:3], atol=1e-5)
    assert (len(answer["weights"]), len(answer["variances"][0])) == (4, 2)
    assert sum(answer["weights"]) == pytest.approx(1)


def test_pixels_are_answered_by_the_completed_image(tmp_path):
    write_idx(tmp_path)
    pixels = ["data.examples.images=[8,2,2]", "data.examples.side=8", "data.examples.contexts=[20,40]", "task.width=8"]
    given = ["task.context=[20,40]", "task.chunk_size=10", "task.targets=30", f"data.examples.path={tmp_path}"]
    run = small_problem(tmp_path / "run", "task=completion", *pixels, *given)
    server = replica(run, tmp_path / "states")
    x = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    for number, chunk in enumerate(x.split(5)):
        assert push(server, "a", chunk, number)[0] == 200
    answer = ask(server, "GET", "/sets/a")[1]
    mean, deviation = load_problem(RunFolder(run)).predict(InMemory(x, 5)).chunk(2, -1)
    assert torch.allclose(torch.tensor(answer["means"]), mean.view(8, 8, 1), atol=1e-5)
    assert torch.allclose(torch.tensor(answer["deviations"]), deviation.view(8, 8, 1), atol=1e-5)


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path):
    points = ["task=clustering", "data.examples.sets=[4,2,2]", "data.examples.size=32", "model.width=16"]
    whole = ["model=clustering/fspool", "grad=full", "data.examples.chunk_size=null"]
    with pytest.raises(ValueError, match="is not mini-batch consistent"):
        load_served(RunFolder(small_problem(tmp_path / "fspool", *points, *whole)))
    oracle = ["task=oracle", "method@task=diffmf", "data.examples.sets=4"]
    with pytest.raises(ValueError, match="was trained by a OracleTask, wanted a task with elements"):
        load_served(RunFolder(small_problem(tmp_path / "oracle", *oracle)))
