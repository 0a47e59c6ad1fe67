"""What the tests of the store share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Flushing to the disk is for the failure of a machine, not of a process: no test can see it, and all would wait."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
