"""A trained run as a server of streams sees it: an encoder of growing sets, what their elements are, what to answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from distset.encoders.stream import Stream
from distset.problems.runs import load_problem
from distset.runs import RunFolder
from distset.task import Elements, StreamedTask
from distset.tasks.bags import BagTask
from distset.tasks.set_models import PerChunk

__all__ = ["Served", "load_served"]


class Served(NamedTuple):
    """What `distset.cluster.serve` serves.

    Attributes:
        task: answers from the encoding of a set; ``task.model.encoder`` makes it, in eval mode.
        elements: what a set consists of.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from distset.tasks.document_models import sse
        >>> from distset.tasks.documents import document_task
        >>> task = document_task(20, ["bad", "good"], False, model=partial(sse, width=8, slots=4))
        >>> served = Served(task, task.elements)
        >>> served.about()
        {'classes': ['bad', 'good'], 'element_shape': (1,), 'words': 20}
        >>> stream = served.task.model.encoder.stream()
        >>> _ = stream.add(torch.tensor([[3], [0], [19]]))
        >>> list(served.task.answer(stream.value())["probabilities"])
        ['bad', 'good']
    """

    task: Any
    elements: Elements

    def about(self) -> dict[str, Any]:
        """The model in plain data: ``classes`` where it has them, ``element_shape``, ``words`` where elements are words."""
        known = {"classes": getattr(self.task, "classes", None), "element_shape": self.elements.shape}
        return {key: value for key, value in {**known, "words": self.elements.words}.items() if value is not None}


def load_served(run: RunFolder) -> Served:
    """The best weights of a run of bags, documents, clustering or completion, or of any `StreamedTask`.

    Raises:
        ValueError: for a task that is none, an encoder of several sweeps, one whose value depends on how a set is cut into
            chunks; as `RunFolder.load_task`.

    Example:
        >>> import tempfile
        >>> from distset.checkpoints import Checkpoints
        >>> from distset.problems.runs import train_problem
        >>> model = {"_target_": "distset.tasks.clustering_models.sse", "_partial_": True, "width": 8}
        >>> config = {
        ...     "data": {"examples": {"_target_": "distset.problems.mixtures.mixtures", "sets": [4, 2, 2], "size": 16}},
        ...     "task": {"_target_": "distset.tasks.clustering.clustering_task", "model": model},
        ...     "plan": {"_target_": "distset.train.Plan", "epochs": 1},
        ...     "optim": None,
        ...     "seed": 0,
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder.prepare(folder, config)
        ...     _ = train_problem(config, Checkpoints(run.checkpoints))
        ...     load_served(run).about()
        {'element_shape': (2,)}
    """
    if "examples" in run.config["data"]:
        task = load_problem(run)
        if not isinstance(task, StreamedTask):
            raise ValueError(
                f"run: {run.path} was trained by a {type(task).__name__}, wanted a task with elements and an answer for the "
                "encoding of a set (distset.task.StreamedTask), such as bags, documents, clustering, completion"
            )
        served = Served(task, task.elements)
    else:
        bags: BagTask = run.load_task()
        served = Served(bags, Elements(run.element_shape))
    encoder = served.task.model.encoder
    if any(isinstance(module, PerChunk) for module in encoder.modules()):
        raise ValueError(
            f"run: the model of {run.path} is not mini-batch consistent, its answer would depend on how a client cuts a set "
            "into chunks; train one that is, such as UMBC followed by this network"
        )
    Stream(encoder, element_ndim=len(served.elements.shape))
    return served
