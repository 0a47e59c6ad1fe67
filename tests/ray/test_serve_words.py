"""The server of streams with documents: words over HTTP, in any order, with a replica killed midway."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from serving import kill_replica, push, serving
from small_run import small_documents

from distset import InMemory
from distset.data.arrow_chunks import write_chunk
from distset.problems.runs import load_problem
from distset.runs import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return small_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with serving(trained, tmp_path_factory.mktemp("states")) as address:
        yield address


def test_a_document_in_pieces_is_answered_as_a_whole(server, trained):
    words = torch.randint(0, 10, (400, 1), generator=torch.Generator().manual_seed(1))
    chunks = words.split(10)
    order = [*range(39, -1, -2), *range(0, 40, 2), 3, 8]
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda number: push(server, "text", number, chunks[number]), order[:15]))
        kill_replica()
        list(clients.map(lambda number: push(server, "text", number, chunks[number]), order[15:]))
    answer = requests.get(f"{server}/sets/text", timeout=60).json()
    offline = load_problem(RunFolder(trained)).predict(InMemory(words, 10)).softmax(-1)
    assert (answer["chunks"], answer["elements"]) == (40, 400)
    assert list(answer["probabilities"].values()) == pytest.approx(offline.tolist(), abs=1e-5)


def test_bad_words_are_told_why(server):
    about = {"classes": ["negative", "positive"], "element_shape": [1], "words": 10}
    assert requests.get(server, timeout=30).json() == about
    for chunk, said in [
        (torch.tensor([[3], [10]]), "has the word 10, wanted numbers of the model's vocabulary, 0 to 9"),
        (torch.tensor([[-1]]), "has the word -1"),
        (torch.ones(2, 1), "wanted one column of integers"),
    ]:
        answer = requests.post(f"{server}/sets/bad/chunks/0", data=write_chunk(chunk), timeout=30)
        assert answer.status_code == 400
        assert said in answer.json()["error"]
    assert requests.get(f"{server}/sets/bad", timeout=30).status_code == 404  # nothing of it was taken
