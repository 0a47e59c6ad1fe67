"""The order of the house: a file imports only from lines above its own; Ray and Hydra have one place each."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One line a layer, read top to bottom. A line names modules, or packages with all inside (the longest match counts);
# files of one line may import each other.
SPINE = """
    seeds files versions kernels build
    checkpoints
    states
    sets
    waiting
    encoders
    blocks
    noise
    set_functions krylov iterations offers
    subsets
    solvers
    projections
    encode fixed_point expect
    solve solvers.check collapse
    perturb_and_map
    gains
    mean_field large_offers
    metrics optim losses
    choose
    explain
    world
    carried
    task
    train
    testing
"""
ABOVE = """
    report
    tasks
    data
    run_log runs stream_store
    problems bags bags.runs bags.predict bags.explain
    bags.results bags.evaluate served
    doctor.findings
    cluster
    training
    search search.trial search.results
    cluster.tune cluster.schedulers cluster.search_progress search.run
    reproduce
    doctor
"""
LINES = [line.split() for line in (SPINE + ABOVE).strip().splitlines()]
RANK = {f"distset.{name}": rank for rank, line in enumerate(LINES) for name in line}
PUBLIC = "distset.encode"  # `import distset` brings this line and those above it


@functools.cache
def modules(folder: str) -> dict[str, Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths)}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            known = modules("distset")
            yield from [name for name in inner if name in known] or [node.module]


def rank(module: str) -> int | None:
    while module not in RANK and "." in module:
        module = module.rpartition(".")[0]
    return RANK.get(module)


@pytest.mark.parametrize("module", [name for name in modules("distset") if name != "distset"])
def test_a_file_imports_only_from_lines_above_it(module):
    own = rank(module)
    assert own is not None, f"{module} has no line: add it to a line of tests/test_layering.py"
    for imported in imports(modules("distset")[module]):
        top = imported.split(".")[0]
        assert top not in ("jobs", "conf", "tests", "benchmarks"), f"{module} imports {imported}"
        if top != "distset":
            continue
        theirs = rank(PUBLIC) if imported == "distset" else rank(imported)
        assert theirs is not None, f"{module} imports {imported}, which has no line"
        assert theirs <= own, f"{module} imports {imported}, which is below it"


def test_ray_and_hydra_have_one_place_each():
    for module, path in {**modules("distset"), **modules("jobs")}.items():
        tops = {imported.split(".")[0] for imported in imports(path)}
        assert "ray" not in tops or module.startswith("distset.cluster."), f"{module} imports ray"
        assert not tops & {"hydra", "omegaconf"} or module.startswith("jobs."), f"{module} imports Hydra"


def test_data_knows_no_models():
    for module, path in modules("distset").items():
        if module.startswith("distset.data"):
            ours = {name for name in imports(path) if name.startswith("distset.") and not name.startswith("distset.data")}
            spine = {f"distset.{name}" for name in ("sets", "seeds", "states", "offers", "files", "waiting")}
            assert ours <= spine, f"{module}: {ours}"


ALONE = """
import importlib, importlib.metadata as metadata, re, sys

def closure(names):
    found = set()
    while names:
        name = re.split(r"[^A-Za-z0-9._-]", names.pop())[0].lower().replace("_", "-")
        if name not in found:
            found.add(name)
            try:
                names += [r for r in metadata.requires(name) or [] if "extra ==" not in r]
            except metadata.PackageNotFoundError:
                pass
    return found

allowed = closure(["torch", "numpy"])
owners = metadata.packages_distributions()

class Wall:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        dists = [d.lower().replace("_", "-") for d in owners.get(name.split(".")[0], [])]
        if dists and not set(dists) & (allowed | {"distset"}):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Wall(finder) for finder in sys.meta_path]
for module in MODULES:
    importlib.import_module(module)

import torch
from distset import InMemory
from distset.tasks.bag_models import umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, fit
bags = [Example(InMemory(torch.randn(9, 3), chunk_size=4, name=str(i)), i % 2) for i in range(4)]
task = BagTask.of(*umbc(3, 1, slots=2, width=8, heads=2), classes=["no", "yes"])
print("steps", fit(task, bags, plan=Plan(epochs=1, batch=2)).step)
try:
    import pyarrow
except ModuleNotFoundError:
    print("walled")
"""


def test_the_spine_needs_torch_and_numpy_alone():
    spine = {name for line in SPINE.split() for name in [f"distset.{line}"]}
    names = [name for name in modules("distset") if any(name == s or name.startswith(s + ".") for s in spine)]
    code = ALONE.replace("MODULES", repr(["distset", *names]))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["steps 2", "walled"]
