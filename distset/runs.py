"""Run folders: what a training run leaves behind, and how to use it again.

Example:
    >>> run = RunFolder("runs/digits")  # doctest: +SKIP
    >>> task = run.load_task()  # doctest: +SKIP
    >>> task.predict(run.store().open("bag-0007"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distset.build import build
from distset.checkpoints import check_weights, read_state
from distset.tasks.bags import BagTask

if TYPE_CHECKING:
    from distset.data import Split, Store

__all__ = ["RunFolder", "make_task"]


class RunFolder:
    """A folder that ``python -m jobs.train`` wrote.

    Args:
        path: holds ``config.yaml`` and ``checkpoints/``.

    Raises:
        ValueError: for a folder that is not a run's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise ValueError(f"run: {self.path} holds no config.yaml, wanted the folder of a training run (run.dir)")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as plain dicts."""
        import yaml

        return yaml.safe_load((self.path / "config.yaml").read_text())

    def load_task(self, which: str = "best") -> BagTask:
        """The trained model with its task, on the CPU, in eval mode.

        Args:
            which: ``"best"`` (by the monitored validation metric) or ``"last"``.

        Raises:
            ValueError: where there is no such checkpoint, or it is of another model.
        """
        state = read_state(self.path / "checkpoints" / which / "state.pt")
        task = make_task(state["meta"]["config"], state["meta"]["element_shape"], state["meta"]["classes"])
        check_weights(task.model, state["model"])
        task.model.load_state_dict(state["model"])
        task.model.eval()
        return task

    def store(self) -> Store:
        """The store that the run was trained on."""
        from distset.data import Store

        return Store(self.config["data"]["path"])

    def split(self) -> Split:
        """The run's split: ids of the training, validation and test sets."""
        data = self.config["data"]
        return self.store().split(data["split"], data["fold"])


def make_task(config: Mapping[str, Any], element_shape: Sequence[int], classes: Sequence[str]) -> BagTask:
    """The task that a resolved configuration describes, with its initial weights.

    Args:
        config: with the sections ``task``, ``model``, ``backbone``, ``grad`` and ``seed``.
        element_shape, classes: what the store says.
    """
    return build(
        config["task"],
        "task",
        model=config["model"],
        backbone=config["backbone"],
        grad=config["grad"],
        seed=config["seed"],
        element_shape=element_shape,
        classes=classes,
    )
