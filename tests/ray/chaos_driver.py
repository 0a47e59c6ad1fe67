"""A driver that trains on a cluster and may be killed at any time.

``python chaos_driver.py FOLDER ADDRESS WORKERS ACTORS SHARE``; ``FOLDER/step`` tells how far it is, ``FOLDER/history.json``
appears when it is done.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

from distset import InMemory, Sampled
from distset.checkpoints import Checkpoints
from distset.cluster.config import Cluster
from distset.cluster.train import train_on_ray
from distset.optim import Optimisation
from distset.tasks.bag_models import umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, Watches, fit

PLAN = Plan(epochs=8, batch=4, log_every=2, checkpoint_every=3, evaluate_every=5)  # 24 steps
PAUSE = 0.15  # seconds a step, so that there is a middle to be killed in


class Progress(Watch):
    """Writes the step to a file, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        draft = self.path.with_name(f"step-{os.getpid()}")
        draft.write_text(str(step))
        os.replace(draft, self.path)
        time.sleep(PAUSE)


def work(*, watch: Watch, device: torch.device, folder: Path) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(3)
    bags = [
        Example(InMemory(torch.randn(12 + i, 3, generator=generator) + i % 2, 3, name=f"bag-{i}"), i % 2) for i in range(12)
    ]
    torch.manual_seed(0)
    task = BagTask.of(*umbc(3, 1, slots=2, width=8, heads=2, dropout=0.2), classes=["no", "yes"], grad=Sampled(2))
    task.model.to(device)
    watch = Watches(watch, Progress(folder / "step"))
    recipe = Optimisation(torch.optim.Adam, lr=0.01)
    return fit(
        task, bags, bags[:4], plan=PLAN, optimisation=recipe, checkpoints=Checkpoints(folder / "checkpoints"), watch=watch
    ).history


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    workers, actors, share = map(int, sys.argv[3:])
    where = Cluster(workers=workers, actors=actors, actor_cpus=0.5, set_parallel=share, address=sys.argv[2])
    cluster = where._replace(max_failures=5, wait_seconds=60)
    history = train_on_ray(functools.partial(work, folder=folder), cluster)
    (folder / "history.json").write_text(json.dumps(history))
