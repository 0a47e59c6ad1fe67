"""Shared by tests and examples in docstrings: the folder of real data, and one thread and a seed so that figures repeat."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # the groups are read right after
def pytest_collection_modifyitems(items):
    """Tests that start a Ray are one worker's where tests run side by side, and begin first."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(autouse=True)
def _quiet_default_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data: ``DISTSET_DATA``, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DISTSET_DATA", Path(__file__).parents[1] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set DISTSET_DATA to the folder")
    return folder
