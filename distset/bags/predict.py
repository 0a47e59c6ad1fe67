"""A trained bag classifier put to use: loaded from a run folder or a checkpoint, on any store that fits it."""

from __future__ import annotations

import difflib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from distset.checkpoints import check_weights, read_state
from distset.data import Store, readers, write_store
from distset.report import prediction_table
from distset.runs import RunFolder, make_task
from distset.sets import ChunkedSet
from distset.tasks.bags import BagTask
from distset.train import Example, predict_all

__all__ = ["Trained", "Work", "choose_sets", "predict_sets", "store_of_file", "with_progress"]

log = logging.getLogger("distset")


class Trained(NamedTuple):
    """A trained classifier and how it wants to be used.

    Attributes:
        task: model and classes; the model in eval mode.
        element_shape: of the elements that it takes.
        threshold: on the probability of the second of two classes, chosen on the run's validation sets; None where the run
            said none.
        chunk_size: of the training; None for whole sets.
        precision: of the training, ``"float32"`` or ``"bfloat16"``.
    """

    task: BagTask
    element_shape: tuple[int, ...]
    threshold: float | None = None
    chunk_size: int | None = None
    precision: str = "float32"

    @classmethod
    def load(cls, path: str | Path, which: str = "best", device: str | torch.device = "cpu") -> Trained:
        """From a run folder, or from one of its checkpoints that was copied elsewhere (a ``state.pt``).

        Args:
            path: the folder or the file.
            which: ``"best"`` or ``"last"``, of a run folder.
            device: where the model goes.

        Raises:
            ValueError: for a folder that is not a run's, one without that checkpoint, or a file that is no checkpoint.
        """
        path = Path(path)
        if path.is_dir():
            run = RunFolder(path)
            config, metrics = run.config, run.metrics or {}
            trained = cls._of(path / "checkpoints" / which / "state.pt")
            trained = trained._replace(
                threshold=metrics.get("threshold"),
                chunk_size=config["data"]["chunk_size"],
                precision=config["plan"].get("precision", "float32"),
            )
        else:
            trained = cls._of(path)
        trained.task.model.to(device).eval()
        return trained

    @classmethod
    def _of(cls, file: Path) -> Trained:
        state = read_state(file)
        meta = state["meta"]
        task = make_task(meta["config"], meta["element_shape"], meta["classes"])
        check_weights(task.model, state["model"], str(file))
        task.model.load_state_dict(state["model"])
        return cls(task, tuple(meta["element_shape"]))

    def check(self, store: Store, name: str | None = None) -> None:
        """Raise where the model cannot read the store's elements; ``name`` is what the error calls the store.

        Raises:
            ValueError: for elements of another shape.
        """
        if store.element_shape != self.element_shape:
            raise ValueError(
                f"{name or f'data.path: {store.path}'} has elements of shape {store.element_shape}, the model was trained "
                f"on {self.element_shape}; use elements of the same extractor, or another run"
            )


