"""The run folder of a small bag classifier, for tests that serve it."""

from pathlib import Path

import torch

WIDTH = 6


def small_run(root: Path) -> Path:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from distset.data import Bag, StoreWriter, make_splits
    from distset.training import train_run

    generator = torch.Generator().manual_seed(0)
    labels = {f"bag-{i}": ["no", "yes"][i % 2] for i in range(12)}
    with StoreWriter(root / "store") as writer:
        for i, (name, label) in enumerate(labels.items()):
            writer.add(Bag(name, (torch.randn(6, WIDTH, generator=generator) + i % 2).numpy(), label=label))
        writer.finish(splits=make_splits(labels, folds=3))
    small = ["model=umbc", "model.width=8", "model.slots=4", "model.heads=2", "plan.epochs=1", "cluster=none"]
    overrides = ["data=store", f"data.path={root / 'store'}", "run.bar=false", "run.plots=false", *small]
    with initialize_config_module("conf", version_base="1.3"):
        train_run(OmegaConf.to_container(compose("train", overrides=overrides), resolve=True), root / "run")
    return root / "run"
