"""The how-tos' Python and settings run as they stand, and the site's pages and modules exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distset.runs import RunFolder

DOCS = Path(__file__).parents[1] / "docs"
RUN = ["how-to/encoder.md", "how-to/task.md", "how-to/solver.md"]


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize("page", RUN)
def test_python_of_a_how_to_runs(page, tmp_path):
    code = blocks(DOCS / page)
    assert code
    if page.endswith("task.md"):
        code += "\nfrom distset.train import fit, Plan\nfit(task(4), *parts(60)[:2], plan=Plan(epochs=1))\n"
    (tmp_path / "page.py").write_text(code)
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_problem_of_the_how_to_trains_by_its_command(tmp_path):
    page = DOCS / "how-to" / "task.md"
    (tmp_path / "mine.py").write_text(blocks(page))
    files = dict(re.findall(r"`(settings/\S+\.yaml)`[^`]*?\n\n```yaml\n(.*?)```", page.read_text(), re.DOTALL))
    assert set(files) == {"settings/data/mine.yaml", "settings/task/mine.yaml"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    first = re.findall(r"^python -m (jobs\.train .*)$", page.read_text(), re.MULTILINE)[0]
    short = ["data.examples.sets=60", "plan.epochs=1", "run.plots=false", "run.bar=false"]
    done = subprocess.run(
        [sys.executable, "-m", *first.split(), *short], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / "mine")
    assert run.config["task"] == {"_target_": "mine.task", "width": 32}
    assert run.config["data"] == {"name": "mine", "examples": {"_target_": "mine.parts", "sets": 60, "seed": 0}}
    assert run.metrics["examples"] == {"train": 20, "val": 20, "test": 20}


def test_every_page_of_the_site_is_there_and_every_module_imports():
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    pages = re.findall(r"(\S+\.md)", nav.partition("nav:")[2])
    assert len(pages) > 15
    shown = [module for page in pages for module in re.findall(r"^::: (\S+)", (DOCS / page).read_text(), re.MULTILINE)]
    for module in shown:
        importlib.import_module(module)
    assert len(shown) == len(set(shown))
    package = DOCS.parent / "distset"
    own = [path for folder in ("tasks", "problems") for path in (package / folder).glob("[!_]*.py")]
    assert {f"distset.{path.parent.name}.{path.stem}" for path in own if not path.stem.endswith("_pictures")} <= set(shown)
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert {path for path in found if not path.startswith("results/")} == set(pages)
