"""What the README says is run: its Python in order, its commands as far as their configuration."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from distset.data import Bag, write_store

    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    write_store(
        "store/slides", [Bag("slide_17", torch.randn(5000, 512), label="1"), Bag("other", torch.randn(9, 512), label="0")]
    )
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logit"].shape == (1,)
    assert namespace["z"].shape == (16, 512)


@pytest.mark.parametrize("command", re.findall(r"-m (jobs\.\w+ .*?)(?:\s+#.*)?$", "\n".join(blocks("bash")), re.MULTILINE))
def test_commands_compose(command):
    job, *overrides = command.split()
    order = [sys.executable, "-m", job, "--cfg", "job", "--resolve", *overrides]
    done = subprocess.run(order, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for override in overrides:
        value = override.partition("=")[2]
        assert value in done.stdout or value in ("clam", "store", "ray"), f"{override} left no trace"


def test_files_and_targets_named_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
