"""Checkpoints where every worker of a cluster sees them: a shared folder, S3, GCS, HDFS, by URI."""

from __future__ import annotations

import io
import re
import uuid
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from distset.checkpoints import Checkpoints, read_state, unwritten
from distset.cluster.probe import probe
from distset.files import write_atomically

__all__ = ["StorageCheckpoints"]

LIMIT = 30.0
"""Seconds after which a file system that does not answer counts as unreachable."""


class StorageCheckpoints(Checkpoints):
    """As `Checkpoints`, in a file system that pyarrow knows.

    A state is written under a name of its own and moved: object stores show an object when it is complete, file systems
    rename, and a writer thought dead does not write into another's draft.

    Args:
        uri: of a folder: ``s3://bucket/runs/digits``, ``gs://...``, ``file:///mnt/shared/...``.
        limit: seconds for the file system to answer at the start.

    Raises:
        ValueError: for what is no URI, and a file system that cannot be reached, at once or within ``limit``.
    """

    def __init__(self, uri: str, *, limit: float = LIMIT) -> None:
        super().__init__("")
        self.uri = uri
        self.name = re.sub(r"//[^/@]*@", "//***@", uri)  # what errors call it: a URI may hold a password
        self._check(write=False, limit=limit)

    def exists(self) -> bool:
        filesystem, root = self._open()
        return filesystem.get_file_info(f"{root}/last/state.pt").type != fs.FileType.NotFound

    def load(self) -> dict[str, Any] | None:
        if not self.exists():
            return None
        filesystem, root = self._open()
        with filesystem.open_input_stream(f"{root}/last/state.pt") as file:
            return read_state(io.BytesIO(file.read()), f"{self.name}/last/state.pt")

    def fetch(self, folder: Path) -> None:
        """Copy last and best to a local folder."""
        filesystem, root = self._open()
        for name in ("last", "best"):
            with filesystem.open_input_stream(f"{root}/{name}/state.pt") as file:
                write_atomically(folder / name / "state.pt", file.read())

    def check(self, limit: float = LIMIT) -> None:
        """Write, read and delete a small file.

        Raises:
            ValueError: where that cannot be done within ``limit`` seconds.
        """
        self._check(write=True, limit=limit)

    def _check(self, *, write: bool, limit: float) -> None:
        if problem := probe(self.uri, write=write, limit=limit):
            what = f"{self.name} cannot be {'written' if write else 'reached'} ({problem.replace(self.uri, self.name)})"
            raise ValueError(
                f"cluster.storage: {what}; wanted a folder's URI: check it, the network and the credentials, of this "
                f"machine and of the workers"
            )

    def _write(self, name: str, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        try:
            filesystem, root = self._open()
            filesystem.create_dir(f"{root}/{name}", recursive=True)
            for left in filesystem.get_file_info(fs.FileSelector(f"{root}/{name}")):  # by a killed writer
                if left.path.endswith(".tmp"):
                    filesystem.delete_file(left.path)
            draft = f"{root}/{name}/state.pt.{uuid.uuid4().hex}.tmp"
            with filesystem.open_output_stream(draft) as file:
                file.write(content.getbuffer())
            filesystem.move(draft, f"{root}/{name}/state.pt")
        except OSError as error:
            raise ValueError(unwritten(f"{self.name}/{name}/state.pt", error)) from error

    def _open(self) -> tuple[fs.FileSystem, str]:
        return fs.FileSystem.from_uri(self.uri)
