"""Whether a file system answers, and takes a file: asked by a process of its own, which can be ended.

Clients of object stores try again for minutes and cannot be interrupted, not even by the end of the process. So this file
runs as a script beside it, and imports little.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid

from pyarrow import fs

__all__ = ["probe"]


def probe(uri: str, *, write: bool, limit: float) -> str | None:
    """What is wrong with the folder at ``uri``; None for nothing.

    Args:
        uri: of a folder in a file system that pyarrow knows.
        write: whether to write, read and delete a small file there, or only to look.
        limit: seconds to wait for an answer.
    """
    told = json.dumps({"uri": uri, "write": write})  # not an argument: it may hold a password, and others see arguments
    try:
        done = subprocess.run([sys.executable, __file__], input=told, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit:g} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]


def look(uri: str, write: bool) -> None:
    """Find the folder; write, read and delete a file in it."""
    filesystem, root = fs.FileSystem.from_uri(uri)
    filesystem.get_file_info(root)
    if not write:
        return
    filesystem.create_dir(root, recursive=True)
    place, content = f"{root}/probe-{uuid.uuid4().hex}", b"distset"
    with filesystem.open_output_stream(place) as file:
        file.write(content)
    with filesystem.open_input_stream(place) as file:
        if file.read() != content:
            raise OSError("it gives back something else than was written")
    filesystem.delete_file(place)


if __name__ == "__main__":
    try:
        look(**json.load(sys.stdin))
    except Exception as error:
        sys.exit(str(error).replace("\n", " "))