class Work(NamedTuple):
    """A trained classifier and the sets to use it on; what the jobs evaluate and predict have in common.

    Attributes:
        trained, store, ids: who, where, which.
        chunk_size: elements in memory at once.
        threshold: of two classes, as asked for or as the run has it; None for more classes, or 1/2.
        out: the folder to write to.
    """

    trained: Trained
    store: Store
    ids: list[str]
    chunk_size: int | None
    threshold: float | None
    out: Path

    @classmethod
    def of(cls, config: Mapping[str, Any], kind: str, store: Store | None = None) -> Work:
        """From the configuration of a job; see ``conf/evaluate.yaml`` and ``conf/predict.yaml``.

        Args:
            config: resolved.
            kind: names the output folder, ``"evaluate"`` or ``"predict"``.
            store: in place of the one that the configuration names.

        Raises:
            ValueError: for a run, a store, sets or a split that are not there, or that do not fit each other.
        """
        path, data = Path(config["run"]), dict(config["data"])
        trained = Trained.load(path, config["which"], pick_device(config["device"]))
        if store is None and data["path"] is None and not path.is_dir():
            raise ValueError(f"data.path: got none, and {path} is a checkpoint without its run; name a store")
        if store is None and path.is_dir():
            own = RunFolder(path).config["data"]
            if Path(data["path"] or own["path"]).resolve() == Path(own["path"]).resolve():
                # With its split, where no other is named: in that of another fold, the run was trained on test sets.
                data |= {key: own[key] for key in ("path", "split", "fold") if data[key] is None}
        store = store or Store(data["path"])
        trained.check(store, None if config.get("bag") is None else f"bag: {config['bag']}")
        ids = choose_sets(store, sets=config.get("sets"), split=data["split"], fold=data["fold"] or 0, part=data["part"])
        out = _out(config["out"], path, kind, store, data["part"] if kind == "evaluate" else None)
        return cls(trained, store, ids, data["chunk_size"] or trained.chunk_size, _threshold(config, trained), out)

    def probabilities(self) -> np.ndarray:
        """Class probabilities ``(N, C)`` of the sets."""
        return predict_sets(self.trained, self.store, self.ids, self.chunk_size)

    def table(self, probabilities: np.ndarray) -> pd.DataFrame:
        """The table of predictions; see `prediction_table`."""
        records = [self.store.record(set_id) for set_id in self.ids]
        labels = [record.label for record in records]
        return prediction_table(
            probabilities,
            self.trained.task.classes,
            set_ids=self.ids,
            case_ids=[record.case_id for record in records],
            labels=None if all(label is None for label in labels) else labels,
            threshold=self.threshold,
        )


def store_of_file(path: str | Path, scratch: Path) -> Store:
    """One bag's file (or folder of patches), in any format that `jobs.ingest` reads, as a store under ``scratch``.

    Raises:
        ValueError: for a path that is not there, an ending that no reader takes, or a file that does not read.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise ValueError(f"bag: found nothing at {path}")
    suffix = "/" if path.is_dir() else path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"bag: got {path.name}, wanted a file that ends in {', '.join(READERS)} (/: a folder of patches)")
    errors = []
    for reader in READERS[suffix]:
        try:
            source = reader(path.parent if path.is_dir() else path)
            set_id = next(name for name in source.ids if source.files[name].resolve() == path)
            return write_store(scratch / path.stem, [source.read(set_id)])
        except (ValueError, StopIteration) as error:
            errors.append(str(error))
    raise ValueError(f"bag: {path} does not read: {'; '.join(errors)}")


READERS: dict[str, tuple[Callable[[Path], readers.FileSource], ...]] = {
    ".h5": (readers.trident, readers.stamp),
    ".hdf5": (readers.trident, readers.stamp),
    ".pt": (readers.pt_files,),
    ".pth": (readers.pt_files,),
    ".npy": (readers.arrays,),
    ".npz": (readers.arrays,),
    ".csv": (readers.csv_bags,),
    "/": (readers.patches,),
}


def pick_device(name: str) -> torch.device:
    """``"auto"``: the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ValueError(f"device: got {name!r}, wanted auto, cpu, cuda or cuda:0")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch finds no CUDA device here; use device=cpu")
    return torch.device(name)


def choose_sets(
    store: Store, *, sets: Sequence[str] | None = None, split: str | None = None, fold: int = 0, part: str | None = None
) -> list[str]:
    """Ids of the sets to work on: those named, or a part (train, val, test) of a split, or all.

    Raises:
        ValueError: for an unknown set, naming the nearest known one; for an unknown part; for a part without sets.
    """
    if sets:
        sets, known = [str(name) for name in sets], set(store.ids)  # a command line makes a number of the id "17"
        for name in sets:
            if name not in known:
                near = difflib.get_close_matches(name, store.ids, n=1, cutoff=0.0)
                raise ValueError(
                    f"sets: got {name!r}, which {store.path} does not hold; the nearest it holds is {near[0]!r}"
                )
        return sets
    if part is None or part == "all":
        return store.ids
    if part not in ("train", "val", "test"):
        raise ValueError(f"part: got {part!r}, wanted train, val, test or all")
    ids = getattr(store.split(split, fold), part)
    if not ids:
        raise ValueError(f"part: the split has no {part} sets; choose another part, or part=all")
    return list(ids)


