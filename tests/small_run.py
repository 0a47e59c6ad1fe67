"""Run folders of small trained models, for tests that serve them."""

import zipfile
from pathlib import Path

import torch

WIDTH = 6


def small_run(root: Path) -> Path:
    """Of bags of vectors."""
    from distset.data import Bag, StoreWriter, make_splits

    generator = torch.Generator().manual_seed(0)
    labels = {f"bag-{i}": ["no", "yes"][i % 2] for i in range(12)}
    with StoreWriter(root / "store") as writer:
        for i, (name, label) in enumerate(labels.items()):
            writer.add(Bag(name, (torch.randn(6, WIDTH, generator=generator) + i % 2).numpy(), label=label))
        writer.finish(splits=make_splits(labels, folds=3))
    small = ["model=umbc", "model.width=8", "model.slots=4", "model.heads=2", "plan.epochs=1"]
    return _trained(root / "run", "data=store", f"data.path={root / 'store'}", *small)


def small_documents(root: Path, model: str = "umbc_set_transformer") -> Path:
    """Of reviews in ten words."""
    with zipfile.ZipFile(root / "movie_reviews.zip", "w") as file:
        for number in range(20):
            kind, word = (("neg", "dull"), ("pos", "fine"))[number % 2]
            text = f"a {word} film of {number} minutes"
            file.writestr(f"movie_reviews/{kind}/cv{number // 2}{number:02d}_1.txt", text)
    given = ["data.examples.vocabulary=9", "data.examples.chunk_size=2", "model.width=8", *TWO_STEPS]
    return _trained(root / model, "task=documents", f"model=documents/{model}", f"data.examples.path={root}", *given)


def small_problem(folder: Path, *overrides: str) -> Path:
    """Of any problem."""
    return _trained(folder, *overrides, *TWO_STEPS)


TWO_STEPS = ["plan.epochs=null", "plan.max_steps=2", "plan.batch=2"]


def _trained(folder: Path, *overrides: str) -> Path:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from distset.training import train_run

    given = [*overrides, "run.bar=false", "run.plots=false", "cluster=none"]
    with initialize_config_module("conf", version_base="1.3"):
        train_run(OmegaConf.to_container(compose("train", overrides=given), resolve=True), folder)
    return folder
