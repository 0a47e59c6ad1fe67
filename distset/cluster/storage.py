"""Checkpoints where every worker of a cluster sees them: a shared folder, S3, GCS, HDFS, by URI."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from distset.checkpoints import Checkpoints, read_state
from distset.files import write_atomically

__all__ = ["StorageCheckpoints"]


class StorageCheckpoints(Checkpoints):
    """As `Checkpoints`, in a file system that pyarrow knows.

    A state is written under another name and moved: object stores show an object when it is complete, file systems rename.

    Args:
        uri: of a folder: ``s3://bucket/runs/digits``, ``gs://...``, ``file:///mnt/shared/...``.
    """

    def __init__(self, uri: str) -> None:
        super().__init__("")
        self.uri = uri
        self._open()  # a wrong URI is said at once

    def exists(self) -> bool:
        filesystem, root = self._open()
        return filesystem.get_file_info(f"{root}/last/state.pt").type != fs.FileType.NotFound

    def load(self) -> dict[str, Any] | None:
        if not self.exists():
            return None
        filesystem, root = self._open()
        with filesystem.open_input_stream(f"{root}/last/state.pt") as file:
            return read_state(io.BytesIO(file.read()), f"{self.uri}/last/state.pt")

    def fetch(self, folder: Path) -> None:
        """Copy last and best to a local folder."""
        filesystem, root = self._open()
        for name in ("last", "best"):
            with filesystem.open_input_stream(f"{root}/{name}/state.pt") as file:
                write_atomically(folder / name / "state.pt", file.read())

    def _write(self, name: str, state: dict[str, Any]) -> None:
        filesystem, root = self._open()
        filesystem.create_dir(f"{root}/{name}", recursive=True)
        content = io.BytesIO()
        torch.save(state, content)
        draft = f"{root}/{name}/state.pt.tmp"
        with filesystem.open_output_stream(draft) as file:
            file.write(content.getbuffer())
        filesystem.move(draft, f"{root}/{name}/state.pt")

    def _open(self) -> tuple[fs.FileSystem, str]:
        try:
            return fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
            raise ValueError(f"cluster.storage: {self.uri} cannot be opened ({error}); wanted a folder's URI") from error
