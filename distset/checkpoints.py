"""Checkpoints that are whole or not there: written beside, flushed to disk, renamed into place.

``last/state.pt`` is everything a run needs to go on: model, optimiser, progress, the best weights so far and the history.
``best/state.pt`` is what a trained model needs: weights and how to rebuild it. Both are plain dicts of tensors, numbers and
strings, loaded without unpickling code.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from distset.files import draft_for, publish

__all__ = ["Checkpoints", "check_weights", "read_state"]

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        folder: holds ``last/state.pt`` and ``best/state.pt``; made when needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._best_step: int | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state`` as the last checkpoint, and its best weights where they are new.

        Raises:
            ValueError: where it cannot be written, as on a full disk; the checkpoint before it stays, whole.
        """
        best = state["best"]
        if best is not None and best["step"] != self._best_step:
            self._write("best", {"format": FORMAT, "model": best["model"], "meta": state["meta"], "step": best["step"]})
            self._best_step = best["step"]
        self._write("last", {"format": FORMAT, **state})

    def exists(self) -> bool:
        """Whether a run has left something to go on from."""
        return (self.folder / "last" / "state.pt").exists()

    def load(self) -> dict[str, Any] | None:
        """The last state, or None where nothing was saved yet."""
        for draft in self.folder.glob("*/*.tmp"):  # what a killed writer left behind
            draft.unlink(missing_ok=True)
        return read_state(self.folder / "last" / "state.pt") if self.exists() else None

    def _write(self, name: str, state: dict[str, Any]) -> None:
        path, draft = self.folder / name / "state.pt", None
        try:
            draft = draft_for(path)
            torch.save(state, draft)
            publish(draft, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            if draft is not None:
                draft.unlink(missing_ok=True)
            raise ValueError(unwritten(path, error, f"; {_free(path)} are free there")) from error


def unwritten(place: object, error: Exception, more: str = "") -> str:
    """What to say of a checkpoint that could not be written."""
    return (
        f"checkpoint: {place} cannot be written ({_first_line(error)}{more}); the one before it is whole: make room or "
        f"repair the storage, and the same command goes on from there"
    )


def read_state(source: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> dict[str, Any]:
    """A saved state, on the CPU.

    Args:
        source: a path, or an open file; ``name`` is what errors call it.

    Raises:
        ValueError: for a file that is not there, not a checkpoint, or of another format.
    """
    name = str(source) if name is None else name
    if isinstance(source, str | os.PathLike) and not Path(source).is_file():
        raise ValueError(f"checkpoint: found no file {name}; train first, or name the folder that holds checkpoints/")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and key errors, by what is wrong with the file
        raise ValueError(f"checkpoint: {name} cannot be read ({_first_line(error)}); wanted one that fit() wrote") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint: {name} has format {found}, wanted {FORMAT}; it is not one that fit() wrote")
    return state


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str = "checkpoint") -> None:
    """Raise where ``weights`` are another model's.

    Raises:
        ValueError: names the first parameters that are missing, too many, or of another shape.
    """
    own = model.state_dict()
    problems = [f"lacks {key}" for key in own if key not in weights]
    problems += [f"has {key}, which the model lacks" for key in weights if key not in own]
    problems += [
        f"has {key} of shape {tuple(weights[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{source}: is of another model: it {'; '.join(problems[:3])}{more}. Use the configuration it was trained "
            f"with, or another folder"
        )


def _free(path: Path) -> str:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
