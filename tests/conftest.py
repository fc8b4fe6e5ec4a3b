"""Shared fixtures: an isolated, offline Ultralytics, tiny data, tiny checkpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="kd-yolo-tests-"))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["KD_YOLO_DATA"] = tempfile.mkdtemp(prefix="kd-yolo-data-")

TINY = {"imgsz": 64, "batch": 8, "plots": False, "device": "cpu", "workers": 0, "verbose": False}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data and weights, or skip."""
    folder = Path(os.environ.get("KD_YOLO_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set KD_YOLO_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data YAML of 24 + 8 + 8 synthetic steel images."""
    from kd_yolo.data.synthetic import make_steel_synth

    return make_steel_synth(tmp_path_factory.mktemp("data") / "tiny", train=24, val=8, test=8, seed=3)


@pytest.fixture(scope="session")
def tiny_teacher(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LightNet-n checkpoint that trained one epoch on the tiny data."""
    from kd_yolo.config import split_train_keys
    from kd_yolo.training import train

    keys = {**TINY, "data": str(tiny_data), "model": "lightnet-n", "teacher": "none", "epochs": 1}
    keys |= {"project": str(tmp_path_factory.mktemp("teacher")), "name": "run", "export": "none", "benchmark": False}
    return train(*split_train_keys(keys)).best


@pytest.fixture
def train_keys(tiny_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that builds the keys of a tiny training command."""

    def build(**given: Any) -> dict[str, Any]:
        base = {**TINY, "data": str(tiny_data), "model": "lightnet-n", "epochs": 2, "close_mosaic": 0}
        base |= {"project": str(tmp_path), "name": "run", "export": "none", "benchmark": False}
        return {**base, **given}

    return build
