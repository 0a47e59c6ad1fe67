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
