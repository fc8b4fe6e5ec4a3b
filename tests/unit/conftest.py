"""Checkpoints of small detectors; this file also puts the factories beside it within reach of the folders below."""

from __future__ import annotations

from pathlib import Path

import pytest
from detector_factory import save_checkpoint, tiny_detector


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with RepBlocks and both head branches, trained at 64 px as far as it says."""
    return save_checkpoint(tiny_detector(), tmp_path_factory.mktemp("run") / "weights" / "best.pt")
