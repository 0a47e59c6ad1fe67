"""What a run does and how fast, as Prometheus metrics of Ray: scraped from each node's metrics port, shown by any dashboard.

==============================================  =========  ==================================================================
name at the endpoint                            kind       what
==============================================  =========  ==================================================================
``ray_distset_step``, ``ray_distset_steps``     gauge      steps done, steps of the whole run
``ray_distset_loss``                            gauge      loss of the last step's global batch
``ray_distset_sets_per_second``                 gauge      sets of the last step over its seconds, all workers together
``ray_distset_elements_per_second``             gauge      elements likewise
``ray_distset_sets_read_total``                 counter    sets read in training, all workers together
``ray_distset_elements_read_total``             counter    elements likewise
``ray_distset_step_seconds``                    gauge      of the last step, by the worker's clock; evaluation is not in it
``ray_distset_input_wait_seconds``              gauge      of these, waited for elements to come from the disk
``ray_distset_step_seconds_sum_total``          counter    all steps' seconds
``ray_distset_input_wait_seconds_sum_total``    counter    all steps' waiting
==============================================  =========  ==================================================================

Labels: ``run`` and ``rank``. What holds for all workers together is told by rank 0 alone; times by every rank. A step ends
with a collective, so a rank that reads fast waits for the slowest one: compare input waits by rank. What actors
(``cluster.actors``) wait for their part of a set is not in it.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from distset.train import Record, Watch

__all__ = ["Metrics"]


class Metrics(Watch):
    """Keeps the metrics of one worker; Ray sends them to its node's metrics port every few seconds.

    Args:
        run: name of the run, a label.
        rank: of the worker, a label; rank 0 also tells what holds for all.
    """

    def __init__(self, run: str, rank: int) -> None:
        self._tags, self._first = {"run": run, "rank": str(rank)}, rank == 0
        self._work = (0, 0)  # sets and elements of the last step
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def started(self, step: int, total: int, history: list[Record]) -> None:
        if self._first:
            self._set("step", step, "steps done")
            self._set("steps", total, "steps of the whole run")

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        self._work = sets, elements
        if self._first:
            self._set("step", step, "steps done")
            self._set("loss", loss, "loss of the last step's global batch")
            self._add("sets_read", sets, "sets read in training, all workers together")
            self._add("elements_read", elements, "elements read in training, all workers together")

    def paced(self, step: int, seconds: float, waited: float) -> None:
        self._set("step_seconds", seconds, "seconds of the last step")
        self._set("input_wait_seconds", waited, "seconds of the last step waited for elements")
        self._add("step_seconds_sum", seconds, "seconds of all steps")
        self._add("input_wait_seconds_sum", waited, "seconds of all steps waited for elements")
        if self._first:
            sets, elements = self._work
            self._set("sets_per_second", sets / seconds, "sets of the last step over its seconds, all workers together")
            self._set("elements_per_second", elements / seconds, "elements of the last step over its seconds, all workers")

    def _set(self, name: str, value: float, about: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"distset_{name}", about, tuple(self._tags)).set_default_tags(self._tags)
        self._gauges[name].set(value)

    def _add(self, name: str, value: float, about: str) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(f"distset_{name}", about, tuple(self._tags)).set_default_tags(self._tags)
        if value > 0:  # Ray refuses to count nothing
            self._counters[name].inc(value)
