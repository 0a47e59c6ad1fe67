"""Run folders: what a training run leaves behind, and how to use it again.

Example:
    >>> run = RunFolder("runs/digits")  # doctest: +SKIP
    >>> task = run.load_task()  # doctest: +SKIP
    >>> task.predict(run.store().open("test-0007"))  # doctest: +SKIP
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distset.build import build
from distset.checkpoints import check_weights, read_state
from distset.data import Split, Store
from distset.files import write_atomically
from distset.tasks.bags import BagTask

__all__ = ["RunFolder", "check_same", "make_task"]

PACKAGES = ("distset", "torch", "numpy", "pyarrow", "ray", "hydra-core", "scikit-learn")
MAY_CHANGE = ("cluster", "run")
"""Sections of the configuration that may differ from one start of a run to the next: they do not touch the mathematics."""

README = """# A training run of distset

| file | what it is |
|---|---|
| `config.yaml` | the resolved configuration; `python -m jobs.train` with the same one goes on here, or says it is done |
| `versions.json` | Python and packages at the first start |
| `train.log` | messages, with the time |
| `metrics.jsonl` | a line a record: `step`, `epoch`, `train/...` (loss since the one before, rate, gradient) or `val/...` |
| `speed.jsonl` | seconds a step, sets and elements a second, seconds a step that were waited for elements from the disk |
| `tensorboard/` | the same figures: `tensorboard --logdir .` |
| `checkpoints/last/` | all that the run needs to go on: model, optimiser, progress, best weights so far, history |
| `checkpoints/best/` | the weights of the best validation metric, and how to rebuild the model |
| `predictions.csv`, `predictions.parquet` | validation and test sets by the best weights; `predicted` is at the threshold |
| `metrics.json` | final figures with bootstrap 95 % intervals, and the threshold, which was chosen on the validation sets |
| `plots/` | loss and metric curves, ROC and confusion matrix of the test sets |

A new prediction: `python -m jobs.predict run={name} data.path=STORE`; in Python:
`distset.runs.RunFolder("{name}").load_task().predict(set)`.
"""


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

    @classmethod
    def prepare(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """The folder for a run of ``config``: a new one, or that of the same run, to go on in.

        Raises:
            ValueError: where it holds a run of another configuration; names what differs.
        """
        import yaml

        path = Path(path)
        if (path / "config.yaml").is_file():
            run = cls(path)
            check_same(run.config, config, path)
            return run
        path.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
        write_atomically(path / "versions.json", json.dumps(versions, indent=2) + "\n")
        write_atomically(path / "README.md", README.format(name=path))
        write_atomically(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as plain dicts."""
        import yaml

        return yaml.safe_load((self.path / "config.yaml").read_text())

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The final figures; None where the run is not finished."""
        path = self.path / "metrics.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def load_task(self, which: str = "best") -> BagTask:
        """The trained model with its task, on the CPU, in eval mode.

        Args:
            which: ``"best"`` (by the monitored validation metric) or ``"last"``.

        Raises:
            ValueError: where there is no such checkpoint, or it is of another model.
        """
        state = read_state(self.checkpoints / which / "state.pt")
        task = make_task(state["meta"]["config"], state["meta"]["element_shape"], state["meta"]["classes"])
        check_weights(task.model, state["model"])
        task.model.load_state_dict(state["model"])
        task.model.eval()
        return task

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Of the elements that the trained model takes."""
        return tuple(read_state(self.checkpoints / "best" / "state.pt")["meta"]["element_shape"])

    def store(self) -> Store:
        """The store that the run was trained on."""
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


def check_same(
    then: Mapping[str, Any], now: Mapping[str, Any], path: Path, *, may_change: Sequence[str] = MAY_CHANGE, what: str = "run"
) -> None:
    """Raise where a folder's configuration is not the one given.

    Args:
        then: the folder's.
        now: the one given.
        path: of the folder.
        may_change: sections, and dotted keys, that may differ.
        what: the folder holds.

    Raises:
        ValueError: names what differs.
    """
    before, after = dict(_leaves(then)), dict(_leaves(now))
    keys = [key for key in {**before, **after} if not {key, key.split(".")[0]} & set(may_change)]
    changed = [key for key in keys if before.get(key) != after.get(key)]
    if changed:
        shown = ", ".join(f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"run.dir: {path} holds a {what} of another configuration ({shown}{more}); choose another run.dir, or repeat "
            f"its command to go on"
        )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
