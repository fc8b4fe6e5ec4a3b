"""What ``kd-yolo methods`` says was measured is what the committed benchmarks hold."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from kd_yolo.info_commands import methods
from kd_yolo.measured import Measured, measured_methods

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def summarize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summarize", ROOT / "benchmarks" / "summarize_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_methods__equal_the_committed_benchmarks(summarize: ModuleType) -> None:
    assert summarize.collect() == measured_methods()


def test_docs__show_the_same_tables(summarize: ModuleType) -> None:
    page = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    assert summarize.tables(measured_methods()) in page


def test_methods__verdict_and_cost_of_every_measured_method() -> None:
    text, content = methods({})
    for row in measured_methods().methods:
        assert row.one_line() in text
    told = {row["method"]: row["measured"] for row in content["methods"]}
    assert told["kd-lightnet"][0]["verdict"] == "helped"
    assert told["none"] == []


def test_one_line__says_what_was_measured_and_nothing_else() -> None:
    assert Measured(method="x").one_line() == "not measured"
    row = Measured(method="x", form="a=1", gain=1.24, low=-0.1, high=2.5, pairs=3, verdict="cannot tell")
    assert row.one_line() == "a=1: cannot tell: +1.2 points mAP50-95 [-0.1, +2.5], 3 pairs"
    assert Measured(method="x", step_of_none=1.5).one_line() == "step 1.50 x plain training"
    with pytest.raises(ValidationError):
        Measured(method="x", pairs=0)
