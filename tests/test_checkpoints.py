"""Checkpoints when their storage fails: a full disk, a store that does not answer; what was whole stays whole."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distset.checkpoints import Checkpoints


def state(step: int) -> dict:
    model = {"weight": torch.full((50_000,), float(step))}
    return {"model": model, "best": {"step": step, "model": model}, "meta": {}}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond 4 KiB: what a write meets on a full disk, from the same system call.

    No fixture: the tests' own report may go to a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def stored(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    Checkpoints(tmp_path).save(state(1))
    said = r"checkpoint: .*state.pt cannot be written .* MiB are free .* the same command goes on"
    with pytest.raises(ValueError, match=said), full_disk():
        Checkpoints(tmp_path).save(state(2))
    assert stored(tmp_path) == ["best/state.pt", "last/state.pt"]
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    assert torch.equal(loaded["model"]["weight"], state(1)["model"]["weight"])


def test_a_full_shared_folder_is_said_and_the_last_checkpoint_stays(tmp_path):
    storage = pytest.importorskip("distset.cluster.storage")
    uri = f"file://{tmp_path}"
    storage.StorageCheckpoints(uri).save(state(1))
    said = r"checkpoint: file:.*state.pt cannot be written .* the same command goes on"
    with pytest.raises(ValueError, match=said), full_disk():
        storage.StorageCheckpoints(uri).save(state(2))
    loaded = storage.StorageCheckpoints(uri).load()
    assert torch.equal(loaded["model"]["weight"], state(1)["model"]["weight"])


def test_drafts_in_storage_have_names_of_their_own_and_are_cleared_away(tmp_path, monkeypatch):
    """A writer thought dead must not write into another's draft."""
    storage = pytest.importorskip("distset.cluster.storage")
    checkpoints, drafts = storage.StorageCheckpoints(f"file://{tmp_path}"), []

    class Seen:
        def __init__(self, filesystem) -> None:
            self.filesystem = filesystem

        def __getattr__(self, name: str):
            return getattr(self.filesystem, name)

        def open_output_stream(self, path: str):
            drafts.append(path)
            return self.filesystem.open_output_stream(path)

    filesystem, root = checkpoints._open()
    monkeypatch.setattr(checkpoints, "_open", lambda: (Seen(filesystem), root))
    checkpoints.save(state(1))
    (tmp_path / "last" / "state.pt.killed.tmp").write_text("half")
    checkpoints.save(state(2))
    assert len(drafts) == len(set(drafts)) == 4
    assert stored(tmp_path) == ["best/state.pt", "last/state.pt"]


def test_a_store_that_does_not_answer_is_given_up_in_time():
    storage = pytest.importorskip("distset.cluster.storage")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and says nothing
        place = f"s3://key:secret@bucket/run?scheme=http&region=here&endpoint_override=127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=r"cluster.storage: s3://\*\*\*@bucket/run.* cannot be reached \(no answer within 1 s\)"
        ):
            storage.StorageCheckpoints(place, limit=1)
        assert time.monotonic() - started < 5


def test_storage_that_cannot_be_written(tmp_path):
    storage = pytest.importorskip("distset.cluster.storage")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cluster.storage: .*/file/run cannot be"):
        storage.StorageCheckpoints(f"{tmp_path}/file/run").check()
    with pytest.raises(ValueError, match=r"cluster.storage: nothing://there cannot be reached"):
        storage.StorageCheckpoints("nothing://there")
    storage.StorageCheckpoints(f"{tmp_path}/new/run").check()
    assert stored(tmp_path) == ["file"]


def test_each_of_several_runs_has_its_own_folder_in_the_storage():
    training = pytest.importorskip("distset.training")
    config = {"data": {"examples": {}, "folds": 2}, "folds": "all", "seeds": None, "seed": 0}
    config["cluster"] = {"storage": "s3://bucket/runs/?region=here"}
    places = [own["cluster"]["storage"] for _, own in training.members(config)]
    assert places == ["s3://bucket/runs/fold-0?region=here", "s3://bucket/runs/fold-1?region=here"]
