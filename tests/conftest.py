"""Shared fixtures: an isolated, offline Ultralytics, tiny data, tiny checkpoints."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _folder_until_exit(prefix: str) -> str:
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


ROOT = Path(__file__).resolve().parents[1]
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
if "YOLO_CONFIG_DIR" not in os.environ:
    os.environ["YOLO_CONFIG_DIR"] = _folder_until_exit("kd-yolo-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["KD_YOLO_DATA"] = _folder_until_exit("kd-yolo-data-")

SS_DISABLE = 2  # of sigaltstack(2)

# Saving, merging and checking a real LightNet takes two thirds of a tiny training; where it matters a test names one.
TINY_LAYOUT = str(ROOT / "tests" / "layouts" / "lightnet-tiny.yaml")
TINY = {"imgsz": 64, "batch": 8, "plots": False, "device": "cpu", "workers": 0, "verbose": False}


class SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Handle signals on the thread's own stack, and let the log be heard whatever an earlier test did to it.

    Ray, MLflow and others set up logging for the whole process, pytest's own handler included.

    pytest's faulthandler and Ray's core give signals a small stack of their own. When OpenVINO has switched on AMX,
    whose registers take 8 KB more to save, that stack overflows when a data loader's worker ends (SIGCHLD): a crash.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(SignalStack(None, SS_DISABLE, 0)), None)
    logging.disable(logging.NOTSET)
    logger = logging.getLogger("ultralytics")
    logger.disabled, logger.propagate = False, True
    logger.setLevel(logging.INFO)
    heard: Any = item.config.pluginmanager.get_plugin("logging-plugin")
    for handler in (heard.caplog_handler, heard.report_handler):
        handler.setLevel(logging.NOTSET)
        handler.filters.clear()


@pytest.fixture(autouse=True, scope="module")
def settled_heap() -> Iterator[None]:
    """Take what is imported by now out of the garbage collector's sight.

    Ultralytics collects in full after every epoch and every validation: up to half a second each time beside the
    600,000 objects of this suite.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data and weights, or skip."""
    folder = Path(os.environ.get("KD_YOLO_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set KD_YOLO_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_layout() -> str:
    """Return the YAML of a LightNet with as few layers as one can have."""
    return TINY_LAYOUT


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data YAML of 24 + 8 + 8 synthetic steel images."""
    from kd_yolo.data.synthetic import make_steel_synth

    return make_steel_synth(tmp_path_factory.mktemp("data") / "tiny", train=24, val=8, test=8, seed=3)


@pytest.fixture(scope="session")
def tiny_teacher(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small detector's checkpoint that trained one epoch on the tiny data."""
    from kd_yolo.config import split_train_keys
    from kd_yolo.training import train

    keys = {**TINY, "data": str(tiny_data), "model": TINY_LAYOUT, "teacher": "none", "epochs": 1}
    keys |= {"project": str(tmp_path_factory.mktemp("teacher")), "name": "run", "export": "none", "benchmark": False}
    return train(*split_train_keys(keys)).best


class Heard(logging.Handler):
    """A handler of its own, which nothing that sets up logging for the whole process has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.records.append(record)

    @property
    def text(self) -> str:
        """Return all messages, one a line."""
        return "\n".join(record.getMessage() for record in self.records)


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Return what Ultralytics' logger says during a test."""
    handler, logger = Heard(), logging.getLogger("ultralytics")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def train_keys(tiny_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that builds the keys of a tiny training command."""

    def build(**given: Any) -> dict[str, Any]:
        base = {**TINY, "data": str(tiny_data), "model": TINY_LAYOUT, "epochs": 2, "close_mosaic": 0}
        base |= {"project": str(tmp_path), "name": "run", "export": "none", "benchmark": False}
        return {**base, **given}

    return build
