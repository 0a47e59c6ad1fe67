"""Shared fixtures: the folder of real data, and one thread a test so that figures repeat."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_default_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data: ``DISTSET_DATA``, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DISTSET_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set DISTSET_DATA to the folder")
    return folder