def predict_sets(trained: Trained, store: Store, ids: Sequence[str], chunk_size: int | None) -> np.ndarray:
    """Class probabilities ``(N, C)`` of the sets ``ids``, one after the other, with a progress bar."""
    trained.check(store)
    sweeps = len(getattr(trained.task.model.encoder, "stages", [0]))
    rows = []
    for bag in with_progress(store, ids, chunk_size, "predicting", sweeps):
        outputs, _ = predict_all(trained.task, [Example(bag, None)], precision=trained.precision)
        rows.append(outputs[0].double().numpy())
    return np.stack(rows)


def with_progress(store: Store, ids: Sequence[str], chunk_size: int | None, what: str, sweeps: int = 1) -> Iterator[Any]:
    """The sets (`ParquetSet`), opened, under a bar of sets and elements a second and time left that moves chunk by chunk.

    Args:
        sweeps: about how often each chunk will be read.
    """
    with _Bar(what, len(ids), sum(store.record(set_id).n for set_id in ids)) as bar:
        for set_id in ids:
            yield _Counted(store.open(set_id, chunk_size), lambda count: bar.advance(count / sweeps))
            bar.finish(store.record(set_id).n)


def _out(wanted: str | None, run: Path, kind: str, store: Store, part: str | None) -> Path:
    if wanted is not None:
        return Path(wanted)
    home = run if run.is_dir() else run.parent
    return home / kind / "-".join([store.path.name, *([part] if part else [])])


def _threshold(config: Mapping[str, Any], trained: Trained) -> float | None:
    if len(trained.task.classes) > 2:
        if config["threshold"] is not None:
            raise ValueError(f"threshold: got {config['threshold']} for {len(trained.task.classes)} classes, wanted null")
        return None
    threshold = trained.threshold if config["threshold"] is None else config["threshold"]
    if threshold is None:
        log.warning("threshold: the run has none (it is not finished, or only its checkpoint is here); 0.5 is used")
    return threshold


class _Counted(ChunkedSet):
    """A set that says how many elements went by."""

    def __init__(self, inner: Any, tick: Callable[[float], None]) -> None:
        self.inner, self.tick, self.name, self.batch_shape = inner, tick, inner.name, inner.batch_shape

    @property
    def sizes(self) -> Sequence[int]:
        return self.inner.sizes

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        sizes = self.sizes
        for index, part in zip(range(len(sizes)) if ids is None else ids, self.inner.map(fn, *args, ids=ids)):
            self.tick(sizes[index])
            yield part

    def coarser(self, factor: int) -> ChunkedSet:
        coarser = self.inner.coarser(factor)
        return self if coarser is self.inner else _Counted(coarser, self.tick)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Bar:
    """tqdm by elements, with sets beside them; silent where standard error is no terminal."""

    def __init__(self, what: str, sets: int, elements: int) -> None:
        from tqdm import tqdm

        shape = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=elements, desc=what, bar_format=shape, leave=False, mininterval=0.2, disable=quiet)
        self.what, self.sets, self.elements, self.began = what, sets, elements, time.monotonic()
        self.finished, self.whole, self.part = 0, 0, 0.0  # sets, elements of those, elements of the set in work

    def advance(self, elements: float) -> None:
        self.part += elements
        self._show()

    def finish(self, elements: int) -> None:
        self.finished, self.whole, self.part = self.finished + 1, self.whole + elements, 0.0
        self._show()

    def _show(self) -> None:
        seen = min(self.whole + self.part, self.elements)
        self.bar.set_postfix_str(f" {self.finished:,} of {self.sets:,} sets, {self._rates(seen)}", refresh=False)
        self.bar.update(max(seen - self.bar.n, 0))

    def _rates(self, seen: float) -> str:
        seconds = max(time.monotonic() - self.began, 1e-6)
        return f"{self.finished / seconds:.1f} sets/s, {seen / seconds:,.0f} elements/s"

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        log.info("%s: %d sets, %s elements, %s", self.what, self.finished, f"{self.whole:,}", self._rates(self.whole))
